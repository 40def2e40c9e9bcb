"""What the tests of payloads pack, and another process to unpack it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

from zmqsched.payload import pack_value, unpack_value
from zmqsched.payload.pickling import unpack
from zmqsched.payload.wrappers import Wrapped

ROOT = Path(__file__).parent.parent.parent


def run_as_main(source: str) -> str:
    """Run a script of the user's, where classes and functions live in ``__main__``; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def unpack_function(payload):
    """As a worker does, but with the modules that this process has."""
    found = unpack(payload)
    return found.load() if isinstance(found, Wrapped) else found


def there_and_back(value):
    return unpack_value(pack_value(value))


def add(left, right=0):
    return left + right


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Explosive:
    def __reduce__(self):
        raise SystemExit("boom in __reduce__")


class ExplodesLater:
    def __reduce__(self):
        return sys.exit, (3,)


def module_of(source: str) -> types.ModuleType:
    """A module nobody can import, like a notebook."""
    module = types.ModuleType("notebook")
    exec(textwrap.dedent(source), vars(module))
    return module


# A script's functions and classes live in __main__; the other side has one of its own.
WORKER_SIDE = """
import subprocess, sys
from zmqsched import payload

# The other side has a __main__ of its own.
SERVE = '''
import sys
from zmqsched.payload import *
stdin = sys.stdin.buffer
def read():
    return stdin.read(int(stdin.readline()))
fn, call = load_function(read())[0], unpack_call(read())
try:
    value = b"v" + pack_value(fn(*call[0], **call[1]))
except BaseException as error:
    value = b"e" + pack_exception(error)
sys.stdout.buffer.write(value)
'''

def remote(fn, *args, **kwargs):
    parts = [payload.FunctionPickler().pack(fn)[1], payload.pack_call(args, kwargs)]
    done = subprocess.run([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, check=True,
                          input=b"".join(b"%d\\n%b" % (len(part), part) for part in parts))
    if done.stdout[:1] == b"v":
        return payload.unpack_value(done.stdout[1:])
    raise payload.unpack_exception(done.stdout[1:])"""
