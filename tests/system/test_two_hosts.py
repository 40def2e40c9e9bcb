"""A broker on one host, a node and a client on another: two network namespaces joined by a cable.

Needs root and the ``ip`` command (Debian: iproute2). The connection file is all that the other host is given.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs the ip command (Debian: iproute2)"),
]

HERE, THERE = "10.111.7.1", "10.111.7.2"
USE = """
import sys
from zmqsched import Client
with Client(sys.argv[1]) as client:
    assert client._dealer.last_endpoint.startswith(b"tcp://"), "a network of its own is another host"
    assert list(client.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    big = bytes(8_000_000)
    assert client.submit(bytes, big).result(timeout=60) == big
    print(*[node.state for node in client.nodes()])
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces, by name; the cable is between 10.111.7.1 and 10.111.7.2."""
    names = [f"zs{os.getpid()}{side}" for side in "ab"]
    for name in names:
        ip("netns", "add", name)
    try:
        there = ("peer", "name", f"{names[1]}v", "netns", names[1])
        ip("link", "add", f"{names[0]}v", "netns", names[0], "type", "veth", *there)
        for name, address in zip(names, (HERE, THERE), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", f"{name}v", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="zs", dir="/tmp") as path:
        os.chmod(path, 0o700)
        yield Path(path)


def on(host: str, home: Path, *words: str, **how: object) -> subprocess.Popen[str]:
    """Run Python on that host, with a directory of clusters of its own."""
    home.mkdir(mode=0o700, exist_ok=True)
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *words],
        env={**os.environ, "ZMQSCHED_DIR": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def test_a_node_and_a_client_on_another_host_need_the_file_and_nothing_else(hosts, directory):
    here, there = hosts
    broker = on(here, directory / "h", "-m", "zmqsched", "broker", "--listen", HERE, "--until-eof", "--ready-fd", "1")
    started = [broker]
    try:
        written = Path(json.loads(broker.stdout.readline())["file"])
        assert f"tcp://{HERE}:" in written.read_text()
        carried = directory / "carried.json"
        shutil.copy(written, carried)
        carried.chmod(0o600)
        node = on(there, directory / "t", "-m", "zmqsched", "node", "--connect", str(carried), "-n", "2", "--until-eof",
                  "--ready-fd", "1")  # fmt: skip
        started.append(node)
        assert json.loads(node.stdout.readline())["node"] == "n1"
        client = on(there, directory / "t", "-c", USE, str(carried))
        started.append(client)
        out, err = client.communicate(timeout=60)
        assert (client.returncode, out.strip()) == (0, "alive"), err
    finally:
        for process in reversed(started):
            process.stdin.close()
            assert process.wait(timeout=60) == 0
            process.stdout.close()
            process.stderr.close()


def test_a_host_without_the_right_keys_is_not_let_in(hosts, directory):
    here, there = hosts
    broker = on(here, directory / "h", "-m", "zmqsched", "broker", "--listen", HERE, "--until-eof", "--ready-fd", "1")
    try:
        file = json.loads(Path(json.loads(broker.stdout.readline())["file"]).read_text())
        import zmq

        public, secret = zmq.curve_keypair()
        forged = directory / "forged.json"
        forged.write_text(json.dumps({**file, "client_public": public.decode(), "client_secret": secret.decode()}))
        forged.chmod(0o600)
        client = on(there, directory / "t", "-c", USE, str(forged))
        _, err = client.communicate(timeout=60)
        assert client.returncode == 1
        assert "does not know this side's key" in err.splitlines()[-1]
    finally:
        broker.stdin.close()
        assert broker.wait(timeout=60) == 0
        broker.stdout.close()
        broker.stderr.close()


CONTAINED = """
import sys
from zmqsched import Client
with Client(sys.argv[1]) as client:
    assert client._dealer.last_endpoint.startswith(b"tcp://127.0.0.1:"), client._dealer.last_endpoint
    assert client.submit(pow, 2, 10).result(timeout=60) == 1024
"""


def test_a_container_that_shares_the_network_but_no_files_comes_over_tcp(directory):
    """The Unix sockets that the file names are not there; and who finds them, but is another user, passes them over."""
    command = [sys.executable, "-m", "zmqsched", "broker", "--listen", "--until-eof", "--ready-fd", "1"]
    home = directory / "h"
    broker = subprocess.Popen(
        command, env={**os.environ, "ZMQSCHED_DIR": str(home)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with broker:
        written = Path(json.loads(broker.stdout.readline())["file"])
        carried = directory / "carried.json"
        shutil.copy(written, carried)
        hidden = f'mount -t tmpfs -o mode=0700 none {home} && exec {sys.executable} -c "$0" {carried}'
        node = [sys.executable, "-m", "zmqsched", "node", "--connect", str(written), "-n1", "--until-eof", "--ready-fd=1"]
        with subprocess.Popen(node, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert "node" in json.loads(other.stdout.readline())
            done = subprocess.run(
                ["unshare", "--mount", "sh", "-c", hidden, CONTAINED], capture_output=True, text=True, check=False,
                timeout=60, env={**os.environ, "ZMQSCHED_DIR": str(directory / "c")},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            other.stdin.close()
            assert other.wait(60) == 0
        broker.stdin.close()
        assert broker.wait(60) == 0
