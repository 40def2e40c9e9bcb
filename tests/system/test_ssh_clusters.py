"""Clusters with nodes on hosts behind a real sshd, each with a network of its own: as a user starts, uses and ends them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import sshd
from conftest import Home, eventually
from sshd import HERE, Hosts

from zmqsched import Client, Cluster, SSHCluster
from zmqsched.clusterfile import BrokerPart, ClusterFile, NodeGroup
from zmqsched.errors import StartError

pytestmark = sshd.MARKS
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three, apart from each other and from here."""
    with sshd.checked_hosts() as hosts:
        for name in NAMES:
            hosts.add(name, apart=True)
        with hosts.inside():
            yield hosts


def wanted(hosts: Hosts, *names: str, listen: str = HERE, **group: object) -> ClusterFile:
    options = {"slots": 1, "python": sys.executable, "ssh_options": hosts.options} | group
    nodes = NodeGroup(name="g", launcher="ssh", hosts=names or NAMES, **options)
    return ClusterFile(name="lab", broker=BrokerPart(listen=(listen,), journal=False), nodes=(nodes,))


def spin(seconds: float) -> str:
    time.sleep(seconds)
    return os.uname().nodename


def work(client: Client) -> set[str]:
    """Where it is done."""
    return set(client.map(spin, [0.2] * 12))


def nested() -> int:
    from zmqsched import get_client

    return sum(get_client().map(abs, [-1, 2, -3]))


def assert_nothing_left(hosts: Hosts) -> None:
    for host in hosts.hosts:
        eventually(lambda host=host: not host.processes())


def test_a_cluster_of_three_hosts(hosts, clusters):
    """Its nodes have the key of a node, which their tasks' clients can use, too."""
    cluster = SSHCluster(NAMES, slots=1, python=sys.executable, ssh_options=hosts.options, listen=HERE)
    with cluster, Client(cluster) as client:
        assert [(one.label, one.state, one.where) for one in cluster.nodes()] == [
            (f"ssh-{number}", "running", name) for number, name in enumerate(NAMES, 1)
        ]
        assert cluster._fleet._site.file.role == "node"
        assert client.submit(nested).result(timeout=60) == 6
        eventually(lambda: work(client) == set(NAMES))
        cluster.scale("ssh", 1)
        eventually(lambda: sum(bool(host.processes()) for host in hosts.hosts) == 1)
        cluster.scale("ssh", 4)
        cluster.wait_for_nodes(4, 60)
        eventually(lambda: work(client) == set(NAMES))
    assert_nothing_left(hosts)


def test_hosts_that_fail_are_told_of_and_the_others_go_on(hosts, clusters):
    hosts.knows(hosts.hosts[1], hosts.keygen("another"))
    with Cluster(wanted(hosts)) as cluster, Client(cluster) as client:
        (failure,) = cluster.failures
        assert failure.label == "g-2"
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in failure.why
        eventually(lambda: work(client) == {"alpha", "gamma"})


def test_a_cluster_that_cannot_do_without_a_host_waits_for_no_other(hosts, clusters):
    """A third would not say anything for ten minutes."""
    hosts.knows(hosts.hosts[1], hosts.keygen("another"))
    patient = (*hosts.options[:2], "-o", "ConnectTimeout=600")
    with hosts.hosts[2].frozen(), pytest.raises(StartError) as caught:
        Cluster(wanted(hosts, ssh_options=patient), min_nodes=3)
    assert "g-2 (beta): beta: exit code 255" in str(caught.value)
    assert "gamma" not in str(caught.value)
    assert_nothing_left(hosts)


def test_a_cluster_of_which_no_host_can_be_used(hosts, clusters):
    hosts.key.with_suffix(".pub").write_text("")
    with pytest.raises(StartError) as caught:
        Cluster(wanted(hosts))
    for name in NAMES:
        assert f"({name}): {name}: exit code 255 before it was ready" in str(caught.value)
    assert str(caught.value).count("Permission denied") == 3


@pytest.mark.parametrize("way", ["direct", "back through ssh"])
def test_a_host_that_is_cut_off_and_comes_back_while_tasks_run(way, hosts, clusters):
    """No task is lost, and no process is left."""
    listen = HERE if way == "direct" else "127.0.0.1"
    with Cluster(wanted(hosts, "alpha", "beta", listen=listen, slots=2)) as cluster, Client(cluster) as client:
        assert all(way == "direct" or way in one.where for one in cluster.nodes())
        futures = [client.submit(spin, 0.1) for _ in range(300)]
        eventually(lambda: futures[10].done())
        with hosts.hosts[0].cut_off():
            eventually(lambda: "lost" in {node.state for node in client.nodes()})
            eventually(lambda: sum(future.done() for future in futures) > 100)
        eventually(lambda: sum(node.state == "alive" for node in client.nodes()) == 2)
        futures += [client.submit(spin, 0.1) for _ in range(20)]
        assert {future.result(timeout=90) for future in futures} == {"alpha", "beta"}
        assert {future.result() for future in futures[-20:]} == {"alpha", "beta"}
        assert {one.state for one in cluster.nodes()} == {"running"}
        assert sum(client.status().tasks.values()) == 0
    assert_nothing_left(hosts)


@pytest.mark.parametrize("cut", ["until ssh gives it up", "until its node does too"])
def test_a_host_that_is_cut_off_for_long_is_used_again(cut, hosts, clusters, caplog):
    """No task is lost, there are as many nodes as were asked for and no more, and no process is left."""
    alpha = hosts.hosts[0]
    quick = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    file = wanted(hosts, "alpha", "beta", slots=2, ssh_options=(*hosts.options, *quick))
    with Cluster(file) as cluster, Client(cluster) as client:
        futures = [client.submit(spin, 0.1) for _ in range(100)]
        eventually(lambda: futures[10].done())
        (before,) = [one.node for one in cluster.nodes() if one.label == "g-1"]
        with alpha.cut_off():
            eventually(lambda: [one.state for one in cluster.nodes()] == ["starting", "running"])
            assert "node g-1 (alpha) of cluster lab is cut off, and is started again when that can be: alpha" in caplog.text
            if cut == "until its node does too":
                eventually(lambda: not alpha.processes(), 120)
        futures += [client.submit(spin, 0.1) for _ in range(20)]
        eventually(lambda: [one.state for one in cluster.nodes()] == ["running", "running"])
        assert "node g-1 (alpha) of cluster lab is there again" in caplog.text
        assert {future.result(timeout=90) for future in futures} <= {"alpha", "beta"}
        eventually(lambda: work(client) == {"alpha", "beta"})
        eventually(lambda: sorted(node.label for node in client.nodes() if node.state == "alive") == ["g-1", "g-2"])
        (after,) = [one.node for one in cluster.nodes() if one.label == "g-1"]
        assert before != after
        assert [node.state for node in client.nodes() if node.id == before] in (["lost"], ["gone"])
        eventually(lambda: sum(client.status().tasks.values()) == 0)
        assert cluster.failures == []
    assert_nothing_left(hosts)


DRIVER = """
import sys
from zmqsched import Cluster
with Cluster.from_file(sys.argv[1]):
    print("up", flush=True)
    sys.stdin.read()
"""


def written(hosts: Hosts) -> str:
    path = hosts.directory / "cluster.toml"
    path.write_text(f"""
name = "lab"
[broker]
listen = ["{HERE}"]
journal = false
[[nodes]]
launcher = "ssh"
hosts = "{",".join(NAMES)}"
slots = 1
python = "{sys.executable}"
ssh_options = {list(hosts.options)}
""")
    return str(path)


@pytest.mark.parametrize("how", ["kill -9", "end", "zmqsched down"])
def test_nothing_is_left_when_the_program_ends(how, hosts, clusters: Home):
    command = [sys.executable, "-c", DRIVER, written(hosts)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "up\n"
        with Client("lab") as client:
            futures = [client.submit(spin, 600) for _ in NAMES]
            eventually(lambda: all(future.running() for future in futures))
            assert all(host.processes() for host in hosts.hosts)
            if how == "kill -9":
                driver.kill()
            elif how == "end":
                driver.stdin.close()
            else:
                subprocess.run([sys.executable, "-m", "zmqsched", "down", "lab"], check=True, timeout=60)
            assert_nothing_left(hosts)
            if how == "zmqsched down":
                assert driver.poll() is None
                driver.stdin.close()
            for future in futures:
                future.cancel()
    clusters.assert_nothing_left()


def test_up_with_hosts_and_down(hosts, clusters: Home, tmp_path, monkeypatch):
    """The same from a shell. Since the user's own ``~/.ssh/config`` is not to be touched, ``ssh`` is told of another."""
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {" ".join(hosts.options)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    zmqsched = [sys.executable, "-m", "zmqsched"]
    up = ["up", "--ssh", "alpha,beta", "-n", "2", "--name=lab", "--no-journal", f"--python={sys.executable}", "--detach"]
    done = subprocess.run([*zmqsched, *up], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    try:
        with Client("lab") as client:
            assert {(node.label, node.slots) for node in client.nodes()} == {("ssh-1", 2), ("ssh-2", 2)}
            eventually(lambda: work(client) == {"alpha", "beta"})
    finally:
        subprocess.run([*zmqsched, "down", "lab"], check=True, timeout=60, capture_output=True)
    assert_nothing_left(hosts)
    clusters.assert_nothing_left()


def test_a_host_that_is_away_when_the_cluster_ends_is_named(hosts, clusters, caplog, monkeypatch):
    """What runs there ends by itself: at the latest when it has not heard of the broker for a minute."""
    monkeypatch.setattr("zmqsched.fleet.CLOSE_TIMEOUT_S", 40.0)  # ssh is given longer here than it is elsewhere
    with Cluster(wanted(hosts, "alpha", "beta")) as cluster, Client(cluster) as client:
        eventually(lambda: work(client) == {"alpha", "beta"})
        hosts.hosts[0].cable("down")
    try:
        assert "nodes may be left on alpha (ssh: connect to host" in caplog.text
        assert not hosts.hosts[1].processes()
        assert hosts.hosts[0].processes()
    finally:
        hosts.hosts[0].cable("up")
    assert_nothing_left(hosts)
