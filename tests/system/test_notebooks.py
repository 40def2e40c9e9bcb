"""The notebooks of the examples do what they say, in a kernel, as a reader would run them."""

import asyncio
import json
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbclient.util import ensure_async

pytestmark = pytest.mark.system

NOTEBOOKS = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.ipynb"))
PROMPT_BACK_S = 20.0  # what is interrupted would go on for a minute and longer; `make bench` measures


def executed(name, seconds_to_stop=None):
    """The notebook's code cells, run. One that is tagged "interrupt" is interrupted once it has printed something; how long
    the prompt then took is appended to ``seconds_to_stop``.

    A front end shows what a kernel says in the cell that it says it for, whichever runs at the time. nbclient forgets what
    comes late, so what is ``said`` in each cell is noted beside it.
    """
    path = next(path for path in NOTEBOOKS if path.stem == name)
    notebook = nbformat.read(path, as_version=4)
    asyncio.run(run_all(notebook, path.parent, seconds_to_stop))
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


async def run_all(notebook, directory, seconds_to_stop):
    where = {"metadata": {"path": directory}}
    cells = {}  # by the message that had each of them run

    def was_run(cell, cell_index, execute_reply):
        cells[execute_reply["parent_header"]["msg_id"]] = cell

    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources=where, on_cell_executed=was_run
    )
    said = []
    async with client.async_setup_kernel():
        listener = client.km.client()
        listener.start_channels(shell=False, stdin=False, hb=False, control=False)
        listening = asyncio.create_task(listen(listener, said))
        await run_cells(client, notebook, seconds_to_stop)
        listening.cancel()
        listener.stop_channels()
    for cell in cells.values():
        cell.said = ""
    for parent, text in said:
        cells[parent].said += text


async def listen(kernel, said):
    while True:
        message = await kernel.get_iopub_msg()
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            said.append((message["parent_header"]["msg_id"], message["content"]["text"]))


async def run_cells(client, notebook, seconds_to_stop):
    for index, cell in enumerate(notebook.cells):
        if "interrupt" not in cell.metadata.get("tags", ()):
            await client.async_execute_cell(cell, index)
            continue
        running = asyncio.create_task(client.async_execute_cell(cell, index))
        while not printed(cell):  # noqa: ASYNC110 - nbclient has no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # what it prints comes before it waits
        began = time.monotonic()
        await ensure_async(client.km.interrupt_kernel())
        with pytest.raises(nbclient.exceptions.CellExecutionError, match="KeyboardInterrupt"):
            await running
        seconds_to_stop.append(time.monotonic() - began)


def printed(cell):
    """Standard output alone: progress bars are on the other."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def value(cell):
    (result,) = (output.data for output in cell.outputs if output.output_type == "execute_result")
    return result


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_without_what_they_printed(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)


def test_every_notebook_is_run_here():
    source = Path(__file__).read_text()
    assert [path.stem for path in NOTEBOOKS if f'executed("{path.stem}"' not in source] == []


def test_parallel_map(clusters):
    client, primes, error, awaited = executed("parallel_map")
    assert "alive" in value(client)["text/html"]
    assert value(primes)["text/plain"] == "4203"
    assert error.outputs[0].ename == "TypeError"
    assert "count_primes" in "".join(error.outputs[0].traceback)
    assert value(awaited)["text/plain"] == "25"


def test_interrupts(clusters):
    seconds = []
    _, stopped_map, kept, stopped_wait, left, after = executed("interrupts", seconds)
    assert max(seconds) < PROMPT_BACK_S
    assert [cell.outputs[-1].ename for cell in (stopped_map, stopped_wait)] == ["KeyboardInterrupt"] * 2
    assert value(kept)["text/plain"] == "{0: 0.01, 1: 0.01, 2: 0.01}"
    assert printed(left) == "20 cancelled\n"
    assert printed(after) == "the same workers: True\n"


def test_output(clusters):
    _, first, second, child, progress = executed("output")
    assert lines(first) == ["first from the first cell", "then from the first cell"]
    assert sorted(lines(second)) == [
        "first from the second cell",
        "from the second cell and from the first cell",
        "then from the second cell",
    ]
    assert value(child)["text/plain"] == r"'a child process\n'"
    assert value(progress)["text/plain"] == "(1.0, 'ready')"


def lines(cell):
    """What was said in the cell, without the tags of tasks."""
    return [line.partition("] ")[2] if line.startswith("[") else line for line in cell.said.splitlines()]
