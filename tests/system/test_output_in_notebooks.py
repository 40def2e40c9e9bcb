"""In a Jupyter kernel what a task prints appears in the cell that has submitted it, whatever runs by then."""

import os
import queue
import time

import jupyter_client
import pytest

pytestmark = pytest.mark.system

BEGIN = """
import os, sys, time
from zmqsched import Client, LocalCluster
cluster = LocalCluster(2)
client = Client(cluster)
"""


@pytest.fixture(scope="module")
def kernel(clusters):
    manager, kernel = jupyter_client.manager.start_new_kernel(env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        run(kernel, BEGIN)
        yield kernel
        run(kernel, "client.shutdown(); cluster.close()")
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel()
        manager.cleanup_resources()
        for context in (kernel.context, manager.context):
            context.destroy(linger=0)


def run(kernel, code: str) -> str:
    """Run a cell to its end; its number."""
    cell = kernel.execute(code)
    while (reply := kernel.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != cell:
        continue  # it answers more than once that it is ready
    assert reply["content"]["status"] == "ok", reply["content"]
    return cell


def printed(kernel, until: str) -> dict[tuple[str, str], str]:
    """What was printed, by cell and stream, up to this text."""
    found: dict[tuple[str, str], str] = {}
    end = time.monotonic() + 60
    while not any(until in text for text in found.values()):
        try:
            message = kernel.get_iopub_msg(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            pytest.fail(f"{until!r} was not printed: {found}")
        if message["msg_type"] == "stream":
            where = message["parent_header"]["msg_id"], message["content"]["name"]
            found[where] = found.get(where, "") + message["content"]["text"]
    return found


def test_late_output_appears_in_the_cell_of_its_task(kernel, tmp_path):
    first = run(
        kernel,
        f"""
def waits(path):
    print("begun")
    while not os.path.exists(path):
        time.sleep(0.005)
    print("late", file=sys.stderr)
    print("and last")

future = client.submit(waits, {str(tmp_path / "go")!r})
""",
    )
    assert printed(kernel, "begun")[first, "stdout"].endswith("] begun\n")
    second = run(kernel, "client.submit(print, 'of the second cell').result(); print('its own')")
    found = printed(kernel, "its own")
    assert found == {(second, "stdout"): found[second, "stdout"]}
    assert "of the second cell" in found[second, "stdout"]
    third = run(kernel, f"open({str(tmp_path / 'go')!r}, 'w').close(); future.result()")
    found = printed(kernel, "and last")
    assert third not in {cell for cell, _ in found}
    assert found[first, "stdout"].endswith("] and last\n")
    assert found.get((first, "stderr")) or printed(kernel, "late")[first, "stderr"].endswith("] late\n")


def test_each_task_of_two_cells_prints_in_its_own(kernel):
    cells = [run(kernel, f"futures{n} = [client.submit(print, 'cell {n}', i) for i in range(20)]") for n in range(2)]
    run(kernel, "[future.result() for future in futures0 + futures1]; client.submit(print, 'the end').result()")
    found = printed(kernel, "the end")
    for number, cell in enumerate(cells):
        lines = found[cell, "stdout"].splitlines()
        assert len(lines) == 20
        assert all(f"] cell {number} " in line for line in lines)
