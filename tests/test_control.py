"""The control socket: requests and answers, and whoever abuses it holds up nobody."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Home, eventually

from zmqsched import LocalCluster, control
from zmqsched.config import cluster_dir
from zmqsched.errors import ClusterNotFound, ZmqschedError

NAME = "controlled"


def answer(request: control.Request) -> control.Request:
    if "fail" in request:
        raise ValueError(f"there is no {request['fail']}")
    return {"echo": request, "more": "x" * int(request.get("size", 0))}


@pytest.fixture
def served(clusters: Home) -> Iterator[Path]:
    """A server in a thread of its own, as the cluster's."""
    directory = cluster_dir(NAME)
    directory.mkdir(mode=0o700)
    server = control.Server(directory, answer)
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            waiter = select.poll()
            for descriptor, events in server.descriptors().items():
                waiter.register(descriptor, events)
            server.serve({descriptor for descriptor, _ in waiter.poll(10)})
        server.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield directory / "control"
    over.set()
    thread.join()
    (directory / "control").unlink(missing_ok=True)
    directory.rmdir()


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(path))
    connection.settimeout(60)
    return connection


def line(connection: socket.socket) -> dict[str, object]:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        assert more, f"cut off after {data!r}"
        data += more
    return json.loads(data)  # type: ignore[no-any-return]


def is_cut_off(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_question_has_an_answer(served: Path):
    assert control.ask(NAME, {"a": 1})["echo"] == {"a": 1}


def test_an_error_is_told_as_text(served: Path):
    with pytest.raises(ZmqschedError, match=r"^there is no sense$"):
        control.ask(NAME, {"fail": "sense"})


def test_several_requests_on_one_connection_are_answered_in_order(served: Path):
    with connect(served) as connection:
        connection.sendall(b'{"n": 1}\n{"n": 2}\n{"n')
        data = b""
        while data.count(b"\n") < 2:
            data += connection.recv(1 << 16)
        first, second = data.splitlines()
        assert (json.loads(first)["echo"], json.loads(second)["echo"]) == ({"n": 1}, {"n": 2})
        connection.sendall(b'": 3}\n')
        assert line(connection)["echo"] == {"n": 3}


@pytest.mark.parametrize(
    "garbage", [b"\n", b"null\n", b"[1]\n", b"GET / HTTP/1.1\r\n", b"\xff\x00\n", b"[" * 50_000 + b"\n", b'{"a": NaN}x\n']
)
def test_garbage_is_answered_with_an_error_and_the_next_request_is_served(served: Path, garbage: bytes):
    with connect(served) as connection:
        connection.sendall(garbage)
        assert line(connection) == {"error": "a request is a JSON object on one line"}
        connection.sendall(b"{}\n")
        assert line(connection)["echo"] == {}


def test_a_line_that_is_too_long_is_cut_off(served: Path):
    with connect(served) as connection:
        connection.sendall(b"x" * (control.MAX_LINE + 2))
        assert line(connection) == {"error": "a request has 65536 bytes at most"}
        assert is_cut_off(connection)
    assert control.ask(NAME, {}) is not None


def test_the_silent_and_those_who_do_not_read_are_cut_off_and_hold_up_nobody(served: Path, monkeypatch):
    monkeypatch.setattr(control, "SILENT_S", 0.5)
    silent, deaf = connect(served), connect(served)
    deaf.sendall(b'{"size": 4000000}\n')
    assert control.ask(NAME, {"while": "they wait"}, 60) is not None
    assert is_cut_off(silent)
    waiter = select.poll()
    waiter.register(deaf, 0)
    assert waiter.poll(60_000), "nobody has hung up"
    assert control.ask(NAME, {}, 60) is not None
    with pytest.raises(AssertionError, match="cut off"):
        line(deaf)
    silent.close()
    deaf.close()


def test_a_byte_at_a_time_is_no_more_time(served: Path, monkeypatch):
    monkeypatch.setattr(control, "SILENT_S", 0.5)
    with connect(served) as loris:
        until = time.monotonic() + 60
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < until:
                loris.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() < until


def test_more_than_may_connect_wait_for_their_turn(served: Path, monkeypatch):
    monkeypatch.setattr(control, "SILENT_S", 0.5)
    many = [connect(served) for _ in range(control.MAX_PEERS + 5)]
    assert control.ask(NAME, {}, 60)["echo"] == {}
    for connection in many:
        connection.close()


def test_a_large_answer_arrives_whole(served: Path):
    assert len(str(control.ask(NAME, {"size": 3_000_000})["more"])) == 3_000_000


def test_nobody_there_is_said(clusters: Home):
    with pytest.raises(ClusterNotFound, match="no cluster named 'nobody' was started here"):
        control.ask("nobody", {})


def test_who_does_not_answer_is_not_waited_for(clusters: Home):
    directory = cluster_dir(NAME)
    directory.mkdir(mode=0o700)
    server = control.Server(directory, answer)
    try:
        with pytest.raises(ZmqschedError, match=r"does not answer within 0\.2 s"):
            control.ask(NAME, {}, 0.2)
    finally:
        server.close()
        (directory / "control").unlink()
        directory.rmdir()


def test_a_socket_that_was_tidied_away_is_there_again(clusters: Home):
    with LocalCluster(1, name="tidied") as cluster:
        path = cluster_dir(cluster.name) / "control"
        eventually(path.exists)
        path.unlink()
        eventually(path.exists)
        assert control.ask("tidied", {"do": "facts"})["pid"] == os.getpid()
        with pytest.raises(ZmqschedError, match="does not know the request"):
            control.ask("tidied", {"do": "magic"})
        with pytest.raises(ZmqschedError, match="does not know the request"):
            control.ask("tidied", {"do": "scale", "group": 3, "n": "4"})
