"""A worker dies in the middle of a map, and the map does not notice.

200 tasks of 10 ms run on three workers; one of them is killed with SIGKILL. Prints how it went; the pid varies::

    killed worker n1/2 (pid 12345) after 50 of 200 results
    all 200 results are right: True
    workers that died: 1, tasks that ran again: 1

A task that was running when its worker died runs again, so it may have run twice: such tasks should not mind.
"""

import os
import signal
import time

from zmqsched import Client, LocalCluster


def slow_square(number: int) -> int:
    time.sleep(0.01)
    return number * number


def main() -> None:
    with LocalCluster(n_workers=3) as cluster, Client(cluster) as client:
        results = []
        for result in client.map(slow_square, range(200)):
            results.append(result)
            if len(results) == 50:
                victim = client.workers()[1]
                os.kill(victim.pid, signal.SIGKILL)
                print(f"killed worker {victim.id} (pid {victim.pid}) after {len(results)} of 200 results")

        print("all 200 results are right:", results == [number * number for number in range(200)])
        counts = client.status().counts
        died, again = counts.get("worker deaths", 0), counts.get("requeued: worker died", 0)
        print(f"workers that died: {died}, tasks that ran again: {again}")


if __name__ == "__main__":
    main()
