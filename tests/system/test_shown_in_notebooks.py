"""What a notebook shows of clients and futures, and bars in the cells that they belong to."""

import nbclient
import nbformat
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

CELLS = [
    "import time, zmqsched\ncluster = zmqsched.LocalCluster(2)\nclient = zmqsched.Client(cluster)",
    "client",
    "cluster",
    "client.nodes()",
    "[client.submit(abs, -1)]",
    "first = zmqsched.wait([client.submit(time.sleep, 1.0)])",
    "print('no bar here')",
    "second = zmqsched.wait([client.submit(time.sleep, 0.05) for _ in range(40)])",
    "third = zmqsched.wait([client.submit(abs, -1)])",
    "read = list(client.map(time.sleep, [0.05] * 40))",
    "client.shutdown(); cluster.close()",
]


@pytest.fixture(scope="module")
def outputs(clusters):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def value(outputs):
    (result,) = outputs
    return result.data


def text(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_a_client_a_cluster_and_a_list_of_nodes_are_tables(outputs):
    for cell, said in ((1, "alive"), (2, "running"), (3, "alive")):
        shown = value(outputs[cell])
        assert said in shown["text/html"]
        assert said in shown["text/plain"]
        assert "<table>" in shown["text/html"]
        assert "<td" not in shown["text/plain"]


def test_a_list_of_futures_stays_on_a_line(outputs):
    assert value(outputs[4])["text/plain"].startswith("[<Future at 0x")


def test_each_bar_is_in_the_cell_that_waits(outputs):
    assert "1/1" in text(outputs[5])
    assert text(outputs[6]) == "no bar here\n"
    assert "40/40" in text(outputs[7])
    assert "1/1" not in text(outputs[7])


def test_a_map_has_one(outputs):
    assert "sleep: 100%" in text(outputs[9])
    assert "40/40" in text(outputs[9])


def test_what_is_done_at_once_has_none(outputs):
    assert text(outputs[8]) == ""
