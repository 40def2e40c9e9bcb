"""A large value that a function captures is named, sent once, and sent again when it has changed."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys

import numpy as np
import pytest
from chaos.proxy import Proxy

from zmqsched import Client, LocalCluster, sockets
from zmqsched.config import cluster_dir, role_file
from zmqsched.payload import FunctionPickler


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """Sizes of the large messages that clients of this process send."""
    sizes: list[int] = []
    real = sockets.send

    def send(socket, frames, *rest):
        size = sum(memoryview(frame).nbytes for frame in frames)
        if size > 1_000_000:
            sizes.append(size)
        return real(socket, frames, *rest)

    monkeypatch.setattr(sockets, "send", send)
    return sizes


def test_it_is_sent_once_and_again_when_it_has_changed(client, sent):
    table = np.arange(1_000_000)

    def total():
        return int(table.sum())

    with pytest.warns(UserWarning, match="sent once") as told:
        futures = [client.submit(total) for _ in range(50)]
    assert [re.sub(r"; .*", "", str(warning.message)) for warning in told] == [
        "`total` captures `table` (numpy.ndarray, 8.0 MB)"
    ]
    assert told[0].filename == __file__
    assert {future.result(timeout=60) for future in futures} == {499_999_500_000}
    assert [size // 1_000_000 for size in sent] == [8]
    table[7] += 1
    assert client.submit(total).result(timeout=60) == 499_999_500_001
    assert [size // 1_000_000 for size in sent] == [8, 8]


def test_a_task_gets_an_array_of_its_own_that_it_may_write_to(client):
    table = np.zeros(200_000)

    def writes():
        table[0] += 1
        return table[0]

    with pytest.warns(UserWarning, match="captures `table`"):
        assert client.submit(writes).result(timeout=60) == 1
    assert table[0] == 0


def test_with_retries_and_in_maps_too(client, sent):
    table = np.ones(500_000)
    with pytest.warns(UserWarning, match="captures `table`"):
        assert list(client.map(lambda n: n + table.sum(), range(20), chunksize=3)) == [500_000.0 + n for n in range(20)]
    assert len(sent) == 1

    def again(n):
        return n + table.sum()

    with pytest.warns(UserWarning, match="captures `table`"):
        futures = [client.options(retries=1, retry_on=OSError).submit(again, n) for n in range(20)]
    assert [future.result(timeout=60) for future in futures] == [500_000.0 + n for n in range(20)]
    assert len(sent) == 2


TABLE = np.zeros(200_000)
TEXT = {number: str(number) for number in range(200_000)}


def helper():
    return 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: lambda x=TABLE: x, r"`<lambda>` captures `x` \(numpy.ndarray, 1.6 MB\)"),
        (lambda: functools.partial(helper, TABLE), r"`helper` captures the partial's argument 1 \(numpy"),
        (lambda: outer_of(TABLE), r"`outer` captures `inner` -> `kept` \(numpy"),
        (lambda: outer_of(TEXT), r"`outer` captures `inner` -> `kept` \(dict, \d\.\d MB\)"),
    ],
)
def test_it_is_named_wherever_it_is(make, named):
    with pytest.warns(UserWarning, match=named):
        FunctionPickler().pack(make())


def outer_of(kept):
    def inner():
        return kept

    def outer():
        return inner()

    return outer


def test_each_is_told_of_once_and_what_is_small_never():
    pickler = FunctionPickler()
    table = [*range(1_000_000)]
    fn = lambda: table  # noqa: E731
    with pytest.warns(UserWarning, match="captures `table`"):
        pickler.pack(fn)
    table.append(0)
    pickler.pack(fn)  # a second warning would be an error
    small = np.zeros(1_000)
    pickler.pack(lambda: small)


def test_every_kind_of_change_is_seen():
    table = np.zeros((100, 400))
    view = table[::2]
    items = [table, {"view": view}, b"x"]
    fn = lambda: items  # noqa: E731
    pickler = FunctionPickler()
    digests = [pickler.pack(fn)[0]]
    for change in (
        lambda: table.__setitem__((99, 399), 1),
        lambda: view.__setitem__((0, 0), -0.0),
        lambda: items.append(1),
        lambda: items.__setitem__(0, table.astype("f4")),
        lambda: items.__setitem__(0, np.asfortranarray(table)),
    ):
        assert pickler.pack(fn)[0] == digests[-1]
        change()
        digests.append(pickler.pack(fn)[0])
    assert len(set(digests)) == len(digests)


@contextlib.contextmanager
def far_nodes(cluster, number):
    """Nodes of two workers each behind one wire, which counts."""
    words = ["--tag", "far", "-n", "2", "--until-eof", "--ready-fd", "1"]
    with Proxy(role_file(cluster_dir(cluster.name), "node")) as wire, contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "zmqsched", "node", "--connect", str(wire.file), *words]
        for _ in range(number):
            node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(node)
            stack.callback(node.stdin.close)
            assert node.stdout.readline()
        yield wire


@pytest.mark.system
def test_between_hosts_it_is_sent_once_to_each_node(clusters):
    table = np.random.default_rng(0).integers(256, size=5_000_000, dtype=np.uint8)

    def at(index):
        return int(table[index])

    expected = [int(number) for number in table[:100]]
    with LocalCluster(1, listen="127.0.0.1") as cluster, Client(cluster) as client, far_nodes(cluster, 2) as wire:
        far = client.options(tags=["far"])
        with pytest.warns(UserWarning, match="captures `table`"):
            futures = [far.submit(at, index) for index in range(100)]
        assert [future.result(timeout=60) for future in futures] == expected
        assert {node.done > 0 for node in client.nodes() if "far" in node.tags} == {True}
        once = wire.carried
        assert once < 2 * table.nbytes + 1_000_000
        assert [far.submit(at, index).result(timeout=60) for index in range(100)] == expected
        assert wire.carried < once + 1_000_000
        assert list(far.map(at, range(100))) == expected
        assert wire.carried < once + 2 * table.nbytes + 2_000_000, "a map makes batches of it, once"
