"""Clusters whose broker is on another host, behind a real sshd with a network of its own, and is held from here."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sshd
from conftest import eventually
from homes import Home, new_home
from sshd import Hosts

from zmqsched import Client, Cluster
from zmqsched.clusterfile import BrokerPart, ClusterFile, NodeGroup
from zmqsched.config import ROLES, cluster_dir, file_name
from zmqsched.errors import ClusterExists, ClusterLost, StartError

pytestmark = sshd.MARKS


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A directory of clusters in which nothing may be left."""
    with new_home() as home:
        monkeypatch.setenv("ZMQSCHED_DIR", str(home.path))
        yield home


@pytest.fixture
def hosts(home: Home) -> Iterator[Hosts]:
    """Two, apart from each other and from here; the broker's is the first."""
    with sshd.checked_hosts() as hosts:
        for name in ("alpha", "beta"):
            hosts.add(name, apart=True)
        with hosts.inside():
            yield hosts


def wanted(hosts: Hosts, *names: str, journal: bool | str = False, **broker: object) -> ClusterFile:
    """A node here, and one on each of these hosts."""
    common = {"python": sys.executable, "ssh_options": ("-F", str(hosts.config))}
    part = BrokerPart(host="alpha", journal=journal, **common | broker)
    groups = [NodeGroup(name="here", slots=1)]
    groups += [NodeGroup(name="there", launcher="ssh", hosts=names, slots=1, **common)] if names else []
    return ClusterFile(name="lab", broker=part, nodes=tuple(groups))


def where(seconds: float = 0.2) -> str:
    time.sleep(seconds)
    return os.uname().nodename


def nothing_is_left(hosts: Hosts) -> None:
    for host in hosts.hosts:
        eventually(lambda host=host: not host.processes())


def nothing_is_here(home: Home) -> None:
    eventually(lambda: not home.processes() and not home.files())


HERE = os.uname().nodename


def test_a_broker_on_one_host_and_nodes_here_there_and_on_another(hosts, home: Home):
    with Cluster(wanted(hosts, "alpha", "beta")) as cluster, Client(cluster) as client:
        assert cluster.failures == []
        assert cluster.file.host == "alpha"
        assert [each for each in cluster.file.addresses.work if each.startswith("tcp://10.111.9.10:")]
        eventually(lambda: set(client.map(where, [0.2] * 12)) == {HERE, "alpha", "beta"})
        assert cluster.broker_pid in hosts.hosts[0].processes()
        for role in ROLES:
            assert stat.S_IMODE((cluster_dir("lab") / file_name(role)).stat().st_mode) == 0o600
        secrets = {cluster.file.client_secret, cluster._fleet._site.file.client_secret}
        for pid in [*home.processes(), *hosts.hosts[0].processes(), *hosts.hosts[1].processes()]:
            with contextlib.suppress(OSError):  # it may have ended
                told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
                assert not any(secret.encode() in told for secret in secrets)
    nothing_is_left(hosts)


def test_what_is_given_keys_anew_is_here_too(hosts, home: Home):
    with Cluster(wanted(hosts)) as cluster:
        before = {role: (cluster_dir("lab") / file_name(role)).read_text() for role in ROLES}
        home.run("keys", "rotate", "lab")
        for role in ROLES:
            eventually(lambda role=role: (cluster_dir("lab") / file_name(role)).read_text() != before[role])
        home.run("keys", "revoke", "--role=client", "lab")
        assert home.compute("lab") == "1024"
        assert cluster.broker_death == ""


def written(hosts: Hosts, journal: str = "false") -> str:
    path = hosts.directory / "cluster.toml"
    options = f"""python = "{sys.executable}"\nssh_options = ["-F", "{hosts.config}"]"""
    path.write_text(f"""
name = "lab"
[broker]
host = "alpha"
journal = {journal}
{options}
[[nodes]]
slots = 1
[[nodes]]
launcher = "ssh"
hosts = "beta"
slots = 1
{options}
""")
    return str(path)


def test_up_ls_status_scale_and_down(hosts, home: Home):
    file = written(hosts)
    assert "ssh -F" in home.run("up", file, "--dry-run").stdout
    home.run("config", "check", file)
    home.run("up", file, "--detach")
    try:
        eventually(lambda: [(each["host"], each["workers"]) for each in home.ask("ls")] == [("alpha", 2)])
        assert {node["label"] for node in home.ask("status", "lab")["nodes"]} == {"local-1", "ssh-1"}
        home.run("scale", "local=2", "lab")
        home.run("wait", "3", "lab", "--timeout", "60")
        assert home.compute("lab") == "1024"
    finally:
        home.run("down", "lab")
    nothing_is_here(home)
    nothing_is_left(hosts)


DRIVER = """
import sys
from zmqsched import Cluster
with Cluster.from_file(sys.argv[1]):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill -9", "kill -9 of what holds it", "end"])
def test_nothing_is_left_anywhere_when_the_program_ends(how, hosts, home: Home):
    command = [sys.executable, "-c", DRIVER, written(hosts)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "up\n"
        assert all(host.processes() for host in hosts.hosts)
        if how == "kill -9":
            driver.kill()
        elif how == "end":
            driver.stdin.close()
        else:
            (tether,) = [pid for pid, words in home.processes().items() if " tether " in words]
            os.kill(tether, signal.SIGKILL)
        nothing_is_left(hosts)
        if how == "kill -9 of what holds it":
            driver.stdin.close()


@pytest.mark.parametrize("why", ["firewall", "loopback"])
def test_where_only_port_22_passes_the_broker_is_reached_through_it(why, hosts, home: Home, capfd):
    """Also from a host that is let in no more than this one is."""
    wall = hosts.hosts[0].firewall() if why == "firewall" else contextlib.nullcontext()
    listen = ("127.0.0.1",) if why == "loopback" else ()
    with wall, Cluster(wanted(hosts, "beta", listen=listen)) as cluster, Client(cluster) as client:
        assert "the broker on alpha is reached through ssh only, which is slower" in capfd.readouterr().err
        assert not any("127.0.0.1" in each for each in cluster.file.addresses.work)  # here that is somebody else's
        assert [one.where for one in cluster.nodes()] == ["", "beta, back through ssh -R"]
        eventually(lambda: set(client.map(where, [0.2] * 12)) == {HERE, "beta"})
        assert client.submit(bytes, 8_000_000).result(timeout=60) == bytes(8_000_000)
        assert home.compute("lab") == "1024"
    nothing_is_left(hosts)


def test_where_ssh_may_not_forward_either_it_is_said(hosts):
    alpha = hosts.hosts[0]
    alpha.end()
    alpha._options = {"AllowTcpForwarding": "no"}
    alpha.begin()
    with alpha.firewall(), pytest.raises(StartError, match="AllowTcpForwarding") as caught:
        Cluster(wanted(hosts))
    assert "administratively prohibited" in str(caught.value)
    nothing_is_left(hosts)


def test_a_host_that_is_down_is_told_of(hosts, home: Home):
    with hosts.hosts[0].cut_off(), pytest.raises(StartError, match="does a firewall let port 22 through") as caught:
        Cluster(wanted(hosts))
    assert "alpha: exit code 255 before the broker was ready" in str(caught.value)
    nothing_is_here(home)


def test_what_the_broker_says_there_is_said_here(hosts, home: Home):
    with Cluster(wanted(hosts)), new_home() as another, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMQSCHED_DIR", str(another.path))
        with pytest.raises(ClusterExists, match="on alpha: a cluster named 'lab'"):
            Cluster(wanted(hosts))
    with pytest.raises(StartError, match="on alpha: /bin/false is not a Python"):
        Cluster(wanted(hosts, python="/bin/false"))
    with pytest.raises(StartError, match="no such module\nhelp"):
        Cluster(wanted(hosts, prologue=("echo no such module >&2", "echo help >&2", "exit 7")))
    nothing_is_left(hosts)


@pytest.mark.parametrize("way", ["direct", "through ssh"])
def test_a_broker_that_dies_there_is_followed_by_another_over_its_journal(way, hosts, home: Home, capfd):
    wall = contextlib.nullcontext() if way == "direct" else hosts.hosts[0].firewall()
    with wall, Cluster(wanted(hosts, "beta", journal=True)) as cluster, Client(cluster) as client:
        first = cluster.broker_pid
        futures = [client.submit(where, 0.1) for _ in range(60)]
        eventually(lambda: futures[3].done())
        os.kill(first, signal.SIGKILL)
        assert {future.result(timeout=90) for future in futures} == {HERE, "beta"}
        eventually(lambda: cluster.broker_pid != first)
        assert cluster.broker_death == ""
        assert "alpha: exit code 137" in capfd.readouterr().err
        assert home.compute("lab") == "1024"
    nothing_is_left(hosts)


def test_with_its_connection_the_cluster_is_lost_and_that_is_said(hosts, home: Home, capfd):
    with Cluster(wanted(hosts, "beta", journal=True)) as cluster, Client(cluster) as client:
        future = client.submit(where, 600)
        eventually(future.running)
        hosts.hosts[0].end()
        with pytest.raises(ClusterLost):
            future.result(timeout=90)
        assert eventually(lambda: cluster.broker_death) == "exit code 4"
        assert "the connection broke" in capfd.readouterr().err
    nothing_is_left(hosts)


def test_a_broker_that_hears_nothing_any_more_ends_by_itself(hosts, home: Home, monkeypatch):
    """Nobody there can notice that the network is gone."""
    monkeypatch.setattr("zmqsched.cluster.LEASH_S", 20.0)
    with Cluster(wanted(hosts)) as cluster:
        broker = psutil.Process(cluster.broker_pid)
        with hosts.hosts[0].cut_off():
            eventually(lambda: not broker.is_running())
            assert eventually(lambda: cluster.broker_death, 90) == "exit code 4"
    nothing_is_left(hosts)
