"""Who gets through to a bound socket and who does not, and that each failure is said."""

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import zmq
from conftest import new_keys

from zmqsched import sockets
from zmqsched.authenticator import Authenticator
from zmqsched.config import ipc_address
from zmqsched.errors import BrokerUnreachable, Refused, StartError
from zmqsched.sockets import Keys

ANY_PORT = "tcp://127.0.0.1:*"
# For what should happen; a failing test waits this long.
SOON_MS = 60_000
# For what must not: long enough for a handshake on loopback, many times over.
NEVER_MS = 150


class OwningContext(zmq.Context):
    """Holds on to its sockets: pyzmq warns about one that nobody closed before it was collected."""

    made: ClassVar[list[zmq.Socket]] = []

    def socket(self, *args, **kwargs):
        self.made.append(super().socket(*args, **kwargs))
        return self.made[-1]


@pytest.fixture
def ctx():
    """A context that closes what the test opened."""
    owner = OwningContext()
    yield owner
    owner.destroy(linger=0)
    OwningContext.made.clear()


@pytest.fixture
def short_dir():
    """pytest's own paths are too long for Unix sockets."""
    path = tempfile.mkdtemp(prefix="zs-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def keys():
    return new_keys()


@pytest.fixture
def authenticator(ctx, keys):
    made = Authenticator(ctx, {keys.client_public: "client:1"})
    made.start()
    yield made
    made.stop()


@pytest.fixture
def secured(ctx, keys, authenticator):
    """(router, address): a router on loopback TCP that lets in the client's key."""
    router, (address,) = sockets.bind_router(ctx, [ANY_PORT], keys)
    with router:
        yield router, address


def stranger_with(keys: Keys) -> Keys:
    """Knows the server's public key and has a pair of its own making."""
    public, secret = zmq.curve_keypair()
    return Keys(keys.server_public, public, secret)


def connects(dealer) -> bool:
    return bool(dealer.poll(SOON_MS, zmq.POLLOUT))


def received(router):
    """(User-Id, body) of the next message; the routing id's frame must vouch for the same."""
    assert router.poll(SOON_MS), "nothing came"
    identity, body = router.recv_multipart(copy=False)
    assert sockets.user_id(identity) == sockets.user_id(body)
    return sockets.user_id(body), body.bytes


def silent(router) -> bool:
    return not router.poll(NEVER_MS)


@contextlib.contextmanager
def tunnel_to(address: str, end: Path):
    """What ``ssh -R`` makes: a private Unix socket, each connection to which is one to the address."""
    host, port = address.removeprefix("tcp://").split(":")
    pairs = []

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = server.accept()[0], socket.create_connection((host, int(port)))
                pairs.extend((near, far))
                for source, target in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=carry, args=(source, target)))
                    threads[-1].start()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(end))
        end.chmod(0o600)
        server.listen()
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            threads[0].join()
            for each in pairs:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for each in pairs:
                each.close()


class TestCurve:
    def test_the_right_key_gets_through_under_its_name(self, ctx, keys, secured):
        router, address = secured
        dealer = sockets.connect_dealer(ctx, [address], keys)
        assert connects(dealer)
        dealer.send(b"hello", zmq.DONTWAIT)
        assert received(router) == ("client:1", b"hello")

    def test_a_strange_key_never_reaches_the_application(self, ctx, keys, secured):
        router, address = secured
        with pytest.raises(Refused, match=f"the broker at {address} does not know this side's key. The connection file is"):
            sockets.connect_dealer(ctx, [address], stranger_with(keys))
        pushy = ctx.socket(zmq.DEALER)
        pushy.curve_serverkey, (pushy.curve_publickey, pushy.curve_secretkey) = keys.server_public, zmq.curve_keypair()
        pushy.connect(address)
        pushy.send(b"hello")
        assert silent(router)

    def test_through_a_tunnel_it_is_the_same(self, ctx, keys, secured, short_dir):
        """Its end here is a Unix socket, whose peers the broker does not see: the keys decide."""
        router, address = secured
        with tunnel_to(address, short_dir / "end"):
            dealer = sockets.connect_dealer(ctx, [f"tunnel://{short_dir}/end"], keys)
            assert sockets.endpoint(dealer) == f"ipc://{short_dir}/end"
            dealer.send(b"hello", zmq.DONTWAIT)
            assert received(router) == ("client:1", b"hello")
            with pytest.raises(Refused, match="does not know this side's key"):
                sockets.connect_dealer(ctx, [f"tunnel://{short_dir}/end"], stranger_with(keys))
            with pytest.raises(ValueError, match="without the cluster's keys"):
                sockets.connect_dealer(ctx, [f"tunnel://{short_dir}/end"], None)
            assert silent(router)

    def test_no_key_never_reaches_the_application(self, ctx, secured):
        router, address = secured
        dealer = ctx.socket(zmq.DEALER)
        dealer.connect(address)
        dealer.send(b"hello")
        assert silent(router)
        # And bytes that are not ZMTP at all.
        host, port = address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"\x01\x00\x06\x00hello" * 20)
            assert silent(router)

    def test_the_wrong_server_key_stays_out(self, ctx, keys, secured):
        router, address = secured
        impostor = Keys(new_keys().server_public, keys.client_public, keys.client_secret)
        with pytest.raises(Refused, match="server key mismatch"):
            sockets.connect_dealer(ctx, [address], impostor)
        assert silent(router)

    def test_the_beats_socket_is_as_closed(self, ctx, keys, authenticator):
        sub, addresses = sockets.bind_sub(ctx, [ANY_PORT], keys)
        good = sockets.connect_pub(ctx, addresses, keys)
        bad = sockets.connect_pub(ctx, addresses, stranger_with(keys))
        deadline = time.monotonic() + SOON_MS / 1000
        while time.monotonic() < deadline:  # a PUB sends to nobody until the subscription has come
            good.send(b"good")
            bad.send(b"bad")
            if sub.poll(10):
                break
        frame = sub.recv(copy=False)
        assert (sockets.user_id(frame), frame.bytes) == ("client:1", b"good")
        for _ in range(20):
            bad.send(b"bad")
            while sub.poll(5):
                assert sub.recv() == b"good"

    def test_without_an_authenticator_nobody_is_vouched_for(self, ctx, keys):
        """libzmq lets everybody in then; that the broker can tell is what its gate rests on."""
        router, addresses = sockets.bind_router(ctx, [ANY_PORT], keys)
        dealer = sockets.connect_dealer(ctx, addresses, stranger_with(keys))
        assert connects(dealer)
        dealer.send(b"hello")
        assert received(router) == ("", b"hello")

    @pytest.mark.parametrize("bind", [sockets.bind_router, sockets.bind_sub, sockets.bind_xpub])
    def test_tcp_without_keys_is_refused(self, ctx, keys, bind):
        with pytest.raises(ValueError, match="keys"):
            bind(ctx, [ANY_PORT], None)
        with pytest.raises(ValueError, match="keys"):
            bind(ctx, [ANY_PORT], stranger_with(keys))

    def test_tcp_client_without_keys_is_refused(self, ctx, secured):
        with pytest.raises(ValueError, match="keys"):
            sockets.connect_dealer(ctx, [secured[1]], None)

    def test_secrets_are_not_in_the_repr(self, keys):
        assert str(keys.client_secret) not in repr(keys)
        assert str(keys.server_secret) not in repr(keys)


class TestUnix:
    def test_needs_no_keys(self, ctx, short_dir):
        router, addresses = sockets.bind_router(ctx, [ipc_address(short_dir, "work")], None)
        dealer = sockets.connect_dealer(ctx, addresses, None)
        assert connects(dealer)
        dealer.send(b"hello")
        assert received(router) == ("", b"hello")

    def test_beside_tcp_every_peer_is_vouched_for(self, ctx, keys, authenticator, short_dir):
        both = [ANY_PORT, ipc_address(short_dir, "work")]
        router, (tcp, unix) = sockets.bind_router(ctx, both, keys)
        assert unix.startswith("ipc://")
        for address, user in {unix: "admin:local", tcp: "client:1"}.items():
            dealer = sockets.connect_dealer(ctx, [address], keys)
            assert connects(dealer)
            dealer.send(b"hello")
            assert received(router) == (user, b"hello")
        # The listener on TCP did not become open by the other's being so.
        intruder = ctx.socket(zmq.DEALER)
        intruder.connect(tcp)
        intruder.send(b"hello")
        assert silent(router)

    def test_another_user_is_kept_out(self, ctx, keys, authenticator, short_dir, monkeypatch):
        router, addresses = sockets.bind_router(ctx, [ipc_address(short_dir, "work")], keys)
        monkeypatch.setattr(sockets.os, "geteuid", lambda: 4711)
        with pytest.raises(BrokerUnreachable, match="a socket of user"):
            sockets.connect_dealer(ctx, addresses, keys)
        monkeypatch.setattr(sockets, "pick_address", lambda addresses, timeout_s: addresses[0])
        with pytest.raises(Refused, match="does not know this side's key"):
            sockets.connect_dealer(ctx, addresses, keys)
        assert silent(router)

    def test_another_users_socket_is_passed_over_for_tcp(self, ctx, keys, secured, short_dir, monkeypatch):
        """As where a container has a user of another number, or none, for the cluster's."""
        unix, _ = ipc_address(short_dir, "work"), sockets.bind_router(ctx, [ipc_address(short_dir, "work")], None)
        monkeypatch.setattr(sockets.os, "geteuid", lambda: 4711)
        assert sockets.pick_address([unix, secured[1]]) == secured[1]


class TestAuthenticator:
    def test_one_per_context(self, ctx, authenticator):
        with pytest.raises(StartError, match="authenticate"):
            Authenticator(ctx, {}).start()

    def test_alive_until_stopped_and_stop_can_be_repeated(self, authenticator):
        assert authenticator.alive
        authenticator.stop()
        authenticator.stop()
        assert not authenticator.alive

    def test_nonsense_is_refused_and_does_not_end_it(self, ctx, keys, authenticator, secured):
        ask = ctx.socket(zmq.REQ)
        ask.connect("inproc://zeromq.zap.01")
        domain = sockets.ZAP_DOMAIN.encode()
        for request in (
            [b"x"],
            [b"1.0", b"1"],
            [b"1.0", b"1", domain, b"", b"", b"CURVE"],
            [b"1.0", b"1", domain, b"", b"", b"CURVE", b"short"],
            [b"1.0", b"1", domain, b"", b"", b"CURVE", b"", b""],
            [b"1.0", b"1", domain, b"1.2.3.4", b"", b"NULL"],
            [b"1.0", b"1", domain, b"\xff", b"", b"NULL"],
            [b"1.0", b"1", domain, b"", b"", b"PLAIN", b"user", b"pass"],
            [b"1.0", b"1", b"other", b"localhost:0:0:1", b"", b"NULL"],
        ):
            ask.send_multipart(request)
            assert ask.poll(SOON_MS)
            assert ask.recv_multipart()[2:5] == [b"400", b"No access", b""]
        assert authenticator.alive
        assert connects(sockets.connect_dealer(ctx, [secured[1]], keys))

    def test_ends_with_its_context(self):
        ctx = sockets.context()
        authenticator = Authenticator(ctx, {})
        authenticator.start()
        thread = authenticator._thread
        ctx.term()
        thread.join(SOON_MS / 1000)
        assert not authenticator.alive


class TestDealer:
    def test_takes_nothing_while_the_broker_is_away(self, ctx, short_dir):
        """Else the next broker on that address would get what was meant for the last."""
        address = [ipc_address(short_dir, "work")]
        router, _ = sockets.bind_router(ctx, address, None)
        dealer = sockets.connect_dealer(ctx, address, None)
        assert connects(dealer)
        router.close(linger=0)
        deadline = time.monotonic() + SOON_MS / 1000
        while dealer.poll(0, zmq.POLLOUT) and time.monotonic() < deadline:
            pass  # until it notices
        with pytest.raises(zmq.Again):
            dealer.send(b"stale", zmq.DONTWAIT)
        router, _ = sockets.bind_router(ctx, address, None)
        assert connects(dealer)
        dealer.send(b"fresh")
        assert received(router)[1] == b"fresh"

    def test_a_router_says_when_a_peer_is_gone(self, ctx, short_dir):
        router, _ = sockets.bind_router(ctx, [ipc_address(short_dir, "work")], None)
        with pytest.raises(zmq.ZMQError) as caught:
            router.send_multipart([b"nobody", b"x"], zmq.DONTWAIT)
        assert caught.value.errno == zmq.EHOSTUNREACH

    def test_closing_with_unsent_messages_does_not_hang(self, short_dir):
        ctx = sockets.context()
        router, addresses = sockets.bind_router(ctx, [ipc_address(short_dir, "work")], None)
        dealer = sockets.connect_dealer(ctx, addresses, None)
        assert connects(dealer)
        with contextlib.suppress(zmq.Again):
            while True:
                dealer.send(bytes(10_000), zmq.DONTWAIT)
        started = time.monotonic()
        router.close()
        dealer.close()
        ctx.term()
        assert time.monotonic() - started < 20


class TestBind:
    def test_a_taken_port_is_said(self, ctx, keys, secured):
        with pytest.raises(StartError, match=r"cannot listen at tcp://127\.0\.0\.1:\d+: Address already in use"):
            sockets.bind_sub(ctx, [secured[1]], keys)

    def test_ipv6(self, ctx, keys, authenticator):
        try:
            _, (address,) = sockets.bind_router(ctx, ["tcp://[::1]:*"], keys)
        except StartError:
            pytest.skip("no IPv6 on this host")
        assert address.startswith("tcp://[::1]:")
        assert connects(sockets.connect_dealer(ctx, [address], keys))


class TestPickAddress:
    @pytest.fixture
    def listening(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]

    @pytest.fixture
    def dead(self):
        """The address of a port that is taken, so that nobody else comes to listen there, and does not listen."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"

    def test_takes_the_one_that_answers(self, listening, dead):
        good = f"tcp://127.0.0.1:{listening}"
        assert sockets.pick_address(["ipc:///no/such/socket", dead, good]) == good

    def test_gives_the_ip_address_of_a_name(self, listening):
        assert sockets.pick_address([f"tcp://localhost:{listening}"]) == f"tcp://127.0.0.1:{listening}"

    def test_prefers_unix(self, listening, short_dir):
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(short_dir / "s"))
            unix.listen()
            addresses = [f"tcp://127.0.0.1:{listening}", f"ipc://{short_dir}/s"]
            assert sockets.pick_address(addresses) == addresses[1]

    def test_a_tunnel_comes_last_and_only_a_private_one(self, listening, dead, short_dir):
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(short_dir / "end"))
            unix.listen()
            (short_dir / "end").chmod(0o600)
            tunnel, good = f"tunnel://{short_dir}/end", f"tcp://127.0.0.1:{listening}"
            assert sockets.pick_address([tunnel, good]) == good
            assert sockets.pick_address([tunnel, dead]) == tunnel
            (short_dir / "end").chmod(0o666)
            with pytest.raises(BrokerUnreachable, match="open to other users: StreamLocalBindMask"):
                sockets.pick_address([tunnel, dead])

    def test_says_why_for_each(self, dead, short_dir):
        (short_dir / "stale").touch()
        addresses = [dead, f"ipc://{short_dir}/none", f"ipc://{short_dir}/stale", "tcp://h:99999", "udp://x"]
        with pytest.raises(BrokerUnreachable) as caught:
            sockets.pick_address(addresses)
        said = str(caught.value)
        assert f"{dead} (connection refused)" in said
        assert "/none (no such file or directory)" in said
        assert "/stale (connection refused)" in said
        assert "tcp://h:99999 (has port 99999" in said
        assert "udp://x (is not" in said
        assert "zmqsched ls" in said

    def test_none_at_all(self):
        with pytest.raises(BrokerUnreachable, match="there are none"):
            sockets.pick_address([])

    def test_keeps_to_its_time_when_packets_vanish(self, monkeypatch, listening):
        block = socket.socketpair()

        def swallowed(address, timeout_s):
            block[0].recv(1)
            raise TimeoutError("timed out")

        monkeypatch.setattr(sockets, "_probe_tcp", swallowed)
        started = time.monotonic()
        with pytest.raises(BrokerUnreachable, match=r"no answer in 0\.1 s"):
            sockets.pick_address(["tcp://10.255.255.1:9"], timeout_s=0.1)
        assert time.monotonic() - started < 20
        for end in block:
            end.shutdown(socket.SHUT_RDWR)
            end.close()


class TestListenAddress:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("", "tcp://127.0.0.1:*"),
            ("127.0.0.1", "tcp://127.0.0.1:*"),
            ("127.0.0.1:5000", "tcp://127.0.0.1:5000"),
            ("127.0.0.1:*", "tcp://127.0.0.1:*"),
            ("::1", "tcp://[::1]:*"),
            ("[::1]", "tcp://[::1]:*"),
            ("[::1]:5000", "tcp://[::1]:5000"),
            ("192.0.2.7:1", "tcp://192.0.2.7:1"),
        ],
    )
    def test_good(self, text, address):
        assert sockets.listen_address(text) == address

    @pytest.mark.parametrize(
        "text", ["0.0.0.0", "0.0.0.0:80", "*", "*:80", "::", "[::]:80", ":80", "0", "::ffff:0.0.0.0"]
    )
    def test_every_interface_is_refused(self, text):
        with pytest.raises(ValueError, match="every interface"):
            sockets.listen_address(text)

    @pytest.mark.parametrize(
        "text", ["127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:x", "host:999999", "[::1]5", "[", "a b", "x" * 300, "h\n"]
    )
    def test_nonsense_is_refused(self, text):
        with pytest.raises(ValueError, match="--listen"):
            sockets.listen_address(text)


    def test_every_interface_is_each_address_of_this_host(self, monkeypatch):
        here = ["127.0.0.1", "192.0.2.7", "::1", "2001:db8::7", "fe80::1%eth0"]
        monkeypatch.setattr(sockets, "own_addresses", lambda: here)
        for text, addresses in {
            "0.0.0.0": ["tcp://192.0.2.7:*", "tcp://127.0.0.1:*"],
            "*:5000": ["tcp://192.0.2.7:5000", "tcp://127.0.0.1:5000"],
            "[::]:5000": ["tcp://[2001:db8::7]:5000", "tcp://[::1]:5000"],
            "127.0.0.1": ["tcp://127.0.0.1:*"],
        }.items():
            assert sockets.listen_addresses(text, any_interface=True) == addresses
        with pytest.raises(ValueError, match="every interface"):
            sockets.listen_addresses("0.0.0.0", any_interface=False)


def test_an_old_libzmq_is_refused(monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 2, 5))
    with pytest.raises(StartError, match="too old"):
        sockets.context()


@pytest.mark.parametrize(
    ("listen", "ports"), [("tcp://127.0.0.1:5555", ["5555", "5556", "5557"]), ("tcp://[::1]:*", ["*", "*", "*"])]
)
def test_a_stated_port_is_followed_by_the_other_two(listen, ports):
    from zmqsched.broker import CHANNELS, _port_of

    assert [_port_of(listen, channel).rpartition(":")[2] for channel in CHANNELS] == ports


def test_a_connection_that_nobody_acknowledges_is_given_up_before_the_kernel_would(ctx, keys, authenticator):
    """After 30 s of silence the kernel asks again 20 s later: a healed network would stay unused for as long."""
    router, [address] = sockets.bind_router(ctx, [ANY_PORT], keys)
    dealer = sockets.connect_dealer(ctx, [address], keys)
    assert {each.getsockopt(zmq.TCP_MAXRT) for each in (router, dealer)} == {10_000}


def test_a_new_connection_is_told_of_once(ctx, short_dir):
    address = ipc_address(short_dir, "work")
    router, _ = sockets.bind_router(ctx, [address], None)
    dealer = sockets.connect_dealer(ctx, [address], None)
    connections = sockets.Connections(dealer)
    waiter = sockets.Waiter(dealer)
    waiter.add(connections.descriptor)
    dealer.poll(SOON_MS, zmq.POLLOUT)
    connections.new()
    router.close(linger=0)
    router, _ = sockets.bind_router(ctx, [address], None)
    until = time.monotonic() + SOON_MS / 1000
    while connections.descriptor not in waiter.wait(until):
        assert time.monotonic() < until
    assert connections.new()
    assert not connections.new()
    connections.close()
