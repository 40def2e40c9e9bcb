"""Attacks on a real broker on TCP. After each: nothing of it has reached the core, the broker's memory is what it was, and
an honest client and node were served all the while.

That handshakes are refused one by one is in ``bad_input/test_wire.py``, what keys and roles allow in ``test_keys.py`` and
``core/test_roles.py``. Here it is the whole broker, and what it costs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import flood
import psutil
import pytest
import zmq
from bad_input.zmtp import Speaker, command, frame, greeting, ready
from conftest import PATIENCE_S, eventually, from_afar

from zmqsched import Client, LocalCluster, errors, sockets
from zmqsched.codec import encode
from zmqsched.config import ConnectionFile, cluster_dir, role_file, split_tcp
from zmqsched.protocol import Ack, ClientHello, Envelope, Host

pytestmark = pytest.mark.system

# What one attack may cost. Python and libzmq keep some of what they have used once.
MAX_GROWTH = 60 << 20
# What of the broker's counts comes of honest peers alone, or of a machine that is busy with other things.
HONEST = {"accepted", "ok", "late reports", "own absences"}


@pytest.fixture(scope="module")
def cluster(clusters) -> Iterator[LocalCluster]:
    with LocalCluster(2, listen="") as cluster:
        yield cluster


class Site:
    """The cluster under attack, with an honest client over TCP that never stops asking."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.address = cluster.file.addresses.work[0]
        self.broker = psutil.Process(cluster.broker_pid)
        self.owner = Client(cluster)
        self.honest = Client(from_afar(ConnectionFile.load(role_file(cluster_dir(cluster.name), "client"))))
        self.served = 0
        self.slowest = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._counts = self.counts()
        self._clients = self.owner.status().clients
        self._memory = self.broker.memory_info().rss
        self._thread.start()
        eventually(lambda: self.served)

    def _ask(self) -> None:
        for number in itertools.count():
            began = time.monotonic()
            assert self.honest.submit(abs, -number).result(timeout=PATIENCE_S) == number
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.served += 1
            if self._ends.wait(0.01):
                return

    def counts(self) -> dict[str, int]:
        return dict(self.owner.status().counts)

    def news(self) -> dict[str, int]:
        """What the broker has counted since, but for what is honest."""
        found = {name: number - self._counts.get(name, 0) for name, number in self.counts().items() if name not in HONEST}
        return {name: number for name, number in found.items() if number}

    def assert_unharmed(self, *counted: str, growth: int = MAX_GROWTH) -> None:
        """``counted``: the reasons under which the broker has counted what it has dropped. ``growth``: bytes that it may
        have more of memory."""
        before = self.served
        eventually(lambda: self.served > before + 5)
        self._ends.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert set(self.news()) <= set(counted)
        assert self.owner.status().clients == self._clients
        eventually(lambda: [node.state for node in self.owner.nodes()] == ["alive"])
        assert self.broker.memory_info().rss - self._memory < growth

    def close(self) -> None:
        self._ends.set()
        self._thread.join(PATIENCE_S)
        self.honest.shutdown()
        self.owner.shutdown()


@pytest.fixture
def site(cluster) -> Iterator[Site]:
    site = Site(cluster)
    yield site
    site.close()


def strangers(address: str, number: int) -> list[Speaker]:
    return [Speaker(address) for _ in range(number)]


def with_all_cut_off(speakers: list[Speaker]) -> None:
    for speaker in speakers:
        assert speaker.cut_off()
        speaker.socket.close()


SAID: dict[str, tuple[bytes, ...]] = {
    "nothing": (),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n",),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n",),
    "random bytes": (Random(1).randbytes(100_000),),
    "ZMTP 1.0": (b"\x01\x00" + frame(b"hello"),),
    "ZMTP 2.0": (greeting(b"NULL", 2, 0), frame(b"hello")),
    "NULL": (greeting(), ready(b"DEALER"), frame(bytes(encode(Envelope(1, 1, 0, Ack()))[0]))),
    "PLAIN": (greeting(b"PLAIN"), command(b"HELLO", b"\x04user\x04pass"), frame(b"hello")),
    "another HELLO": (greeting(b"CURVE"), command(b"HELLO", bytes(194))),
    "INITIATE at once": (greeting(b"CURVE"), command(b"INITIATE", Random(2).randbytes(300))),
    "half a HELLO": (greeting(b"CURVE"), command(b"HELLO", bytes(194))[:50]),
    "a frame of 1 TiB": (greeting(b"CURVE"), b"\x02" + (1 << 40).to_bytes(8, "big")),
    "a command of 1 GiB": (greeting(b"CURVE"), b"\x06" + (1 << 30).to_bytes(8, "big") + bytes(1 << 16)),
    "a message without end": (greeting(b"CURVE"), *[frame(bytes(50_000), more=True)] * 20),
    "a socket that subscribes": (greeting(), ready(b"SUB"), frame(b"\x01")),
}


@pytest.mark.parametrize("said", SAID.values(), ids=list(SAID))
def test_strangers_who_say(site: Site, said: tuple[bytes, ...]):
    """Ten at once, to each of the broker's sockets."""
    addresses = [getattr(site.cluster.file.addresses, channel)[0] for channel in ("work", "beats", "status")]
    speakers = [speaker for address in addresses for speaker in strangers(address, 10)]
    for speaker in speakers:
        with contextlib.suppress(OSError):  # cut off before all of it was said
            speaker.say(*said)
    with_all_cut_off(speakers)
    site.assert_unharmed()


def test_slow_loris(site: Site):
    speakers = strangers(site.address, 20)
    for byte in greeting(b"CURVE"):
        for speaker in speakers:
            with contextlib.suppress(OSError):
                speaker.say(bytes((byte,)))
        time.sleep(0.1)  # that is the attack
    with_all_cut_off(speakers)
    site.assert_unharmed()


def test_ninety_silent_peers_when_descriptors_are_few(site: Site):
    """They take all that are left; those who are there are served, an alarm says so, and it passes."""
    limits = site.broker.rlimit(psutil.RLIMIT_NOFILE)
    few = site.broker.num_fds() + 40
    site.broker.rlimit(psutil.RLIMIT_NOFILE, (few, limits[1]))
    try:
        speakers = strangers(site.address, 90)
        eventually(lambda: site.news().get("alarm: no descriptors left"))
        before = site.served
        eventually(lambda: site.served > before + 20)
        with_all_cut_off(speakers)
        with Client(from_afar(site.cluster.file)) as late:
            assert late.submit(abs, -1).result(timeout=PATIENCE_S) == 1
    finally:
        site.broker.rlimit(psutil.RLIMIT_NOFILE, limits)
    site.assert_unharmed("alarm: no descriptors left", "alarm: few descriptors left")


def test_connections_as_fast_as_one_can(site: Site):
    """First with all the descriptors there are, then with few. ``flood.py`` tells how fast that is."""
    host, port = split_tcp(site.address)
    command = [sys.executable, flood.__file__, host, str(port)]
    limits = site.broker.rlimit(psutil.RLIMIT_NOFILE)
    few = site.broker.num_fds() + 40
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flooding:
        said: list[str] = []
        reading = threading.Thread(target=lambda: said.extend(flooding.stdout))
        reading.start()
        try:
            before = site.served
            eventually(lambda: len(said) > 5 and site.served > before + 20)
            assert site.news() == {}
            site.broker.rlimit(psutil.RLIMIT_NOFILE, (few, limits[1]))
            eventually(lambda: site.news().get("alarm: no descriptors left"))
            before = site.served
            eventually(lambda: site.served > before + 20)
        finally:
            flooding.stdin.close()
            reading.join(PATIENCE_S)
            site.broker.rlimit(psutil.RLIMIT_NOFILE, limits)
    with Client(from_afar(site.cluster.file)) as late:
        assert late.submit(abs, -1).result(timeout=PATIENCE_S) == 1
    site.assert_unharmed("alarm: no descriptors left", "alarm: few descriptors left")


def dealer_with(site: Site, public: bytes, secret: bytes) -> Callable[[], object]:
    keys = sockets.Keys(site.cluster.file.server_key.encode(), public, secret)

    def knocks() -> object:
        ctx = sockets.context()
        try:
            with sockets.connect_dealer(ctx, [site.address], keys):
                return None
        except errors.Refused as error:
            return error
        finally:
            ctx.term()

    return knocks


def test_keys_that_nobody_was_given(site: Site):
    """Each is told; and the broker's owner is."""
    for _ in range(10):
        assert "does not know this side's key" in str(dealer_with(site, *sockets.key_pair())())
    eventually(lambda: site.news().get("dropped: handshake with an unknown key") == 10)
    site.assert_unharmed("dropped: handshake with an unknown key")


def connections_to(site: Site) -> set[int]:
    """Of this process, to the broker's work socket over TCP, by their port on this side."""
    _, port = split_tcp(site.address)
    own = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in own if each.raddr and each.raddr.port == port and each.status == "ESTABLISHED"}


@contextlib.contextmanager
def an_insider(site: Site) -> Iterator[sockets.Socket]:
    """Who has a client's key, and means no good with it."""
    file = from_afar(ConnectionFile.load(role_file(cluster_dir(site.cluster.name), "client")))
    ctx = sockets.context()
    with sockets.connect_dealer(ctx, file.reachable("work"), sockets.Keys.of(file)) as dealer:
        yield dealer
        dealer.setsockopt(zmq.LINGER, 0)
    ctx.destroy(linger=0)


@pytest.fixture
def insider(site) -> Iterator[sockets.Socket]:
    with an_insider(site) as insider:
        yield insider


def test_an_insider_who_sends_garbage_is_told_off_and_then_ignored(site: Site, insider: sockets.Socket):
    random = Random(3)
    for number in range(5_000):
        insider.send(random.randbytes(number % 300))
    eventually(lambda: site.news().get("dropped: malformed message") == 5_000)
    heard = len(sockets.receive_all(insider, 10_000))
    assert heard <= 1_000, "most of it is not answered"
    site.assert_unharmed("dropped: malformed message")


def test_an_insider_who_floods_before_it_says_hello(site: Site, insider: sockets.Socket):
    told = encode(Envelope(7, 1, 0, Ack()))
    for _ in range(5_000):
        insider.send_multipart(told)
    known = ("unknown session", "dropped: too many messages without a session")
    eventually(lambda: sum(site.news().get(name, 0) for name in known) == 5_000)
    site.assert_unharmed(*known)


def test_an_insider_with_a_message_of_too_many_frames(site: Site, insider: sockets.Socket):
    insider.send_multipart([b"x"] * 1_100)
    eventually(lambda: site.news().get("dropped: malformed message") == 1)
    site.assert_unharmed("dropped: malformed message")


LESS = """
    import sys
    if "broker" in sys.orig_argv:
        from zmqsched import intake
        intake.LARGEST = 32 << 20
"""


def test_an_insider_with_messages_that_never_end(clusters, tmp_path, monkeypatch):
    """libzmq gathers their frames before anybody sees them, and counts them in no limit. A connection that brings more than
    any message takes is ended; here that is 32 MiB, and not 2 GiB."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(LESS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    part = bytes(1 << 20)
    peak = 0
    with LocalCluster(2, listen="") as cluster, contextlib.closing(Site(cluster)) as site, contextlib.ExitStack() as stack:
        before = site.broker.memory_info().rss
        honest = connections_to(site)
        insider = stack.enter_context(an_insider(site))

        def cut_off() -> int:
            nonlocal peak
            peak = max(peak, site.broker.memory_info().rss - before)
            return site.news().get("dropped: message without an end", 0)

        def is_cut_off_again(number: int) -> bool:
            """A message that is begun just when the connection ends is dropped at once, so one may not do."""
            for _ in range(16_384):
                insider.send(part, zmq.SNDMORE, copy=False)
            insider.send(part)  # libzmq begins to send when the last is there; it will not get that far
            assert site.honest.submit(len, bytes(20 << 20)).result(timeout=PATIENCE_S) == 20 << 20
            until = time.monotonic() + 3.0
            while not (found := cut_off() >= number) and time.monotonic() < until:
                time.sleep(0.02)
            return found

        for number in range(1, 4):
            eventually(lambda number=number: is_cut_off_again(number))
        assert peak < 1 << 30, "of 16 GiB: what comes in within a second is overlooked"
        assert honest <= connections_to(site), "who has sent as much in messages keeps its connection"
        site.assert_unharmed("dropped: message without an end", growth=256 << 20)  # the allocator's leftovers of them


def test_an_insider_on_the_beats_socket(site: Site):
    """A client's key is no node's."""
    file = from_afar(ConnectionFile.load(role_file(cluster_dir(site.cluster.name), "client")))
    ctx = sockets.context()
    with sockets.connect_pub(ctx, file.reachable("beats"), sockets.Keys.of(file)) as pub:

        def beats() -> bool:
            pub.send_multipart(encode(Envelope(0, 0, 0, Ack())))
            return "dropped: beat from a client" in site.news()

        eventually(beats)
    ctx.term()
    site.assert_unharmed("dropped: beat from a client")


def started(script: Path) -> subprocess.Popen[str]:
    """A broker that is not quite as it should be."""
    return subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONMALLOC": "malloc"},
    )  # fmt: skip


def test_when_the_authenticator_is_dead_nobody_is_let_in(clusters, tmp_path):
    """libzmq then lets everybody in. The broker ends as soon as it sees that; this one is made not to see it."""
    script = tmp_path / "broker.py"
    script.write_text(textwrap.dedent("""
        import sys
        from zmqsched.__main__ import main
        from zmqsched.authenticator import Authenticator

        Authenticator._reply = lambda self, request: sys.exit()  # of the thread, at the first handshake
        Authenticator.alive = True
        Authenticator.stop = lambda self: None
        main(["broker", "--name", "deaf", "--listen", "--until-eof", "--ready-fd", "1", "--log-level", "warning"])
    """))
    with started(script) as broker:
        assert broker.stdout.readline()
        file = from_afar(ConnectionFile.load(cluster_dir("deaf") / "connection.json"))
        public, secret = sockets.key_pair()
        rogue = sockets.Keys(file.server_key.encode(), public, secret)
        hello = encode(Envelope(0, 0, 0, ClientHello(bytes(16), 1, Host("h", 1, "3.11.1"))))
        ctx = sockets.context()
        with pytest.raises(errors.BrokerUnreachable):  # it is this handshake that kills the thread
            sockets.connect_dealer(ctx, file.reachable("work"), rogue, 1.0)
        with sockets.connect_dealer(ctx, file.reachable("work"), rogue) as dealer:
            for _ in range(10):
                dealer.send_multipart(hello)
            said = eventually(lambda: (line := broker.stderr.readline()) and "no authenticated sender" in line and line)
            assert "no authenticated sender; the last from 127.0.0.1" in said
            assert not dealer.poll(200), "nor is it answered"
        ctx.term()
        broker.stdin.close()
        broker.wait(PATIENCE_S)


def test_a_broker_ends_when_its_authenticator_is_dead(clusters, tmp_path):
    script = tmp_path / "broker.py"
    script.write_text(textwrap.dedent("""
        import sys
        from zmqsched.__main__ import main
        from zmqsched.authenticator import Authenticator

        Authenticator._reply = lambda self, request: sys.exit()  # of the thread, at the first handshake
        Authenticator.stop = lambda self: None
        main(["broker", "--name", "doomed", "--listen", "--until-eof", "--ready-fd", "1"])
    """))
    with started(script) as broker:
        assert broker.stdout.readline()
        file = from_afar(ConnectionFile.load(cluster_dir("doomed") / "connection.json"))
        ctx = sockets.context()
        with pytest.raises(errors.BrokerUnreachable):
            sockets.connect_dealer(ctx, file.reachable("work"), sockets.Keys.of(file), 2.0)
        ctx.term()
        broker.wait(PATIENCE_S)
        assert "the authenticator died" in broker.stderr.read()


LISTENING = "0A"


def listens(pid: int) -> list[str]:
    """Where the process listens on TCP, as its kernel says: addresses in hexadecimal."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def test_the_kernel_says_that_it_listens_on_loopback_alone(cluster):
    assert listens(cluster.broker_pid) == ["0100007F"] * 3
    for pid in cluster.node_pids:
        assert listens(pid) == []


def test_and_not_at_all_unless_asked(clusters):
    with LocalCluster(1) as cluster:
        assert listens(cluster.broker_pid) == []


HOOK = """
    import os, sys
    role = next((word for word in ("broker", "node") if word in sys.orig_argv), "")
    if role:
        open(f"{os.environ['HOOKED']}/{role}-{os.getpid()}", "w").close()

        def hook(event, args, pid=os.getpid()):
            if event == "pickle.find_class" and os.getpid() == pid:
                open(f"{os.environ['HOOKED']}/{role}-unpickled", "w").write(repr(args))

        sys.addaudithook(hook)
"""


def test_every_interface_takes_a_flag_and_is_what_the_file_says(clusters):
    wide = ["broker", "--name", "wide", "--listen", "0.0.0.0", "--until-eof", "--ready-fd", "1"]
    command = [sys.executable, "-m", "zmqsched", *wide]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert "0.0.0.0 would listen on every interface" in refused.stdout
    command.append("--insecure-any-interface")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as broker:
        pid = json.loads(broker.stdout.readline())["pid"]
        file = ConnectionFile.load(cluster_dir("wide") / "connection.json")
        told = {socket.inet_aton(split_tcp(address)[0])[::-1].hex().upper() for address in from_afar(file).reachable("work")}
        assert "0100007F" in told
        assert set(listens(pid)) == told, "never 00000000, which nobody could connect to"
        broker.stdin.close()
        assert broker.wait(PATIENCE_S) == 0


def test_neither_broker_nor_node_ever_unpickles(clusters, tmp_path, monkeypatch):
    """Not even an exception's type. (Workers, which a node forks, do.)"""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(HOOK))
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("HOOKED", str(seen))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    with LocalCluster(1, listen="", journal=tmp_path / "journal") as cluster, Client(cluster) as client:
        assert client.submit(Path, "/a").result(timeout=PATIENCE_S) == Path("/a")
        assert client.submit(lambda path: path.name, client.submit(Path, "/b")).result(timeout=PATIENCE_S) == "b"
        with pytest.raises(ZeroDivisionError):
            client.submit(divmod, 1, 0).result(timeout=PATIENCE_S)
        with pytest.raises(errors.WorkerDied):
            client.submit(os._exit, 3).result(timeout=PATIENCE_S)
        client.nodes()
        names = {path.name for path in seen.iterdir()}
        assert f"broker-{cluster.broker_pid}" in names
        assert f"node-{cluster.node_pids[0]}" in names
    assert [path.read_text() for path in seen.glob("*-unpickled")] == []
