"""What a user reads when a task fails: the exception itself, the user's own lines, and where it ran."""

from __future__ import annotations

import asyncio
import linecache
import os
import re
import socket
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
from conftest import told

ROOT = Path(__file__).parent.parent


def flaw(values):
    return values["missing"]


def test_the_lines_of_the_user_then_where_it_ran(client):
    def fit(values):
        return flaw(values)

    future = client.submit(fit, {})
    error = future.exception(timeout=60)
    assert [(frame.name, frame.line) for frame in traceback.extract_tb(error.__traceback__)] == [
        ("fit", "return flaw(values)"),
        ("flaw", 'return values["missing"]'),
    ]
    with pytest.raises(KeyError) as caught:
        future.result()
    assert caught.value is error
    *_, line, marks, message, place = told(error).splitlines()
    assert (line.strip(), marks.strip()) == ('return values["missing"]', "~~~~~~^^^^^^^^^^^")
    assert message == "KeyError: 'missing'"
    here = re.escape(socket.gethostname())
    assert re.fullmatch(rf"\(ran on {here}, worker \d+, task .*fit-\d+, attempt 1\)", place)
    assert told(error).count('return values["missing"]') == 1, "nobody reads it twice"
    assert "zmqsched/worker.py" not in told(error)


def test_asking_again_adds_nothing(client):
    future = client.submit(flaw, {})
    lengths = []
    for _ in range(3):
        with pytest.raises(KeyError) as caught:
            future.result(timeout=60)
        lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert lengths == [3, 3, 3], "here, the future's result(), the task"


def test_the_attempt_and_the_worker_are_the_last(client):
    def fails():
        raise ValueError(os.getpid())

    error = client.options(retries=2).submit(fails).exception(timeout=60)
    assert f"worker {error.args[0]}, " in error.__notes__[-1]
    assert error.__notes__[-1].endswith("attempt 3)")


def test_a_result_that_cannot_be_sent_says_where_it_was_made(client):
    error = client.submit(lambda: (number for number in range(3))).exception(timeout=60)
    assert "a generator" in str(error) or "(generator)" in str(error)
    assert "attempt 1)" in error.__notes__[-1]


def test_what_is_awaited_shows_the_same(client):
    async def main():
        await client.submit(flaw, {})

    with pytest.raises(KeyError) as caught:
        asyncio.run(main())
    assert traceback.extract_tb(caught.value.__traceback__)[-1].line == 'return values["missing"]'


def test_a_function_of_a_notebook_cell_shows_its_lines(client):
    """The worker has no such file; the client knows the lines as IPython and the interactive interpreter do."""
    cell = "def in_cell(x):\n    y = x\n    return y / 0  # the cell's line\n"
    name = "<a cell of test_tracebacks>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    names: dict = {"__name__": "__main__"}
    exec(compile(cell, name, "exec"), names)
    error = client.submit(names["in_cell"], 1).exception(timeout=60)
    assert "    return y / 0  # the cell's line\n" in told(error)


def test_the_interpreter_prints_it_so(scripts):
    _, err = scripts.run(
        """
        import zmqsched

        def fit(x):
            return 10 / x  # here

        if __name__ == "__main__":
            with zmqsched.LocalCluster(n_workers=1) as cluster, zmqsched.Client(cluster) as client:
                client.submit(fit, 0).result(timeout=60)
        """,
        code=1,
    )
    assert re.search(
        r"in fit\n    return 10 / x  # here\n +~*\^*~*\nZeroDivisionError: division by zero\n\(ran on [^\n]*\)\n$", err
    ), err


def test_pytest_shows_the_failing_line(tmp_path, client):
    """As in a user's test suite: pytest reads the frames in its own way."""
    (tmp_path / "test_theirs.py").write_text(
        textwrap.dedent(
            """
            from zmqsched.payload import pack_exception, unpack_exception

            def fit(x):
                return 10 / x  # here

            def test_it():
                try:
                    fit(0)
                except ZeroDivisionError as error:
                    packed = pack_exception(error)
                raise unpack_exception(packed) from None
            """
        )
    )
    alone = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py"],
        cwd=tmp_path, env=os.environ | alone, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ">       return 10 / x  # here" in done.stdout, done.stdout
    assert "1 failed" in done.stdout


@pytest.mark.parametrize("chunksize", [1, 3, "auto"])
def test_an_item_of_a_map_shows_the_same(client, chunksize):
    with pytest.raises(KeyError) as caught:
        list(client.map(flaw, [{"missing": 1}, {}], chunksize=chunksize))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].line == 'return values["missing"]'
    assert "zmqsched/payload" not in "".join(traceback.format_tb(caught.value.__traceback__))
    assert re.fullmatch(r"\(ran on .*, worker \d+, task flaw-\d+, attempt 1\)", caught.value.__notes__[0])
