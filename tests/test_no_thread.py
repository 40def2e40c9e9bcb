"""CPython 3.12 starts no thread from the moment the main thread has ended, when all that was open is still to be closed."""

from __future__ import annotations

from conftest import Scripts

REFUSAL = "can't create new thread at interpreter shutdown"
# To be run when the last client is there: what is registered last runs first.
AT_THE_END = f"""
import atexit
import threading

def refuse(thread):
    raise RuntimeError({REFUSAL!r})

@atexit.register
def no_more():
    threading.Thread.start = refuse
"""


def test_the_cluster_of_its_own_is_closed(scripts: Scripts):
    assert scripts.run(f"import zmqsched\nprint(zmqsched.map(abs, [-1, -2]))\n{AT_THE_END}") == ("[1, 2]\n", "")


def test_what_is_printed_first_at_the_end_is_shown(scripts: Scripts):
    out, err = scripts.run(f"""
import os
import sys
import time
import zmqsched

def prints():
    while not os.path.exists({str(scripts.home.path / "go")!r}):
        time.sleep(0.01)
    print("late")

client = zmqsched.Client()
client.submit(abs, 1).result()
client.submit(prints)
{AT_THE_END}
atexit.register(lambda: open({str(scripts.home.path / "go")!r}, "w").close())
atexit.register(lambda: setattr(threading.Thread, "start", refuse))
""")
    (scripts.home.path / "go").unlink()
    assert err == ""
    assert out.endswith("late\n"), out


def test_a_shutdown_without_waiting(scripts: Scripts):
    out, err = scripts.run(f"""
import time
import zmqsched

client = zmqsched.Client()
client.submit(abs, 1).result()
future = client.submit(time.sleep, 0.5)
future.add_done_callback(lambda future: print("done", future.result()))
{AT_THE_END}
atexit.unregister(no_more)
atexit.register(client.shutdown, wait=False)
atexit.register(no_more)
""")
    assert (out, err) == ("done None\n", "")
