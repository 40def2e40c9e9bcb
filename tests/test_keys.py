"""The keys of a cluster on TCP: one file for each role, and what becomes of everybody when keys are replaced or revoked.

Peers that come over TCP are given files that say that they are elsewhere; those on this host use Unix sockets.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.proxy import Proxy
from conftest import PATIENCE_S, eventually, from_afar

from zmqsched import Client, LocalCluster, errors, get_client, sockets
from zmqsched.__main__ import main
from zmqsched.codec import encode
from zmqsched.config import ROLES, ConnectionFile, Role, cluster_dir, role_file
from zmqsched.protocol import Ack, ChangeKeys, Envelope, NodeHello

pytestmark = pytest.mark.system


def file_of(cluster: LocalCluster, role: Role) -> ConnectionFile:
    """To come over TCP with."""
    return from_afar(ConnectionFile.load(role_file(cluster_dir(cluster.name), role)))


@pytest.fixture
def cluster(clusters, tmp_path) -> Iterator[LocalCluster]:
    with LocalCluster(1, listen="", journal=tmp_path / "journal") as cluster:
        yield cluster


class Far:
    """A node that came over TCP, with the key for nodes of the moment."""

    def __init__(self, cluster: LocalCluster, tmp_path: Path) -> None:
        path = tmp_path / "far.json"
        file_of(cluster, "node").write(path)
        words = ["node", "--connect", str(path), "--tag", "far", "-n", "2", "--until-eof", "--ready-fd", "1"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-m", "zmqsched", *words], text=True, **pipes)
        assert self.process.stdout is not None
        assert "node" in json.loads(self.process.stdout.readline())

    def ends(self) -> tuple[int, str]:
        """Its exit code and last words, when it ends by itself."""
        assert self.process.stderr is not None
        last = self.process.stderr.read()
        return self.process.wait(PATIENCE_S), last

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()


@pytest.fixture
def far(cluster, tmp_path) -> Iterator[Far]:
    node = Far(cluster, tmp_path)
    yield node
    node.close()


def change(capsys, cluster: LocalCluster, *words: str) -> dict:
    assert main(["keys", *words, cluster.name, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def nested() -> int:
    return get_client().submit(abs, -7).result(timeout=PATIENCE_S)


def counted(path: str, seconds: float) -> None:
    with open(path, "a") as file:
        file.write("began\n")
    time.sleep(seconds)


def test_each_role_has_a_file_of_its_own_and_the_servers_secret_is_in_none(cluster):
    directory = cluster_dir(cluster.name)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = {role: role_file(directory, role) for role in ROLES}
    assert [path.name for path in files.values()] == ["connection.json", "client.json", "node.json", "observer.json"]
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = {role: ConnectionFile.load(path) for role, path in files.items()}
    assert {role: file.role for role, file in loaded.items()} == {role: role for role in ROLES}
    assert len({file.client_secret for file in loaded.values()}) == 4
    assert {file.server_key for file in loaded.values()} == {cluster.file.server_key}
    import zmq

    for file in loaded.values():
        assert zmq.curve_public(file.client_secret.encode()).decode() == file.client_public != file.server_key


def test_without_tcp_one_file_serves_all(clusters):
    with LocalCluster(1) as cluster:
        directory = cluster_dir(cluster.name)
        assert [path.name for path in directory.glob("*.json")] == ["connection.json"]
        assert {role_file(directory, role).name for role in ROLES} == {"connection.json"}
        with Client(cluster) as client:
            report = client._ask(lambda request: ChangeKeys(request, "rotate", ["node"]))
        assert (report.keys, "has no keys" in report.warning) == ([], True)


def test_each_role_is_for_its_own(cluster):
    for role in ("admin", "client"):
        with Client(file_of(cluster, role)) as client:
            assert client.submit(abs, -1).result(timeout=PATIENCE_S) == 1
    for role in ("node", "observer"):
        with pytest.raises(errors.Refused, match=rf"'{role}' lets no client in: use the cluster's client\.json"):
            Client(file_of(cluster, role))


@pytest.mark.parametrize("role", ["client", "observer"])
def test_no_other_key_makes_a_node(cluster, tmp_path, role):
    path = tmp_path / "wrong.json"
    file_of(cluster, role).write(path)
    done = subprocess.run(
        [sys.executable, "-m", "zmqsched", "node", "--connect", path, "-n", "1"], capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"the role {role!r} lets no node in" in done.stderr


def test_a_clients_key_does_not_end_the_cluster(cluster, capsys, tmp_path):
    path = tmp_path / "client.json"
    file_of(cluster, "client").write(path)
    assert main(["keys", "rotate", str(path)]) == 1
    assert "does not allow ChangeKeys: that takes the owner's connection.json" in capsys.readouterr().err
    assert main(["down", str(path)]) == 1
    assert "does not allow Shutdown: that takes the owner's connection.json" in capsys.readouterr().err
    with Client(file_of(cluster, "client")) as client:
        assert client.submit(abs, -1).result(timeout=PATIENCE_S) == 1


def test_a_peer_on_this_host_uses_a_unix_socket(cluster):
    """So its bulk data is not encrypted by anybody."""
    tcp, unix = cluster.file.addresses.work
    assert (tcp[:6], unix[:6]) == ("tcp://", "ipc://")
    with Client(cluster) as client, Client(file_of(cluster, "client")) as other:
        for each, address in ((client, unix), (other, tcp)):
            assert each._dealer.getsockopt_string(sockets.zmq.LAST_ENDPOINT).rstrip("\0") == address
        big = bytes(3_000_000)
        assert client.submit(bytes, big).result(timeout=PATIENCE_S) == other.submit(bytes, big).result(timeout=PATIENCE_S)


def test_replaced_keys_cost_nobody_anything(cluster, far, capsys, tmp_path):
    """A node and a client that are there while keys are replaced, and longer than the old ones are good; and a task that
    becomes a client later."""
    old = {role: file_of(cluster, role) for role in ("client", "node")}
    with Client(old["client"]) as client:
        there = client.options(tags=["far"])
        running = there.submit(counted, str(tmp_path / "began"), 9.0)
        eventually((tmp_path / "began").exists)
        told = change(capsys, cluster, "rotate", "--role", "node", "--role", "client", "--grace", "6")
        assert [(key["role"], key["number"], bool(key["good_for_s"])) for key in told["keys"]] == [
            ("client", 2, False), ("node", 2, False), ("node", 1, True), ("client", 1, True)
        ]  # fmt: skip
        with Client(old["client"]) as late:
            assert late.submit(abs, -1).result(timeout=PATIENCE_S) == 1, "the old key is still good"
        eventually(lambda: len(change(capsys, cluster, "show")["keys"]) == 4)
        with pytest.raises(errors.Refused, match="does not know this side's key"):
            Client(old["client"])
        assert there.submit(nested).result(timeout=PATIENCE_S) == 7
        running.result(timeout=PATIENCE_S)
        assert (tmp_path / "began").read_text() == "began\n", "nothing was run twice"
        assert client.status().counts.get("requeued: node lost", 0) == 0
    with Client(file_of(cluster, "client")) as client:
        assert client.submit(abs, -1).result(timeout=PATIENCE_S) == 1, "the file has the new key"


def test_a_revoked_key_is_cut_off_at_once_and_stays_so(cluster, far, capsys, tmp_path):
    old = file_of(cluster, "client")
    with Client(cluster) as owner:
        client = Client(old)
        running = client.submit(time.sleep, 60)
        moves = owner.options(tags=["far"]).submit(time.sleep, 1)
        eventually(moves.running)
        change(capsys, cluster, "revoke", "--role", "client", "--role", "node")
        with pytest.raises(errors.Refused, match="revoked"):
            running.result(timeout=PATIENCE_S)
        with pytest.raises(errors.Refused, match="revoked"):
            client.submit(abs, -1)
        client.shutdown()
        code, last = far.ends()
        assert (code, "revoked" in last) == (1, True)
        assert owner.submit(abs, -1).result(timeout=PATIENCE_S) == 1
        pid = cluster.broker_pid
        os.kill(pid, signal.SIGKILL)  # the next broker has the keys from the journal
        eventually(lambda: cluster.broker_pid != pid)
        with pytest.raises(errors.Refused, match="does not know this side's key"):
            Client(old)
        with Client(file_of(cluster, "client")) as new:
            assert new.submit(abs, -1).result(timeout=PATIENCE_S) == 1
        again = Far(cluster, tmp_path)
        moves.result(timeout=PATIENCE_S)
        again.close()


def test_what_still_comes_with_a_revoked_key_is_dropped_and_counted(cluster, capsys):
    """libzmq does not cut a connection because its key is good no more: whoever does not go by himself is not heard."""
    file = file_of(cluster, "node")
    ctx = sockets.context()
    with sockets.connect_dealer(ctx, file.reachable("work"), sockets.Keys.of(file)) as dealer, Client(cluster) as owner:
        change(capsys, cluster, "revoke", "--role", "node")
        hello = NodeHello(bytes(16), 1, owner._core._uplink.hello.where, 1, 1, (("cpu", 1.0),))
        for _ in range(5):
            dealer.send_multipart(encode(Envelope(0, 0, 0, hello)))
        eventually(lambda: owner.status().counts.get("dropped: a key that is not good any more") == 5)
        assert not dealer.poll(100), "it is not even answered"
        assert len(owner.nodes()) == 1
    ctx.term()


def test_nor_are_its_beats_heard(cluster, capsys):
    file = file_of(cluster, "node")
    ctx = sockets.context()
    with sockets.connect_pub(ctx, file.reachable("beats"), sockets.Keys.of(file)) as pub, Client(cluster) as owner:

        def dropped(reason: str) -> bool:
            pub.send_multipart(encode(Envelope(0, 0, 0, Ack())))
            return f"dropped: {reason}" in owner.status().counts

        eventually(lambda: dropped("no beat on the beats channel"))
        change(capsys, cluster, "revoke", "--role", "node")
        eventually(lambda: dropped("beat: a key that is not good any more"))
    ctx.term()


def test_an_observer_with_a_revoked_key_is_cut_off(cluster, capsys):
    file = file_of(cluster, "observer")
    ctx = sockets.context()
    with sockets.connect_sub(ctx, file.reachable("status"), sockets.Keys.of(file)) as observer:
        connections = sockets.Connections(observer)
        assert observer.poll(1000 * PATIENCE_S), "facts are heard"
        change(capsys, cluster, "revoke", "--role", "observer")
        with pytest.raises(errors.Refused, match="does not know this side's key any more"):
            eventually(lambda: connections.new() and False)
        connections.close()
    ctx.term()


def test_who_comes_back_with_a_revoked_key_is_told_so(cluster, capsys):
    """Its connection broke before it could be told. libzmq does not try again after that, and says so to a monitor only."""
    with Proxy(role_file(cluster_dir(cluster.name), "client")) as proxy:
        client = Client(proxy.file)
        future = client.submit(time.sleep, 60)
        proxy.delay_s = 1.2  # the handshake takes three times that
        proxy.reset()
        change(capsys, cluster, "revoke", "--role", "client")
        proxy.delay_s = 0.0
        with pytest.raises(errors.Refused, match="broke, and the broker does not know this side's key any more"):
            future.result(timeout=PATIENCE_S)
        client.shutdown()


def test_so_is_a_node(cluster, capsys, tmp_path):
    with Proxy(role_file(cluster_dir(cluster.name), "node")) as proxy:
        words = ["node", "--connect", str(proxy.file), "-n", "1", "--ready-fd", "1"]
        node = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with node:
            assert "node" in json.loads(node.stdout.readline())
            proxy.delay_s = 1.2
            proxy.reset()
            change(capsys, cluster, "revoke", "--role", "node")
            proxy.delay_s = 0.0
            assert node.wait(PATIENCE_S) == 1
            assert "does not know this side's key any more" in node.stderr.read()


def test_keys_are_shown_without_their_secrets(cluster, capsys):
    assert main(["keys", "show", cluster.name]) == 0
    out = capsys.readouterr().out
    for role in ROLES:
        file = file_of(cluster, role)
        assert file.client_public in out
        assert file.client_secret not in out


def test_secrets_are_in_no_command_line_environment_or_log(cluster, far, tmp_path, capsys):
    """Of a cluster on TCP, its nodes and workers, while it runs; nor does what holds them print them."""
    change(capsys, cluster, "rotate", "--role", "node", "--grace", "30")
    files = [file_of(cluster, role) for role in ROLES]
    secrets = [file.client_secret.encode() for file in files]
    assert all(len(secret) == 40 for secret in secrets)
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                held = (entry / name).read_bytes()
            except OSError:
                continue
            assert not any(secret in held for secret in secrets), f"{entry.name}: {name}"
    for path in [*cluster_dir(cluster.name).rglob("*"), *tmp_path.rglob("*")]:
        if path.is_file() and (path.suffix == ".log" or path.name == "lock"):
            assert not any(secret in path.read_bytes() for secret in secrets), path
    far.process.terminate()
    _, said = far.ends()
    assert not any(secret.decode() in said for secret in secrets)
    assert not any(secret.decode() in repr(each) for secret in secrets for each in [*files, sockets.Keys.of(files[0])])
