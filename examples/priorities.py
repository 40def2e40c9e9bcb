"""Priorities: what waits is run highest priority first, whatever the order of submission.

One worker is kept busy while three tasks of priority 0, 10 and -5 are submitted. Prints::

    submitted: 0, 10, -5
    ran:       10, 0, -5
"""

import time

from zmqsched import Client, LocalCluster


def start_time() -> float:
    """When this task ran. All workers are on this host, so their monotonic clocks are one clock."""
    return time.monotonic()


def main() -> None:
    with LocalCluster(n_workers=1) as cluster, Client(cluster) as client:
        first = client.submit(time.sleep, 0.5)
        while not first.running():  # with the worker idle, the task submitted first would simply run first
            time.sleep(0.01)

        priorities = [0, 10, -5]
        futures = {priority: client.options(priority=priority).submit(start_time) for priority in priorities}
        ran = sorted(priorities, key=lambda priority: futures[priority].result())

    print("submitted:", ", ".join(map(str, priorities)))
    print("ran:      ", ", ".join(map(str, ran)))


if __name__ == "__main__":
    main()
