"""A broker on another host, held through ``ssh``, where there is none: a stand-in runs here what it would run there, with a
directory of clusters of its own. What a real sshd shows is in ``system/test_broker_elsewhere.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Home, eventually

from zmqsched import Client, Cluster, SSHCluster
from zmqsched.cli.wanted import Options, of_options
from zmqsched.cluster import broker_preview
from zmqsched.clusterfile import BrokerPart, ClusterFile, NodeGroup
from zmqsched.errors import ClusterLost, StartError
from zmqsched.launch import remote

pytestmark = pytest.mark.system


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clusters: Home) -> Path:
    """A directory. While its file ``words`` exists, that is said and nobody is reached; ``hosts`` has who was asked."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ssh"
    script.write_text(f"""#!/bin/sh
for word; do host=$command; command=$word; done
echo "$host" >> {tmp_path}/hosts
if [ -e {tmp_path}/words ]; then cat {tmp_path}/words >&2; exit 255; fi
echo hello from the login shell
exec sh -c "$command"
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def there() -> Iterator[Home]:
    """The directory of clusters of the other host."""
    home = Home()
    yield home
    home.assert_nothing_left()
    home.remove()


def wanted(there: Home, *groups: NodeGroup, **broker: object) -> ClusterFile:
    env = {"ZMQSCHED_DIR": str(there.path), "SSH_CONNECTION": "127.0.0.1 1 127.0.0.1 22"}
    part = BrokerPart(host="alpha", **{"journal": False, "python": sys.executable, "env": env} | broker)
    return ClusterFile(name="lab", broker=part, nodes=groups or (NodeGroup(slots=1),))


def test_a_broker_there_and_nodes_here_and_there(fake_ssh, there, clusters: Home):
    ssh = NodeGroup(launcher="ssh", hosts=("beta",), slots=1, python=sys.executable)
    with Cluster(wanted(there, NodeGroup(slots=1), ssh)) as cluster, Client("lab") as client:
        assert {node.label for node in client.nodes()} == {"local-1", "ssh-1"}
        assert list(client.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        assert (fake_ssh / "hosts").read_text().split() == ["alpha", "beta"]
        assert there.processes()[cluster.broker_pid]
        assert "lab" in there.files()
    clusters.assert_nothing_left()


def test_short_for_it(fake_ssh, there, clusters: Home):
    env = {"ZMQSCHED_DIR": str(there.path)}
    with SSHCluster("beta", slots=1, python=sys.executable, env=env, listen="", broker_host="alpha") as cluster:
        assert cluster.name in there.files()
        with Client(cluster) as client:
            assert client.submit(pow, 2, 10).result(timeout=60) == 1024


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("u@alpha: Permission denied (publickey).", "ssh-copy-id alpha"),
        ("ssh: connect to host alpha port 22: Connection refused", "no sshd answers there"),
    ],
)
def test_what_ssh_says_is_said_with_what_to_do(words, fix, fake_ssh, there, clusters: Home):
    (fake_ssh / "words").write_text(words)
    with pytest.raises(StartError, match=fix) as caught:
        Cluster(wanted(there))
    assert f"alpha: exit code 255 before the broker was ready: {words}" in str(caught.value)
    clusters.assert_nothing_left()


def test_no_ssh_at_all(there, clusters: Home, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StartError, match="cannot start 'ssh': No such file"):
        Cluster(wanted(there))
    clusters.assert_nothing_left()


@pytest.mark.parametrize(
    ("broker", "says"),
    [
        ({"python": "/bin/false"}, "on alpha: /bin/false is not a Python"),
        ({"listen": ("192.0.2.1",)}, "on alpha: cannot listen at tcp://192.0.2.1"),
        ({"prologue": ("echo no licence >&2", "exit 7")}, "alpha: exit code 7 before the broker was ready: no licence"),
        ({"env": {"A": "x" * 70_000}}, "broker.env and broker.prologue are over 60000 bytes"),
    ],
)
def test_what_is_wrong_there_is_said_here(broker, says, fake_ssh, there, clusters: Home):
    with pytest.raises(StartError) as caught:
        Cluster(wanted(there, **broker))
    assert says in str(caught.value)
    clusters.assert_nothing_left()


def test_when_what_holds_it_dies_the_cluster_is_lost_and_no_other_broker_is_started(fake_ssh, there, clusters: Home):
    with Cluster(wanted(there)) as cluster, Client(cluster) as client:
        future = client.submit(pow, 2, 10)
        assert future.result(timeout=60) == 1024
        (tether,) = [pid for pid, words in clusters.processes().items() if " tether " in words]
        os.kill(tether, 9)
        eventually(lambda: not there.processes())
        assert eventually(lambda: cluster.broker_death) == "killed by SIGKILL"
        with pytest.raises(ClusterLost):
            client.submit(pow, 2, 10).result(timeout=60)
    assert (fake_ssh / "hosts").read_text().split() == ["alpha"]
    clusters.assert_nothing_left()


@pytest.mark.parametrize(
    ("connection", "port", "listens"),
    [
        ("192.0.2.1 4000 192.0.2.7 22", 0, "192.0.2.7"),
        ("192.0.2.1 4000 192.0.2.7 22", 5700, "192.0.2.7:5700"),
        ("2001:db8::1 4000 2001:db8::7 22", 5700, "[2001:db8::7]:5700"),
        ("fe80::1%eth0 4000 fe80::7%eth0 22", 0, "127.0.0.1"),
        ("", 5700, "127.0.0.1:5700"),
    ],
)
def test_it_listens_where_its_host_was_reached(connection, port, listens, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    part = BrokerPart(host="alpha", port=port, python=str(python), journal="~/it's")
    script = remote.broker_script(part, ["--name=lab"], "3.11", "1.0")
    environment = {"SSH_CONNECTION": connection} if connection else {}
    done = subprocess.run(
        ["sh", "-c", remote.COMMAND], input=remote.line(script), capture_output=True, timeout=60, check=True,
        env={"PATH": os.environ["PATH"], "HOME": "/home/of mine", **environment},
    )  # fmt: skip
    words = done.stdout.decode().split("\n")
    assert f"--listen={listens}" in words
    assert "--journal=/home/of mine/it's" in words


def test_what_would_be_run_there_is_shown():
    shown = broker_preview(ClusterFile(broker=BrokerPart(host="alpha", ssh_options=("-p", "2222"))))
    assert shown[0] == "# the broker, on alpha, fed over standard input:"
    assert "zmqsched broker --name=default" in "\n".join(shown)
    assert shown[-1].startswith("ssh -p 2222 ")
    assert " -- alpha " in shown[-1]


def test_up_asks_for_it():
    asked = of_options(Options(broker_host="alpha", ssh=("beta",), python="/python", prologue=("module load python",)))
    assert asked.broker == BrokerPart(host="alpha", python="/python", prologue=("module load python",))
    assert of_options(Options(ssh=("beta",), python="/python")).broker == BrokerPart()


def test_on_its_own_host_no_ssh_is_needed(clusters: Home):
    broker = BrokerPart(host=os.uname().nodename, journal=False, python="/none", env={"A": "1"})
    with Cluster(ClusterFile(name="here", broker=broker, nodes=(NodeGroup(slots=1),))) as cluster:
        assert cluster.file.addresses.work[0].startswith("ipc://")


def test_a_broker_ends_when_it_hears_nothing_from_who_holds_it(clusters: Home):
    command = [sys.executable, "-m", "zmqsched", "broker", "--name=lab", "--ready-fd=1", "--until-eof"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--give-up-after=0.5"], **pipes) as broker:
        assert broker.stdout.readline()
        assert broker.wait(timeout=60) == 0
        assert b"nothing was heard of its starter for 0.5 s" in broker.stderr.read()
        broker.stdin.close()
