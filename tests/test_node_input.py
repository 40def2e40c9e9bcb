"""``zmqsched node --connect -``: the connection file is the first line of input, and the end of input the node's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import Home, alive, eventually

from zmqsched import Client, LocalCluster
from zmqsched.config import MAX_FILE, ConnectionFile

FILE = {
    "format": 1, "name": "c", "cluster_id": "1", "host": "h", "pid": 1, "python": "3", "zmqsched": "0",
    "addresses": {role: ["tcp://127.0.0.1:1"] for role in ("work", "beats", "status")},
}  # fmt: skip


@pytest.fixture(scope="module")
def brokers(clusters: Home):
    """A cluster over TCP whose own node has nothing that the tasks here ask for."""
    with LocalCluster(1, listen="") as cluster:
        yield cluster


def start(*options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zmqsched", "node", "--connect=-", "--slots=1", "--ready-fd=1", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def hold_everything(path: str) -> None:
    """Hold the GIL, with a child and a daemon."""
    import ctypes
    import json
    import os
    import subprocess

    child = subprocess.Popen(["sleep", "600"], start_new_session=True, env={}).pid
    script = "setsid sh -c 'echo $$; exec >&-; exec sleep 600' &"
    daemon = int(subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, env={}, check=True).stdout)
    with open(path + ".part", "w") as file:
        json.dump([os.getpid(), child, daemon], file)
    os.rename(path + ".part", path)
    ctypes.PyDLL(None).sleep(600)


def test_the_end_of_input_ends_the_node_and_all_that_its_tasks_have_started(brokers, tmp_path):
    with start("--tag=here", "--label=box-1") as node, Client(brokers) as client:
        node.stdin.write(brokers.file.line())
        node.stdin.flush()
        assert json.loads(node.stdout.readline())["pid"] == node.pid
        assert "box-1" in [found.label for found in client.nodes()]
        future = client.options(tags=["here"], requeue=False).submit(hold_everything, str(tmp_path / "pids"))
        eventually((tmp_path / "pids").exists)
        family = json.loads((tmp_path / "pids").read_text())
        family += [child.pid for child in psutil.Process(node.pid).children(recursive=True)]
        assert all(alive(pid) for pid in family)
        node.stdin.close()
        assert node.wait(timeout=60) == 0
        eventually(lambda: not any(alive(pid) for pid in family))
        assert b"end of input" in node.stderr.read()
        assert future.exception(timeout=60) is not None


def test_the_key_is_nowhere_to_be_read(brokers):
    secret = brokers.file.client_secret.encode()
    assert secret
    with start("--log-level=debug") as node:
        node.stdin.write(brokers.file.line())
        node.stdin.flush()
        node.stdout.readline()
        family = eventually(lambda: psutil.Process(node.pid).children(recursive=True)[1:])  # the nursery, and a worker
        for pid in [node.pid, *(process.pid for process in family)]:
            for file in ("cmdline", "environ"):
                assert secret not in Path(f"/proc/{pid}/{file}").read_bytes()
        node.stdin.close()
        assert secret not in node.stdout.read() + node.stderr.read()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "ended before its first line did"),
        (b"{", "ended before its first line did"),
        (b"\n", "is empty"),
        (b"{\n", "is not JSON"),
        (b"[]\n", "the field `format`"),
        (json.dumps(FILE | {"format": 9}).encode() + b"\n", "has format 9"),
        (json.dumps(FILE | {"pid": "x"}).encode() + b"\n", r"pid`"),
        (json.dumps(FILE).encode() + b"\n", "server_key is empty, and a tcp:// address needs all keys"),
        (b"x" * (MAX_FILE + 1) + b"\n", "is over 65536 bytes"),
    ],
    ids=["nothing", "no end", "empty", "no JSON", "no file", "format", "field", "keys", "long"],
)  # fmt: skip
def test_a_first_line_that_is_not_good(line, says):
    with start() as node:
        out, _ = node.communicate(line, timeout=60)
        answer = json.loads(out)
        assert (node.returncode, answer["type"]) == (1, "ConnectionFileError")
        assert says in answer["error"]
        assert "\n" not in answer["error"]


def test_a_line_without_an_end_is_given_up_when_it_is_too_long():
    with start() as node:
        with subprocess.Popen(["cat", "/dev/zero"], stdout=node.stdin, stderr=subprocess.DEVNULL) as flood:
            node.stdin.close()
            assert "is over 65536 bytes" in json.loads(node.stdout.readline())["error"]
            flood.wait(timeout=60)  # of SIGPIPE
        assert node.wait(timeout=60) == 1


def test_whoever_says_nothing_is_not_waited_for():
    with start() as node:
        assert "no line came from standard input within 4 s" in json.loads(node.stdout.readline())["error"]
        assert node.wait(timeout=60) == 1


def test_without_anybody_to_tell_the_error_is_on_standard_error():
    command = [sys.executable, "-m", "zmqsched", "node", "--connect", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("zmqsched: standard input ended before its first line did")


def test_a_file_as_a_line_is_the_same_file(brokers):
    line = brokers.file.line()
    assert line.count(b"\n") == 1
    assert ConnectionFile.parse(line, "a line") == brokers.file
    assert msgspec.json.decode(line)["client_secret"] == brokers.file.client_secret


ALONE = """
import sys
from zmqsched import __main__
__main__.NODE_ALONE_S = 6.0
sys.exit(__main__.main(["node", "--connect=-", "--slots=1", "--ready-fd=1"]))
"""


def test_a_node_that_has_not_heard_of_its_broker_for_long_ends(brokers):
    """When a network is gone, the end of input may never come."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", ALONE], stdin=pipe, stdout=pipe, stderr=pipe) as node:
        node.stdin.write(brokers.file.line())
        node.stdin.flush()
        node.stdout.readline()
        os.kill(brokers.broker_pid, signal.SIGSTOP)
        try:
            assert node.wait(timeout=60) == 0
        finally:
            os.kill(brokers.broker_pid, signal.SIGCONT)
        assert b"node ends: the broker has been silent for" in node.stderr.read()
