"""Ending what runs, and starting Python: single measurements for measures.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil

from zmqsched import Client

from . import work

IMPORT = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"


def slot_free_s(client: Client, workers: int) -> float:
    """From the cancel of one of the tasks that run to the answer of the next, which waits for its slot."""
    running = [client.submit(work.spin) for _ in range(workers)]
    while not all(future.running() for future in running):
        time.sleep(0.005)
    behind = client.submit(work.noop)
    began = time.perf_counter()
    running[0].cancel(force=True)
    behind.result()
    seconds = time.perf_counter() - began
    for future in running:
        future.cancel(force=True)
    while sum(client.status().tasks.values()):
        time.sleep(0.005)
    return seconds


def stop_button_s(client: Client) -> tuple[float, float]:
    """A map of tasks that spin, interrupted: seconds until the prompt is back, and until the workers use no CPU any more."""
    workers = [psutil.Process(worker.pid) for worker in client.workers()]
    at = [0.0]

    def press() -> None:
        while not all(worker.status() == psutil.STATUS_RUNNING for worker in workers):
            time.sleep(0.005)
        time.sleep(0.2)  # so that they are all in their task
        at[0] = time.perf_counter()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    try:
        list(client.map(work.spin, range(100)))
    except KeyboardInterrupt:
        back = time.perf_counter() - at[0]
    finger.join()
    while not all(worker.status() == psutil.STATUS_SLEEPING for worker in workers):
        time.sleep(0.002)
    idle = time.perf_counter() - at[0]
    if client.submit(os.getpid).result() not in {worker.pid for worker in workers}:
        raise RuntimeError("the next call had to wait for a new worker")
    return back, idle


def import_s(module: str) -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT.format(module)], capture_output=True, text=True, check=True)
    return float(done.stdout)
