"""Go's worker pool: ten tasks over three workers.

Prints which worker took which task, in the order they ran, and then, always last::

    Worker 1 processing task 1
    Worker 3 processing task 2
    ...
    All tasks finished

In Go the workers are goroutines that read task numbers from a channel. Here they are processes, and the channel is the
scheduler: a worker that is free gets the next task.
"""

import os
import time

from zmqsched import Client, LocalCluster, WaitGroup


def process(task: int, worker_numbers: dict[int, int]) -> None:
    print(f"Worker {worker_numbers[os.getpid()]} processing task {task}")
    time.sleep(0.1)


def main() -> None:
    with LocalCluster(n_workers=3) as cluster, Client(cluster) as client:
        # A worker does not know its number, but it knows its pid: number them in that order and tell the tasks.
        pids = sorted(worker.pid for worker in client.workers())
        worker_numbers = {pid: number for number, pid in enumerate(pids, start=1)}

        group = WaitGroup(client)
        for task in range(1, 11):
            group.go(process, task, worker_numbers)
        group.wait()
        print("All tasks finished")


if __name__ == "__main__":
    main()
