"""Cases 46 to 64: what is wrong is told at once, to whom it concerns, with what to do; and everybody else goes on.

Before and after each test another task of the same client succeeds.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from conftest import Gate, end_broker, eventually, told

from zmqsched import Client, LocalCluster, errors
from zmqsched.config import CONNECTION_FILE, Addresses, ConnectionFile, cluster_dir, find_cluster
from zmqsched.host import where
from zmqsched.protocol import Host

pytestmark = pytest.mark.usefixtures("goes_on")

OTHER_PYTHON = "3.99.0"
WRITER = io.BufferedWriter(io.BytesIO())


@pytest.fixture
def goes_on(client: Client) -> Iterator[None]:
    assert client.submit(pow, 2, 5).result(timeout=60) == 32
    yield
    assert client.submit(pow, 2, 6).result(timeout=60) == 64
    assert client.usable


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """On a machine that does nothing else; on others it takes some more."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + 15


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [None, 1024, "len", [len]])
def test_47_what_cannot_be_called(client, what):
    with pytest.raises(TypeError, match=r"submit needs a callable, not \w+; to run f\(x\) write submit\(f, x\)"):
        client.submit(what)
    with pytest.raises(TypeError, match="map needs a callable"):
        client.map(what, [1])


def lock():
    return threading.Lock()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda submit: submit(max, 1, lock()), r"argument 2 \(_thread.lock\): TypeError"),
        (lambda submit: submit(dict, key=lock()), r"keyword `key` \(_thread.lock\)"),
        (lambda submit: submit(len, [1, {"deep": lock()}]), r"argument 1 -> \[1\] -> \['deep'\] \(_thread.lock\)"),
        (lambda submit: submit(len, (n for n in "ab")), r"argument 1 \(generator\).*; make a list of its items"),
        (lambda submit: submit(len, WRITER), r"argument 1 \(_io.BufferedWriter\).*; hand over the path"),
        (lambda submit: submit(len, concurrent.futures.Future()), r"_base.Future\).*; hand over its result"),
        (lambda submit: submit(lock().acquire), r"cannot pickle `acquire` -> its `self` \(_thread.lock\)"),
    ],
)
def test_48_what_cannot_be_sent(client, call, names):
    future = call(client.submit)
    assert future.done(), "at once"
    with pytest.raises(errors.NotSerializable, match=names) as raised:
        future.result(timeout=0)
    assert isinstance(raised.value, TypeError)


def test_48_a_closure_that_cannot_be_sent_names_the_variable(client):
    guard = threading.Lock()

    def careful(number):
        with guard:
            return number

    future = client.submit(careful, 1)
    assert future.done()
    with pytest.raises(errors.NotSerializable, match=r"`careful` -> closure variable `guard` \(_thread\.lock\)"):
        future.result(timeout=0)


def test_48_one_item_of_a_map_cannot_be_sent(client):
    results = client.map(str, [1, threading.Lock(), 3])
    assert next(results) == "1"
    with pytest.raises(errors.NotSerializable):
        next(results)
    chunked = client.map(str, [1, 2, threading.Lock(), 4], chunksize=2)
    assert [next(chunked), next(chunked)] == ["1", "2"]
    with pytest.raises(errors.NotSerializable):
        next(chunked)


def test_48_what_is_nested_too_deeply(client):
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    try:
        with pytest.raises(errors.NotSerializable, match="nested too deeply"):
            client.submit(len, nested).result(timeout=60)
    finally:
        while nested:  # taken apart by hand: the interpreter's own way is recursive
            nested = nested.pop()


def test_49_what_is_too_large(client, monkeypatch):
    monkeypatch.setattr("zmqsched.payload.pickling.MAX_PAYLOAD", 100_000)
    with pytest.raises(errors.PayloadTooLarge, match="over the limit of 100,000; write it to a file") as raised:
        client.submit(len, b"x" * 100_001).result(timeout=0)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("fails_with", [SystemExit, KeyboardInterrupt])
def test_48_what_raises_when_it_is_pickled(client, fails_with):
    class Odd:
        def __reduce__(self):
            raise fails_with("in __reduce__")

    # A Ctrl-C in the middle of a submit has to get through to the user; all else is an answer.
    expected = KeyboardInterrupt if fails_with is KeyboardInterrupt else errors.NotSerializable
    with pytest.raises(expected):
        client.submit(id, Odd()).result(timeout=60)


# --- what tasks return -----------------------------------------------------------------------------------------------


async def coroutine():
    return 1


def generator():
    yield 1


@pytest.mark.parametrize(
    ("function", "names"),
    [(lock, r"the result \(_thread.lock\)"), (generator, r"\(generator\).*; make a list"), (coroutine, "coroutine"),
     (lambda: {"found": [lock()]}, r"the result -> \['found'\] -> \[0\] \(_thread.lock\)"),
     (lambda: io.BufferedWriter(io.BytesIO()), r"the result \(_io.BufferedWriter\).*; hand over the path")],
)  # fmt: skip
def test_51_a_result_that_cannot_be_sent(client, function, names):
    with pytest.raises(errors.ResultNotSerializable, match=names) as raised:
        client.submit(function).result(timeout=60)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("fails_with", [ValueError, SystemExit, KeyboardInterrupt, RecursionError])
def test_56_a_result_that_cannot_be_unpickled_here(client, fails_with):
    def task():
        import os

        def rebuild(pid):
            if os.getpid() != pid:
                raise fails_with("not here")

        class Odd:
            def __reduce__(self):
                return rebuild, (os.getpid(),)

        return Odd()

    future = client.submit(task)
    if fails_with is KeyboardInterrupt:  # in the main thread that would be the user's, and has to get through
        with pytest.raises(KeyboardInterrupt):
            future.result(timeout=60)
        with ThreadPoolExecutor() as threads:
            assert isinstance(threads.submit(future.exception, 60).result(), errors.ResultDecodeError)
    with pytest.raises(errors.ResultDecodeError, match="unpickl"):
        future.result(timeout=60)
    assert isinstance(future.exception(), errors.ResultDecodeError)


def test_56_a_result_whose_unpickling_never_ends_is_its_futures_own_business(client, gate, tmp_path):
    here, waits, before = os.getpid(), gate.task, Gate(tmp_path / "before")
    held = before.task

    class Endless:
        def __reduce__(self):
            return (lambda: waits() if os.getpid() == here else None), ()

    def task(hold):
        return hold() or Endless()

    futures = [client.submit(task, hold) for hold in (bool, held, bool)]
    futures[1].add_done_callback(lambda future: None)
    threads = ThreadPoolExecutor()
    try:
        asked = threads.submit(futures[0].result)
        gate.wait_until_begun(1)
        with pytest.raises(TimeoutError):
            futures[0].result(timeout=0.01)
        before.open()
        gate.wait_until_begun(2)
        done = threading.Event()
        client.submit(abs, -2).add_done_callback(lambda future: done.set())
        assert done.wait(60)
        assert client.submit(abs, -1).result(timeout=60) == 1
        assert not concurrent.futures.wait(futures, timeout=60, return_when="FIRST_EXCEPTION").not_done
    finally:
        before.open()
        gate.open()
        threads.shutdown()
    assert asked.result(timeout=60) is futures[0].result(timeout=60) is None


def test_51_results_that_were_computed_are_not_lost_by_one_that_cannot_be_sent(client):
    results = [client.submit(lambda n: lock() if n == 2 else n, number) for number in range(4)]
    assert [type(f.exception(timeout=60)).__name__ for f in results] == [
        "NoneType", "NoneType", "ResultNotSerializable", "NoneType",
    ]  # fmt: skip


# --- what tasks raise ------------------------------------------------------------------------------------------------


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class HoldsALock(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class CannotBeReduced(Exception):
    def __reduce__(self):
        raise OSError("not this one")


class CannotBeShown(Exception):
    def __str__(self):
        raise OSError("no text")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: NeedsTwo("this", "that"), "NeedsTwo: this and that"),
        (lambda: HoldsALock("locked"), "HoldsALock: locked"),
        (lambda: CannotBeReduced("odd"), "CannotBeReduced: odd"),
    ],
)
def test_55_an_exception_that_cannot_be_rebuilt(client, make, names):
    def raises():
        raise make()  # the user's line

    with pytest.raises(errors.RemoteError, match=names) as raised:
        client.submit(raises).result(timeout=60)
    assert "raise make()  # the user's line" in told(raised.value)


def test_55_an_exception_without_text(client):
    def raises():
        raise CannotBeShown

    error = client.submit(raises).exception(timeout=60)
    assert type(error).__name__ in {"CannotBeShown", "RemoteError"}
    assert "CannotBeShown" in told(error)


def test_55_a_class_that_exists_only_in_the_worker(client):
    def raises():
        import sys
        import types

        module = sys.modules["only_in_the_worker"] = types.ModuleType("only_in_the_worker")
        exec("class Gone(Exception):\n    pass", vars(module))
        raise module.Gone("as told")  # the user's line

    with pytest.raises(errors.RemoteError, match=r"^only_in_the_worker\.Gone: as told") as raised:
        client.submit(raises).result(timeout=60)
    assert "raise module.Gone(\"as told\")  # the user's line" in told(raised.value)
    assert "No module named 'only_in_the_worker'" in told(raised.value)


def test_55_an_exception_of_ten_megabytes(client):
    def raises():
        raise ValueError("x" * 10_000_000)

    error = client.submit(raises).exception(timeout=60)
    assert len(str(error)) == 10_000_000


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_52_exceptions_that_end_a_program_do_not_end_a_worker(client, kind):
    eventually(lambda: all(worker.state == "idle" for worker in client.workers()))
    before = {worker.pid for worker in client.workers()}

    def raises():
        raise kind(7)

    error = client.submit(raises).exception(timeout=60)
    assert (type(error), error.args) == (kind, (7,))
    assert {worker.pid for worker in client.workers()} == before


def test_52_sys_exit_is_an_exception_of_the_task(client):
    assert type(client.submit(sys.exit, 3).exception(timeout=60)) is SystemExit


def test_53_a_task_that_leaves_without_a_word(client):
    with pytest.raises(errors.WorkerDied, match="exit code 5"):
        client.options(requeue=False).submit(os._exit, 5).result(timeout=60)


def test_52_endless_recursion(client):
    def endless(n):
        return endless(n + 1) + 1

    with pytest.raises(RecursionError) as raised:
        client.submit(endless, 0).result(timeout=60)
    assert len(told(raised.value)) < 100_000


# --- what tasks do to their worker -------------------------------------------------------------------------------------


def test_53_a_task_that_closes_its_streams(clusters):
    def closes():
        for descriptor in range(3):
            os.close(descriptor)
        return "closed"

    with LocalCluster(1) as cluster, Client(cluster) as client:
        assert client.submit(closes).result(timeout=60) == "closed"
        assert list(client.map(abs, range(-20, 0))) == list(range(20, 0, -1))
        assert client.submit(len, bytes(1 << 20)).result(timeout=60) == 1 << 20, "through a descriptor with a low number"


def test_53_a_task_that_closes_what_is_not_its_own(client):
    future = client.options(name="closer").submit(os.closerange, 3, 1000)
    with pytest.raises(errors.WorkerDied, match="closer failed: 3 workers died running it") as raised:
        future.result(timeout=60)
    assert str(raised.value).count("exit code 70") == 3


def test_53_a_task_that_forks_and_lets_the_child_return(client):
    def forks():
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return pid

    assert client.submit(forks).result(timeout=60) > 0
    assert list(client.map(abs, range(50))) == list(range(50))


def test_53_a_task_in_a_directory_that_is_gone(clusters, tmp_path):
    directory = tmp_path / "gone"
    directory.mkdir()
    path = str(directory)

    def moves():
        os.chdir(path)
        os.rmdir(path)

    with LocalCluster(1) as cluster, Client(cluster) as client:
        assert client.submit(moves).result(timeout=60) is None
        assert list(client.map(abs, range(20))) == list(range(20))


def test_53_a_task_that_changes_signals_limits_and_threads(client):
    def changes():
        import signal
        import sys
        import threading
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.setrecursionlimit(10_000)
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        sys.stdout = None
        return "changed"

    assert client.options(requeue=False).submit(changes).result(timeout=60) == "changed"
    assert list(client.map(abs, range(50))) == list(range(50))


def test_54_a_task_that_prints_a_lot(scripts):
    out, err = scripts.run("""
        import os
        import zmqsched

        def prints():
            for _ in range(200):
                print("x" * 99_999)
            os.write(1, b"\\x01\\x00" * 50_000)
            return "printed"

        with zmqsched.LocalCluster(2) as cluster, zmqsched.Client(cluster) as client:
            printing = client.submit(prints)
            for number in range(100):
                assert client.submit(abs, -number).result(60) == number
            assert printing.result(60) == "printed"
            assert printing.log().endswith("\\x01\\x00" * 32_768)
    """)
    assert 0 < len(out) < 3_000_000
    assert "\0" not in out
    assert "lines not shown" in err


# --- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_60_a_callback_that_raises(client, gate, caplog, kind):
    def callback(future):
        raise kind("in the callback")

    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        future = client.submit(gate.task, 5)
        future.add_done_callback(callback)
        gate.open()
        assert future.result(timeout=60) == 5
        eventually(lambda: "in the callback" in caplog.text)


@pytest.mark.parametrize("what", ["status", "workers", "nodes", "shutdown"])
def test_60_a_callback_may_ask_and_shut_down(cluster, gate, what):
    told: concurrent.futures.Future[object] = concurrent.futures.Future()

    def callback(_):
        try:
            told.set_result(getattr(client, what)())
        except BaseException as error:  # noqa: BLE001 - told, not swallowed
            told.set_exception(error)

    with Client(cluster) as client:
        future = client.submit(gate.task)
        future.add_done_callback(callback)
        gate.open()
        assert bool(told.result(timeout=60)) is (what != "shutdown")


def test_60_a_callback_that_blocks_delays_no_other(client):
    release, seen = threading.Event(), []
    try:
        for number in range(20):
            client.submit(abs, -number).add_done_callback(
                lambda future, block=number % 10 == 3: release.wait() if block else seen.append(future.result())
            )
        eventually(lambda: len(seen) == 18)
        assert client.submit(abs, -1).result(timeout=60) == 1
    finally:
        release.set()


# --- clusters and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"n_workers": 0}, ValueError, "n_workers must be"),
        ({"n_workers": -1}, ValueError, "n_workers must be"),
        ({"n_workers": 10**6}, ValueError, "10000"),
        ({"n_workers": True}, TypeError, "n_workers must be an int, not bool"),
        ({"n_workers": 2.0}, TypeError, "n_workers must be an int, not float"),
        ({"n_workers": "2"}, TypeError, "n_workers must be an int, not str"),
        ({"n_nodes": 0}, ValueError, "n_nodes must be"),
        ({"max_queued": 0}, ValueError, "max_queued must be between 1 and"),
        ({"journal": 3}, TypeError, "journal is True, False or a file's path, not 3"),
        ({"max_queued": "1G"}, TypeError, "max_queued must be an int, not str"),
        ({"n_workers": 1, "n_nodes": 2}, ValueError, "2 nodes need at least as many workers, not 1"),
        ({"policy": "best"}, ValueError, "there is no policy 'best'; there are least-loaded, pack, random, round-robin"),
        ({"name": "a b"}, ValueError, "'a b' cannot name a cluster: use 1 to 40 letters"),
        ({"name": "../up"}, ValueError, "cannot name a cluster"),
        ({"resources": {"x": -1}}, ValueError, r"resources\['x'\] must be a finite number of at least 0, not -1"),
        ({"resources": {"x": float("nan")}}, ValueError, "finite"),
        ({"resources": {"x": "1"}}, TypeError, r"resources\['x'\] must be a number, not str"),
        ({"resources": {"x=y": 1}}, TypeError, "a resource's name"),
        ({"resources": ["x"]}, TypeError, "resources"),
        ({"tags": "fast"}, TypeError, r"write tags=\['fast'\]"),
        ({"tags": [5]}, TypeError, "a name is a text, not int"),
        ({"listen": "127.0.0.1:99999"}, ValueError, "the port must be a number from 1 to 65535"),
        ({"listen": "0.0.0.0"}, ValueError, "every interface"),
    ],
)  # fmt: skip
def test_64_clusters_that_cannot_be(clusters, arguments, error, says):
    before = clusters.processes().keys()
    with within(6), pytest.raises(error, match=says):
        LocalCluster(**{"n_workers": 2, **arguments})
    assert clusters.processes().keys() == before


def test_64_a_name_that_is_taken(cluster):
    with within(6), pytest.raises(errors.ClusterExists, match=f"'{cluster.name}' is running already.* choose another name"):
        LocalCluster(1, name=cluster.name)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"priority": 1.5}, TypeError, "priority must be an int, not float"),
        ({"priority": True}, TypeError, "priority must be an int, not bool"),
        ({"priority": 2**40}, ValueError, "priority must be between"),
        ({"retries": -1}, ValueError, "retries must be between 0 and"),
        ({"retries": 10**9}, ValueError, "retries must be between"),
        ({"retries": "3"}, TypeError, "retries must be an int, not str"),
        ({"resources": {"gpu": "1"}}, TypeError, r"resources\['gpu'\] must be a number, not str"),
        ({"resources": {"gpu": True}}, TypeError, "must be a number, not bool"),
        ({"resources": {"gpu": -1}}, ValueError, "at least 0, not -1"),
        ({"resources": {"gpu": float("nan")}}, ValueError, "finite"),
        ({"resources": {"gpu": float("inf")}}, ValueError, "finite"),
        ({"resources": {"": 1}}, TypeError, "a resource's name"),
        ({"resources": {5: 1}}, TypeError, "a resource's name"),
        ({"resources": ["gpu"]}, TypeError, "resources"),
        ({"resources": {f"r{n}": 1 for n in range(100)}}, ValueError, "64"),
        ({"tags": "fast"}, TypeError, r"write tags=\['fast'\]"),
        ({"tags": [5]}, TypeError, "a name is a text, not int"),
        ({"tags": [str(n) for n in range(100)]}, ValueError, "64"),
        ({"name": 5}, TypeError, "a name is a text, not int"),
        ({"retry_on": OSError()}, TypeError, "retry_on is an exception type or a tuple of such, not OSError"),
        ({"retry_on": [OSError]}, TypeError, "retry_on is an exception type"),
        ({"retry_on": (OSError, "ValueError")}, TypeError, "not 'ValueError'"),
        ({"retry_on": int}, TypeError, "not <class 'int'>"),
        ({"retry_on": ()}, ValueError, "at least one exception type"),
        ({"backoff": -1}, ValueError, "backoff must be a finite number of seconds of at least 0, not -1"),
        ({"backoff": float("nan")}, ValueError, "finite"),
        ({"backoff": float("inf")}, ValueError, "finite"),
        ({"backoff": "1"}, TypeError, "backoff is a number of seconds, not str"),
        ({"backoff": True}, TypeError, "not bool"),
        ({"timeout": 0}, ValueError, "timeout must be above 0"),
        ({"timeout": -1.5}, ValueError, "timeout must be above 0, not -1.5; without timeout there is no limit"),
        ({"timeout": float("nan")}, ValueError, "finite"),
        ({"timeout": float("inf")}, ValueError, "finite"),
        ({"timeout": "30"}, TypeError, "timeout is a number of seconds, not str"),
        ({"nice": 5}, TypeError, "unexpected keyword argument 'nice'"),
    ],
)
def test_29_options_that_cannot_be(client, arguments, error, says):
    with pytest.raises(error, match=says):
        client.options(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"priority": 2**31}, {"priority": -(2**31)}, {"retries": 10**6}, {"name": "x" * 1000},
        {"backoff": 2.0**59}, {"timeout": 2.0**59},
    ],
)  # fmt: skip
def test_29_options_at_the_border(client, arguments):
    assert client.options(**arguments).submit(abs, -1).result(timeout=60) == 1


def test_29_what_no_node_can_hold(client):
    wishes = {
        "widget, no node has one": {"resources": {"widget": 1}},
        "99 cpu, no node has more than 2": {"resources": {"cpu": 99}},
        "9.31e+08 GiB of memory, no node has more than": {"resources": {"memory": 1e18}},
        "tag fast, no node has it": {"tags": ["fast"]},
    }
    with within(12):
        futures = {needs: client.options(**wish).submit(abs, -1) for needs, wish in wishes.items()}
        told = {needs: future.exception(timeout=60) for needs, future in futures.items()}
    for needs, error in told.items():
        assert type(error) is errors.Unschedulable
        text = str(error)
        assert f"need {needs}" in text
        assert f"The nodes offer {client.nodes()[0].id} ({os.uname().nodename}): cpu=2, memory=" in text
        assert "Ask for less, or start a node that has it" in text


def test_46_after_shutdown(cluster):
    other = Client(cluster)
    other.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        other.submit(abs, -1)


# --- connection files ------------------------------------------------------------------------------------------------


@pytest.fixture
def good(cluster: LocalCluster) -> Path:
    return cluster_dir(cluster.name) / CONNECTION_FILE


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def test_63_a_connection_file_that_is_not_there(tmp_path):
    with within(1), pytest.raises(errors.ConnectionFileError, match=r"there is no connection file .*nothing\.json; is the"):
        Client(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; restart the cluster"),
        ("#!/bin/sh\n", "is not JSON"),
        ('{"name": "lab"', "is not JSON"),
        ("[1, 2]", "x.json"),
        ("{}", "x.json"),
    ],
)
def test_63_a_connection_file_that_is_none(tmp_path, text, says):
    with within(1), pytest.raises(errors.ConnectionFileError, match=says) as raised:
        Client(private(tmp_path / "x.json", text))
    assert "\n" not in str(raised.value)


def test_63_a_connection_file_that_others_can_read(good, tmp_path):
    path = private(tmp_path / "x.json", good.read_text())
    path.chmod(0o644)
    with within(1), pytest.raises(errors.ConnectionFileError, match=f"is open to other users .* chmod 600 {path}"):
        Client(path)
    path.chmod(0o600)
    with Client(path) as client:
        assert client.submit(abs, -1).result(timeout=60) == 1


def test_63_a_connection_file_that_is_a_link(good, tmp_path):
    (tmp_path / "x.json").symlink_to(good)
    with pytest.raises(errors.ConnectionFileError, match="is a symlink; give the path of the file itself"):
        Client(tmp_path / "x.json")


def test_63_a_connection_file_that_is_stale(clusters, tmp_path):
    with LocalCluster(1) as gone:
        path = private(tmp_path / "x.json", (cluster_dir(gone.name) / CONNECTION_FILE).read_text())
    for where_ in (path, str(path), gone):
        with within(7), pytest.raises(errors.BrokerUnreachable, match="is the cluster running"):
            Client(where_)


def test_63_a_connection_file_of_a_broker_that_was_killed(clusters):
    with LocalCluster(1) as cluster:
        path = cluster_dir(cluster.name) / CONNECTION_FILE
        end_broker(cluster)
        eventually(lambda: cluster.broker_death)
        assert path.exists()
        with within(3), pytest.raises(errors.BrokerUnreachable):
            Client(path, timeout=1)
        with within(1), pytest.raises(errors.ClusterNotFound, match=f"no cluster named '{cluster.name}' runs here"):
            Client(cluster.name)


def test_63_a_broker_that_hangs(clusters):
    with LocalCluster(1) as cluster:
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        try:
            with within(5), pytest.raises(errors.BrokerUnreachable, match=r"does not answer within 1 s|nobody answers"):
                Client(cluster, timeout=1)
        finally:
            os.kill(cluster.broker_pid, signal.SIGCONT)


def tcp_file(address: str) -> ConnectionFile:
    server_key, _ = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    return ConnectionFile(
        name="far", cluster_id="1", host="elsewhere", pid=1, python="3", zmqsched="1",
        addresses=Addresses([address], [address], [address]), server_key=server_key.decode(),
        client_public=public.decode(), client_secret=secret.decode(),
    )  # fmt: skip


def test_63_a_port_where_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        tcp_file(address).write(tmp_path / "x.json")
        with within(7), pytest.raises(errors.BrokerUnreachable, match=f"nobody answers.*{address}"):
            Client(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://127.0.0.1:99999", "has port 99999; ports are 1 to 65535"),
        ("tcp://127.0.0.1:0", "has port 0"),
        ("tcp://127.0.0.1", "has no port"),
        ("tcp://::1:5555", "without brackets"),
        ("tcp://*:5555", "every interface"),
        ("udp://127.0.0.1:5", "neither tcp:// nor ipc://"),
    ],
)
def test_63_a_connection_file_with_an_address_that_cannot_be(tmp_path, address, says):
    tcp_file(address).write(tmp_path / "x.json")
    with within(1), pytest.raises(errors.ConnectionFileError, match=says):
        Client(tmp_path / "x.json")


def test_63_a_host_that_does_not_resolve(tmp_path):
    tcp_file("tcp://no.such.host.invalid:5555").write(tmp_path / "x.json")
    with within(7), pytest.raises(errors.BrokerUnreachable, match=r"no\.such\.host\.invalid"):
        Client(tmp_path / "x.json")


def test_63_a_cluster_that_is_not_known(cluster, monkeypatch):
    says = f"no cluster named 'nope' runs here .*running: .*{cluster.name}.*zmqsched up --name nope"
    with within(1), pytest.raises(errors.ClusterNotFound, match=says):
        Client("nope")
    monkeypatch.setenv("ZMQSCHED_CLUSTER", "nope")
    with within(1), pytest.raises(errors.ClusterNotFound, match=says):
        Client()


@pytest.mark.parametrize("name", ["", "a b", ".hidden", "x" * 41])
def test_63_names_that_no_cluster_has(name):
    with pytest.raises(errors.ConnectionFileError, match="cannot name a cluster"):
        Client(name)


# --- other Pythons -----------------------------------------------------------------------------------------------------


def test_64_a_client_with_another_python(client, cluster, monkeypatch):
    mine = where()
    monkeypatch.setattr("zmqsched.client.where", lambda: Host(mine.host, mine.pid, OTHER_PYTHON, mine.versions))
    minor = ".".join(map(str, sys.version_info[:2]))
    says = rf"this client runs Python 3\.99\.0, the cluster Python {minor}: .*Start the client with Python {minor}"
    with within(3), pytest.raises(errors.Refused, match=says):
        Client(cluster)
    assert client.status().counts["refused: python"] >= 1  # it may have said hello again before it heard


def test_64_a_node_with_another_python(client, cluster):
    before = client.nodes()
    source = (
        "import platform, sys\n"
        f"platform.python_version = lambda: {OTHER_PYTHON!r}\n"
        "from zmqsched.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    path = cluster_dir(cluster.name) / CONNECTION_FILE
    done = subprocess.run(
        [sys.executable, "-c", source, "node", "--connect", path, "--slots", "1", "--log-level", "error"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "zmqsched: refused" in done.stderr
    assert "this node runs Python 3.99.0, the cluster Python 3." in done.stderr
    assert "Start the node with Python 3." in done.stderr
    assert [node.id for node in client.nodes()] == [node.id for node in before]


def test_63_a_node_without_a_cluster(client, cluster, tmp_path):
    file = find_cluster(cluster.name)
    assert file.name == cluster.name
    done = subprocess.run(
        [sys.executable, "-m", "zmqsched", "node", "--connect", tmp_path / "nothing.json"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("zmqsched: there is no connection file")
    assert done.stderr.count("\n") == 1


# --- what else users do ------------------------------------------------------------------------------------------------


def test_47_whatever_can_be_called(client):
    class Adder:
        def __init__(self, by):
            self.by = by

        def add(self, to):
            return to + self.by

    def outer():
        number = 5
        return lambda: number

    calls = {len: ("four",), functools.partial(pow, 2): (2,), Adder(1).add: (3,), (lambda: 4): (), Adder(4).by.__abs__: ()}
    assert [client.submit(fn, *arguments).result(timeout=60) for fn, arguments in calls.items()] == [4] * 5
    assert client.submit(outer()).result(timeout=60) == 5


@pytest.mark.parametrize(
    ("function", "kind", "advice"),
    [(generator, "generator", "make a list of its items"), (coroutine, "coroutine", "a task is a plain function")],
)
def test_47_a_generator_or_coroutine_function_says_what_to_do(client, function, kind, advice):
    with pytest.raises(errors.ResultNotSerializable, match=rf"the result \({kind}\).*; {advice}"):
        client.submit(function).result(timeout=60)


@pytest.mark.parametrize("make", [socket.socket, lambda: io.FileIO(os.devnull, "w"), threading.Event])
def test_48_what_holds_something_of_this_process(client, make):
    thing = make()
    with contextlib.closing(thing) if hasattr(thing, "close") else contextlib.nullcontext():
        future = client.submit(lambda: thing)
        assert future.done(), "at once"
        with pytest.raises(errors.NotSerializable, match="closure variable `thing`"):
            future.result(timeout=0)


@pytest.mark.parametrize("chunksize", [1, 3, "auto"])
def test_50_odd_iterables(client, chunksize):
    def breaks():
        yield from range(4)
        raise KeyError("item 4")

    results = client.map(abs, breaks(), chunksize=chunksize)
    assert list(itertools.islice(results, 4)) == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="item 4"):
        next(results)
    with contextlib.closing(client.map(abs, itertools.count(), chunksize=chunksize)) as results:
        assert list(itertools.islice(results, 100)) == list(range(100))
    assert list(client.map(pow, [2, 3, 4], [2, 2], chunksize=chunksize)) == [4, 9], "as long as the shortest"
    assert list(client.map(abs, [], chunksize=chunksize)) == []
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"chunksize must be at least 1, not {wrong}"):
            client.map(abs, [1], chunksize=wrong)


def test_51_a_module_comes_back_as_itself(client):
    assert client.submit(lambda: os.path).result(timeout=60) is os.path


def test_51_a_result_over_the_limit_says_so(client):
    def large():
        from zmqsched.payload import pack_value, pickling

        pickling.MAX_PAYLOAD, kept = 100_000, pickling.MAX_PAYLOAD
        try:
            return pack_value(bytes(200_000))
        finally:
            pickling.MAX_PAYLOAD = kept

    with pytest.raises(errors.PayloadTooLarge, match=r"what the task returned takes .* write it to a file"):
        client.submit(large).result(timeout=60)


def test_52_a_base_exception_of_ones_own_does_not_end_a_worker(client):
    class Odd(BaseException):
        pass

    def raises():
        raise Odd(7)

    before = {worker.pid for worker in client.workers()}
    error = client.submit(raises).exception(timeout=60)
    assert (type(error).__name__, error.args) == ("Odd", (7,))
    assert {worker.pid for worker in client.workers()} == before


def test_53_a_task_that_crashes_its_worker(client):
    def crashes():
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(errors.WorkerDied, match="SIGSEGV"):
        client.options(requeue=False).submit(crashes).result(timeout=60)


def test_55_an_exception_of_a_class_that_is_only_there(client, tmp_path):
    (tmp_path / "only_there.py").write_text("class Strange(Exception):\n    pass\n")
    path = str(tmp_path)

    def raises():
        sys.path.insert(0, path)
        try:
            import only_there

            raise only_there.Strange("a text")
        finally:
            sys.path.remove(path)

    with pytest.raises(errors.RemoteError, match="Strange: a text"):
        client.submit(raises).result(timeout=60)


def test_58_a_signal_handler_may_submit(client):
    """Also one that interrupts a submit of the same thread."""
    futures = []

    def handler(number, frame):
        futures.append(client.submit(abs, -1))
        signal.setitimer(signal.ITIMER_REAL, 0.0005)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        while len(futures) < 2_000:
            futures.append(client.submit(abs, -1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert {future.result(timeout=60) for future in futures} == {1}


def test_58_inside_an_event_loop(client):
    async def main():
        one, two = client.submit(pow, 2, 3), client.submit(pow, 2, 4)
        return await one + await two, await asyncio.wait_for(client.submit(abs, -1), 10)

    assert asyncio.run(main()) == (24, 1)


def test_58_a_task_that_would_make_a_client_is_told_how_to_get_one(client, cluster):
    name = cluster.name

    def nested():
        import zmqsched

        return zmqsched.Client(name)

    with pytest.raises(RuntimeError, match=r"a task does not make a client: zmqsched\.get_client\(\)"):
        client.submit(nested).result(timeout=60)


def test_59_odd_timeouts(client, gate):
    future = client.submit(gate.task)
    for timeout in (0, -1, float("nan"), -float("inf")):
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=timeout)
    gate.open()
    assert future.result(timeout=60) is None
    assert future.result(timeout=-1) is None, "it is there"
    assert concurrent.futures.wait([]) == (set(), set())


def test_59_futures_of_two_clients_may_be_mixed(client, cluster):
    with Client(cluster) as other:
        futures = [owner.submit(abs, -number) for number, owner in enumerate([client, other] * 5)]
        done = concurrent.futures.as_completed(futures, timeout=60)
        assert sorted(future.result() for future in done) == list(range(10))


def test_60_a_callback_that_submits_again_and_one_that_takes_its_time(client):
    ends: concurrent.futures.Future[int] = concurrent.futures.Future()

    def again(future):
        number = future.result()
        if number == 20:
            ends.set_result(number)
        else:
            client.submit(abs, -number - 1).add_done_callback(again)

    client.submit(abs, 0).add_done_callback(again)
    client.submit(abs, 0).add_done_callback(lambda future: time.sleep(0.2))
    assert ends.result(timeout=60) == 20


def test_61_an_interrupt_in_the_middle_of_a_map(client, gate):
    def interrupt():
        gate.wait_until_begun()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            list(client.map(gate.task, range(50)))
    finally:
        signal.signal(signal.SIGINT, before)
        interrupter.join()
    eventually(lambda: sum(client.status().tasks.values()) == 0)  # also those that ran
    assert client.submit(abs, -1).result(timeout=60) == 1
    assert gate.begun() <= 4, "what had not started never will"


def test_62_twenty_clients(cluster):
    """A thousand are in ../core: here each is a thread of its own."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(cluster)) for _ in range(20)]
        futures = [owner.submit(pow, number, 2) for number, owner in enumerate(clients)]
        assert [future.result(timeout=60) for future in futures] == [number**2 for number in range(20)]


def test_63_a_connection_file_of_another_user_or_a_damaged_address_is_one_line(tmp_path):
    tcp_file("tcp://[::1:5555").write(tmp_path / "x.json")
    with within(1), pytest.raises(errors.ConnectionFileError) as raised:
        Client(tmp_path / "x.json")
    assert "\n" not in str(raised.value)


def test_30_48_a_future_is_an_argument_and_nothing_else(client):
    first = client.submit(abs, -1)
    assert client.submit(abs, first).result(timeout=60) == 1
    with pytest.raises(errors.NotSerializable, match="closure variable `first`"):
        client.submit(lambda: first).result(timeout=0)
    with pytest.raises(TypeError, match="can only be pickled among the arguments"):
        pickle.dumps(first)


def test_30_a_failed_dependency(client):
    failed = client.submit(int, "no number")
    with pytest.raises(errors.DependencyFailed) as raised:
        client.submit(abs, failed).result(timeout=60)
    assert isinstance(raised.value.__cause__, ValueError)
