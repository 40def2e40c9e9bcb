"""Nodes on hosts that a real sshd serves: on ports of this machine, or in network namespaces with their own addresses."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from conftest import PATIENCE_S, Home, eventually
from sshd import Hosts

from zmqsched import Client
from zmqsched.clusterfile import NodeGroup
from zmqsched.launch.base import Launched, Site
from zmqsched.launch.ssh import SSHLauncher

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(sshd.why_not()), reason=sshd.why_not()),
    pytest.mark.timeout(120),
]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="zsh", dir="/tmp") as path, Hosts(Path(path)) as hosts:
        yield hosts
        for host in hosts.hosts:
            eventually(lambda host=host: not host.processes())
            assert host.home.files() == set()
            assert list(Path("/tmp").glob("zmqsched-*.work")) == []


class Here:
    """A broker where the hosts can be reached, and what launchers are to know of it."""

    def __init__(self, hosts: Hosts, home: Home, listen: str) -> None:
        self._hosts = hosts
        command = ["broker", "--name=lab", f"--listen={listen}", "--until-eof", "--ready-fd=1"]
        self._broker = subprocess.Popen(
            [*hosts.on(), sys.executable, "-m", "zmqsched", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        facts = json.loads(self._broker.stdout.readline())
        self.path = Path(facts["file"])
        self.site = Site(self.path, self.path.parent)
        self.client = Client(self.path)
        self._launchers: list[SSHLauncher] = []

    def launcher(self, *names: str, **group: object) -> SSHLauncher:
        options = {"slots": 1, "python": sys.executable, "ssh_options": ("-F", str(self._hosts.config))} | group
        made = SSHLauncher(NodeGroup(name="g", launcher="ssh", hosts=names, **options), self.site)
        self._launchers.append(made)
        return made

    def log(self, label: str) -> str:
        return self.site.log_path(label).read_text()

    def close(self) -> None:
        self.client.shutdown(wait=False, cancel_futures=True)
        for launcher in self._launchers:
            launcher.close()
        with self._broker:
            self._broker.stdin.close()
            assert self._broker.wait(timeout=PATIENCE_S) == 0


@contextlib.contextmanager
def broker(hosts: Hosts, home: Home, listen: str = "") -> Iterator[Here]:
    with hosts.inside() if hosts.here else contextlib.nullcontext():
        here = Here(hosts, home, listen)
        try:
            yield here
        finally:
            here.close()


def one(launcher: SSHLauncher, label: str = "g-1") -> Launched:
    return next(found for found in launcher.poll() if found.label == label)


def states(launcher: SSHLauncher) -> dict[str, str]:
    return {found.label: found.state for found in launcher.poll()}


def all_run(launcher: SSHLauncher) -> bool:
    found = launcher.poll()
    assert not [each.why for each in found if each.why]
    return all(each.state == "running" for each in found)


def where() -> str:
    import os

    return os.uname().nodename


def test_nodes_on_several_hosts(hosts, clusters):
    names = ["alpha", "beta"]
    for name in names:
        hosts.add(name)
    with broker(hosts, clusters) as here:
        launcher = here.launcher(*names)
        launcher.start(["g-1", "g-2", "g-3"])
        assert set(states(launcher).values()) <= {"starting", "running"}
        eventually(lambda: all_run(launcher))
        assert [found.where.split(",")[0] for found in launcher.poll()] == ["alpha", "beta", "alpha"]
        assert {found.label: found.node for found in launcher.poll()} == {n.label: n.id for n in here.client.nodes()}
        ran = {here.client.submit(where).result(timeout=20) for _ in range(20)}
        assert ran <= set(names)
        launcher.stop(["g-2"])
        assert hosts.hosts[1].processes() == {}
        assert states(launcher) == {"g-1": "running", "g-3": "running"}
        launcher.close()
        assert hosts.hosts[0].processes() == {}
