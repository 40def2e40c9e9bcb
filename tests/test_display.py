"""How things look: text and HTML say the same, nothing gets out of its cell, and showing never raises nor waits for long."""

import concurrent.futures
import os
import re
import signal
import time
from html.parser import HTMLParser

import pytest
from conftest import alive, eventually
from hypothesis import given
from hypothesis import strategies as st

from zmqsched import Client, LocalCluster
from zmqsched.cli.tables import print_sheet
from zmqsched.display import MAX_ROWS, Sheet, Shown, Table, as_html, as_line, as_text, cell
from zmqsched.records import NodeInfo, NodeList, Status, WorkerInfo, WorkerList

NASTY = "<script>alert(1)</script> & \x1b[31mred\x1b[0m\r\n\0 \u202e 'x' \"y\""


class Cells(HTMLParser):
    """What stands between the tags, in order; every tag that is opened is closed."""

    def __init__(self, source):
        super().__init__()
        self.cells, self.tags, self._open = [], set(), []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self._open.append(tag)
        self.tags.add(tag)
        assert {name for name, _ in attributes} <= {"style"}
        assert {value for _, value in attributes} <= {"text-align: left", "text-align: right"}

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def cells_of_text(text):
    return [found for found in re.split(r" {2,}|\n+ *", text) if found]


def in_ipython(shown):
    """What IPython in a terminal shows: by the first class that says how."""
    printed = []

    class Printer:
        text = printed.append

    for kind in type(shown).__mro__:
        if "_repr_pretty_" in vars(kind):
            kind._repr_pretty_(shown, Printer, False)
            return "".join(printed)
        if "__repr__" in vars(kind):
            return repr(shown)
    raise AssertionError("object has a repr")


def a_node(name="n1", **other):
    values = {
        "id": name, "host": "box", "pid": 7, "python": "3.11.4", "state": "alive", "slots": 4, "assigned": 2, "done": 10,
        "resources": {"cpu": 4.0, "gpu": 2.0}, "free": {"cpu": 2.0, "gpu": 1.0}, "tags": ("ssd",), "silent_s": 0.2,
    }  # fmt: skip
    return NodeInfo(**{**values, **other})


def a_worker(name="n1/1"):
    return WorkerInfo(name, "n1", "box", 8, "busy", 3, 99.5, 5 << 20)


def a_status(**other):
    values = {
        "name": "lab", "policy": "pack", "clients": 2, "nodes": NodeList([a_node()]), "workers": WorkerList([a_worker()]),
        "tasks": {"queued": 12}, "counts": {"ok": 10}, "waiting": [(12, "need gpu, no node has one")],
    }  # fmt: skip
    return Status(**{**values, **other})


# --- the forms ---------------------------------------------------------------------------------------------------------

anything = st.one_of(st.text(max_size=30), st.integers(), st.sampled_from([NASTY, "", None, 1.5]))


@given(st.text(max_size=10), st.lists(st.tuples(anything, anything), max_size=4), st.lists(st.tuples(anything, anything)))
def test_text_and_html_have_the_same_cells(title, rows, facts):
    sheet = Sheet(title, [Table(("one", "the other"), rows)], facts)
    html = Cells(as_html(sheet))
    assert cells_of_text(as_text(sheet)) == html.cells
    assert html.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert "\n" not in as_line(sheet)


def test_nothing_gets_out_of_its_cell():
    assert cell(NASTY) == "<script>alert(1)</script> & [31mred [0m 'x' \"y\""
    assert "<script" not in as_html(Sheet(NASTY, [Table((NASTY,), [(NASTY,)])], [(NASTY, NASTY)]))
    assert len(cell("x" * 10_000_000)) <= 1_000


def test_numbers_are_aligned_to_the_right():
    table = Table(("name", "done"), [("a", 5), ("long", 1234)])
    assert as_text(Sheet("title", [table])).splitlines() == ["title", "", "name  done", "a        5", "long  1234"]


def test_of_a_long_table_the_rest_is_counted():
    nodes = NodeList([a_node(f"n{number}") for number in range(MAX_ROWS + 5)])
    for text in (repr(nodes), nodes._repr_html_()):
        assert ("n99" in text, "n100" in text, "and 5 more" in text) == (True, False, True)


def test_what_cannot_be_shown_says_so():
    class Unprintable:
        def __str__(self):
            raise RuntimeError("not me")

    class Broken(Shown):
        def _sheet(self):
            raise ValueError(Unprintable())

    assert cell(Unprintable()) == "(Unprintable that cannot be printed)"
    expected = ["zmqsched.Broken", "cannot be shown", "ValueError: (ValueError that cannot be printed)"]
    assert Cells(Broken()._repr_html_()).cells == cells_of_text(in_ipython(Broken())) == expected


# --- records -----------------------------------------------------------------------------------------------------------


def test_a_list_of_nodes_is_a_list_and_a_table():
    nodes = NodeList([a_node(), a_node("n2", state="lost", silent_s=9.7, tags=(), host=NASTY)])
    assert nodes == [*nodes]
    assert repr(nodes) == in_ipython(nodes)
    assert cells_of_text(repr(nodes)) == Cells(nodes._repr_html_()).cells
    assert cells_of_text(repr(nodes))[0] == "2 nodes"
    assert "n1    box" in repr(nodes)
    assert "lost for 10 s" in repr(nodes)
    assert "label" not in repr(nodes), "nobody has named any"
    (row,) = repr(NodeList([a_node(label="gpu-1", leaves_in_s=61.2)])).splitlines()[3:]
    assert row.split()[:7] == ["n1", "gpu-1", "box", "7", "alive,", "61", "s"]
    assert repr(NodeList()) == "0 nodes"


def test_a_list_of_workers_too():
    workers = WorkerList([a_worker()])
    assert cells_of_text(repr(workers)) == Cells(workers._repr_html_()).cells
    assert "n1/1    box     8  busy      3  100 %  5 MiB" in repr(workers)


def test_a_status_says_what_waits_and_why():
    status = a_status()
    assert cells_of_text(repr(status)) == Cells(status._repr_html_()).cells
    assert "waiting     12: need gpu, no node has one" in repr(status)
    assert repr(a_status(nodes=NodeList(), workers=WorkerList(), tasks={}, counts={}, waiting=[])).splitlines() == [
        "cluster lab: policy pack, 2 clients", "", "unfinished  no tasks", "so far      nothing",
    ]  # fmt: skip


def test_the_command_prints_the_same(capsys):
    status = a_status(waiting=[(12, "need gpu, no node has one"), (2, "all 4 slots are taken")])
    print_sheet(status._sheet())
    printed = capsys.readouterr().out
    assert "waiting:    12: need gpu, no node has one\nwaiting:    2: all 4 slots are taken\n" in printed
    assert re.sub(r"(?m)^(unfinished|waiting|so far):", r"\1", printed).split() == repr(status).split()


# --- real ones ---------------------------------------------------------------------------------------------------------


def test_a_client_shows_its_cluster(client, cluster):
    text = in_ipython(client)
    assert cells_of_text(text)[:2] == [f"zmqsched.Client of cluster '{cluster.name}'", "node"]
    assert str(cluster.node_pids[0]) in text
    assert "state             open" in text
    pattern = re.compile(r"\d+")  # counts may move between the two
    assert pattern.sub("", " ".join(Cells(client._repr_html_()).cells)) == pattern.sub("", " ".join(cells_of_text(text)))


def test_a_status_says_why_a_task_waits(client):
    future = client.options(resources={"gpu": 1}).submit(abs, -1)
    eventually(lambda: client.status().waiting == [(1, "need gpu, no node has one")])
    assert "1: need gpu, no node has one" in in_ipython(client)
    future.cancel()
    eventually(lambda: client.status().waiting == [])


def test_repr_asks_nobody(client, monkeypatch):
    monkeypatch.setattr(client, "_request", None)
    expected = f"<zmqsched.Client of cluster '{client.cluster_name}', state: open, unfinished tasks: 0>"
    eventually(lambda: repr(client) == expected)  # of the tests before, what was cancelled may be unanswered


def test_a_client_in_a_callback_shows_what_it_knows(client):
    told = []
    future = client.submit(abs, -1)
    future.add_done_callback(lambda _: told.append(in_ipython(client)))
    eventually(lambda: told)
    assert "state" in told[0]


def test_a_closed_client_says_so(cluster):
    client = Client(cluster)
    client.shutdown()
    assert "state: closed" in repr(client)
    assert Cells(client._repr_html_()).cells[1:3] == ["state", "closed"]


def test_a_broker_that_does_not_answer_is_not_waited_for(clusters):
    with LocalCluster(1) as cluster:
        client = Client(cluster)
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            cells = Cells(client._repr_html_()).cells
            assert time.monotonic() - began < 20
        finally:
            os.kill(cluster.broker_pid, signal.SIGCONT)
        assert cells[-2:] == ["broker", "the broker did not answer within 0.5 s"]
        client.shutdown()


def test_a_client_whose_cluster_is_gone_says_why(clusters):
    with LocalCluster(1) as cluster:
        client = Client(cluster)
    eventually(lambda: not client.usable)
    assert Cells(client._repr_html_()).cells[2].startswith("broken: the cluster is gone")
    client.shutdown()


def test_a_cluster_shows_how_to_use_it(clusters):
    with LocalCluster(1, name="lab") as cluster:
        assert cells_of_text(in_ipython(cluster)) == Cells(cluster._repr_html_()).cells == [
            "zmqsched.LocalCluster 'lab'", "state", "running", "broker pid", str(cluster.broker_pid),
            "node pids", str(cluster.node_pids[0]), "use it", "zmqsched.Client('lab')",
        ]  # fmt: skip
        assert str(cluster.broker_pid) in repr(cluster)
    assert repr(cluster) == "<zmqsched.LocalCluster 'lab', state: closed>"
    assert not alive(cluster.broker_pid)


def test_a_future_shows_its_state_and_what_became_of_it(client, gate):
    good, bad = client.submit(abs, -1), client.submit(divmod, 1, 0)
    assert concurrent.futures.wait([good, bad]).not_done == set()
    assert re.fullmatch(r"<Future at 0x[0-9a-f]+ state=finished returned \d+ bytes, not unpickled yet>", repr(good))
    assert good._final is not None
    good.result(), bad.exception()
    waiting = client.options(tags=["nowhere"]).submit(abs, -1)
    for future, expected in (
        (good, ["state", "finished", "returned", "int"]),
        (bad, ["state", "finished", "raised", "ZeroDivisionError"]),
        (waiting, ["state", "pending"]),
    ):
        assert Cells(future._repr_html_()).cells == [f"Future at {id(future):#x}", *expected]
        assert repr(future) == f"<Future at {id(future):#x} state={' '.join(expected[1:])}>" == in_ipython(future)
        assert repr(future) == concurrent.futures.Future.__repr__(future)
    waiting.cancel()
    assert "state=cancelled" in repr(waiting)


def test_a_future_shows_how_far_its_task_is(client, gate):
    def work(gated):
        import zmqsched

        zmqsched.get_task().progress(0.4, "epoch 3\n<b>")
        gated()

    works = client.submit(work, gate.task)
    eventually(lambda: works.progress and works.running())
    assert Cells(works._repr_html_()).cells[1:] == ["state", "running", "at", "40 % epoch 3 <b>"]
    assert repr(works).endswith(" state=running at 40 % epoch 3 <b>>")
    gate.open()


def test_a_map_shows_how_far_it_is_and_what_has_failed(client):
    results = client.map(divmod, [1, 1, 1], [1, 0, 1], on_error="return")
    list(results)
    cells = Cells(results._repr_html_()).cells
    assert cells == cells_of_text(in_ipython(results))
    assert cells[:4] == ["zmqsched.Map", "items", "2 of 3 done, 1 failed, 0 running", "failed"]
    assert cells[4].startswith("1 x ZeroDivisionError")
    assert repr(results) == "<zmqsched.Map, items: 2 of 3 done, 1 failed, 0 running>"


@pytest.mark.parametrize("what", ["nodes", "workers", "status"])
def test_what_a_client_returns_looks_the_same_in_both(client, what):
    shown = getattr(client, what)()
    assert cells_of_text(repr(shown)) == Cells(shown._repr_html_()).cells


def test_what_is_shown_says_what_it_shows():
    class Nothing(Shown):
        pass

    with pytest.raises(TypeError, match="_sheet"):
        Nothing()
