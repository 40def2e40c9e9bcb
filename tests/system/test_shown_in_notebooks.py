"""What a notebook shows of clients and futures, and bars in the cells that they belong to."""

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.system

VIEW = "application/vnd.jupyter.widget-view+json"
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


# Where there are widgets tqdm uses them, else it writes lines.
WITHOUT_WIDGETS = "import sys\nsys.modules['ipywidgets'] = None\n"


@pytest.fixture(scope="module", params=["widgets", "lines"])
def notebook(clusters, request):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    if request.param == "lines":
        cells[0].source = WITHOUT_WIDGETS + cells[0].source
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return notebook


@pytest.fixture
def outputs(notebook):
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture
def bars(notebook):
    """What the bar of each cell says at the end, "" where there is none."""
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    return [text(cell.outputs).rpartition("\r")[0] + in_widgets(cell.outputs, widgets) for cell in notebook.cells]


def in_widgets(outputs, widgets):
    views = [output.data.get(VIEW) for output in outputs if output.output_type == "display_data"]
    boxes = [widgets[view["model_id"]]["state"] for view in views if view]
    parts = [child.removeprefix("IPY_MODEL_") for box in boxes for child in box["children"]]
    return "".join(str(widgets[part]["state"].get("value")) for part in parts).replace("\u2007", " ")


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


def test_each_bar_is_in_the_cell_that_waits(bars):
    assert "1/1" in bars[5]
    assert bars[6] == ""
    assert "40/40" in bars[7]
    assert "1/1" not in bars[7]


def test_a_map_has_one(bars):
    assert "sleep: 100%" in bars[9]
    assert "40/40" in bars[9]
    assert "Warning" not in "".join(bars)


def test_what_is_done_at_once_has_none(bars, outputs):
    assert bars[8] == ""
    assert outputs[8] == []


def test_a_bar_stands_where_widgets_are(bars, outputs, request):
    kinds = {output.output_type for output in outputs[9]}
    assert kinds == ({"display_data"} if request.node.callspec.params["notebook"] == "widgets" else {"stream"})
