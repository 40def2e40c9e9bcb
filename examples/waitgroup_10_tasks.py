"""Go's first WaitGroup program: ten tasks at once, and the main program waits for all of them.

Prints ten lines "Task N" in whatever order they ran, and then, always last::

    All tasks finished
"""

import time

from zmqsched import Client, LocalCluster, WaitGroup


def task(number: int) -> None:
    time.sleep(0.05)
    print(f"Task {number}")  # a task's output appears where the cluster was started


def main() -> None:
    with LocalCluster() as cluster, Client(cluster) as client:
        group = WaitGroup(client)
        for number in range(1, 11):
            # In Go: wg.Add(1), go task(number), and in the task: defer wg.Done(). go() does all three; the count goes
            # down once for each task, even if the task fails or has to run again because a worker died.
            group.go(task, number)
        group.wait()
        print("All tasks finished")


if __name__ == "__main__":
    main()
