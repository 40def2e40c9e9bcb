"""The user's own modules travel with the calls that need them: nodes lack them, and have them as the files say now."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import told

from zmqsched.errors import NotSerializable
from zmqsched.payload import FunctionPickler, pack_call
from zmqsched.payload.local import is_users
from zmqsched.payload.modules import LOOK_S, Modules


class Files:
    """A directory of modules that only this process has on its path: the nodes were started before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, source: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
        return file

    def load(self, name: str) -> ModuleType:
        importlib.invalidate_caches()
        return importlib.import_module(name)


@pytest.fixture
def files(client, tmp_path, monkeypatch) -> Iterator[Files]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Files(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("m_"):
            del sys.modules[name]


def test_a_module_that_the_nodes_lack(client, files):
    files.write("m_lacking.py", "def fit(x):\n    return x + 1\n")
    mine = files.load("m_lacking")
    assert client.submit(mine.fit, 1).result(timeout=60) == 2
    assert client.submit(lambda x: mine.fit(x) * 10, 1).result(timeout=60) == 20
    assert list(client.map(mine.fit, range(3), chunksize=2)) == [1, 2, 3]


def test_edit_and_run_again(client, files):
    """No reload here, no restart there; at once, and though the file keeps its size and perhaps its time."""
    mine = None
    for number in range(1, 9):
        files.write("m_edited.py", f"def fit():\n    return {number}\n")
        mine = mine or files.load("m_edited")
        assert client.submit(mine.fit).result(timeout=60) == number
    assert mine.fit() == 1


def test_what_a_module_imports_may_be_edited_too(client, files):
    files.write("m_constant.py", "FACTOR = 2\n")
    files.write("m_user.py", "from m_constant import FACTOR\ndef times(x):\n    return x * FACTOR\n")
    mine = files.load("m_user")
    assert client.submit(mine.times, 5).result(timeout=60) == 10
    files.write("m_constant.py", "FACTOR = 300\n")
    assert client.submit(mine.times, 5).result(timeout=60) == 1500
    files.write("m_user.py", "import m_new\ndef times(x):\n    return m_new.more(x)\n")
    files.write("m_new.py", "def more(x):\n    return x + 0.5\n")
    assert client.submit(mine.times, 5).result(timeout=60) == 5.5


def test_a_package_with_all_kinds_of_imports(client, files):
    files.write("m_pkg/__init__.py", "from .shapes import Shape\nNAME = __name__\n")
    files.write("m_pkg/shapes.py", "from . import numbers as n\nclass Shape:\n    area = n.AREA\n")
    files.write("m_pkg/numbers.py", "AREA = 12\n")
    files.write("m_pkg/deep/__init__.py", "")
    files.write(
        "m_pkg/deep/down.py",
        """
        import importlib.resources, pkgutil
        from pathlib import Path
        from .. import NAME
        from ..shapes import Shape

        def measure():
            import m_pkg.late
            from ..numbers import AREA
            texts = {
                (Path(__file__).parent / "data.txt").read_text(),
                importlib.resources.files(__package__).joinpath("data.txt").read_text(),
                pkgutil.get_data(__package__, "data.txt").decode(),
            }
            return Shape.area, AREA, NAME, m_pkg.late.WHEN, *texts
        """,
    )
    files.write("m_pkg/late.py", "WHEN = 'late'\n")
    files.write("m_pkg/deep/data.txt", "beside it")
    down = files.load("m_pkg.deep.down")
    assert client.submit(down.measure).result(timeout=60) == (12, 12, "m_pkg", "late", "beside it")
    files.write("m_pkg/numbers.py", "AREA = 13\n")
    files.write("m_pkg/late.py", "WHEN = 'later'\n")
    assert client.submit(down.measure).result(timeout=60) == (13, 13, "m_pkg", "later", "beside it")


def test_a_namespace_package(client, files):
    files.write("m_space/inner/leaf.py", "from m_space.other import VALUE\ndef get():\n    return VALUE\n")
    files.write("m_space/other.py", "VALUE = 'a leaf'\n")
    assert client.submit(files.load("m_space.inner.leaf").get).result(timeout=60) == "a leaf"


def test_modules_that_import_each_other(client, files):
    files.write("m_left.py", "import m_right\ndef name():\n    return 'left of ' + m_right.name()\n")
    files.write("m_right.py", "import m_left\ndef name():\n    return 'right'\n")
    mine = files.load("m_left")
    assert client.submit(mine.name).result(timeout=60) == "left of right"
    files.write("m_right.py", "import m_left\ndef name():\n    return 'the wall'\n")
    assert client.submit(mine.name).result(timeout=60) == "left of the wall"


def test_what_a_cell_imports_while_it_runs(client, files):
    files.write("m_lazy.py", "def answer():\n    return 42\n")
    files.write("m_lazy_too.py", "WORD = 'too'\n")

    def cell():
        import m_lazy
        from m_lazy_too import WORD

        return m_lazy.answer(), WORD

    assert "m_lazy" not in sys.modules
    assert client.submit(cell).result(timeout=60) == (42, "too")


def test_classes_are_the_same_on_both_sides(client, files):
    files.write(
        "m_classes.py",
        """
        import dataclasses, enum

        class Color(enum.Enum):
            RED = 1

        @dataclasses.dataclass
        class Point:
            x: int
            color: Color = Color.RED

        class Wrong(Exception):
            pass

        def move(point):
            assert type(point) is Point and point.color is Color.RED
            return Point(point.x + 1)

        def fail():
            raise Wrong("as told")  # the line
        """,
    )
    mine = files.load("m_classes")
    moved = client.submit(mine.move, mine.Point(1)).result(timeout=60)
    assert (type(moved), moved) == (mine.Point, mine.Point(2))
    assert moved.color is mine.Color.RED
    assert client.submit(lambda point: point.x, mine.Point(7)).result(timeout=60) == 7, "named by the argument alone"
    with pytest.raises(mine.Wrong, match="as told") as caught:
        client.submit(mine.fail).result(timeout=60)
    assert 'raise Wrong("as told")  # the line' in told(caught.value)
    with pytest.raises(mine.Wrong):
        client.options(retries=1, retry_on=mine.Wrong).submit(mine.fail).result(timeout=60)


SEES = """
import os
SEEN = []
def see(x):
    SEEN.append(x)
    return os.getpid(), list(SEEN)
"""


def test_what_a_module_keeps_is_kept_until_it_or_what_it_imports_changes(client, files):
    files.write("m_base.py", "WORD = 'one'\n")
    files.write("m_state.py", f"import m_base\n{SEES}")
    files.write("m_aside.py", "def aside():\n    return 1\n")
    mine, aside = files.load("m_state"), files.load("m_aside")
    seen: dict[int, list[int]] = {}
    for number in range(20):
        if number == 10:
            files.write("m_aside.py", "def aside():\n    return 2\n")
        client.submit(aside.aside).result(timeout=60)
        pid, kept = client.submit(mine.see, number).result(timeout=60)
        assert kept == [*seen.get(pid, ()), number]
        seen[pid] = kept
    files.write("m_base.py", "WORD = 'two'\n")
    assert client.submit(mine.see, 99).result(timeout=60)[1] == [99]


def test_an_error_in_the_file_is_told_at_once_and_can_be_repaired(client, files):
    files.write("m_broken.py", "def fit():\n    return 1\n")
    mine = files.load("m_broken")
    assert client.submit(mine.fit).result(timeout=60) == 1
    files.write("m_broken.py", "def fit(:\n    return 2\n")
    future = client.submit(mine.fit)
    assert future.done()
    with pytest.raises(NotSerializable, match=r"cannot send the module 'm_broken' along: .*m_broken.py, line 1"):
        future.result()
    files.write("m_broken.py", "def fit():\n    return 3\n")
    assert client.submit(mine.fit).result(timeout=60) == 3
    files.write("m_broken.py", "1 / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        client.submit(mine.fit).result(timeout=60)
    frames = traceback.extract_tb(caught.value.__traceback__)[-1:]
    assert [(frame.name, frame.line) for frame in frames] == [("<module>", "1 / 0")]
    assert "while it loaded the task's function" in told(caught.value)
    frames = traceback.extract_tb(client.submit(mine.fit).exception(timeout=60).__traceback__)
    assert [frame.name for frame in frames] == ["<module>"], "no frame of ours, nor of the import"


def test_a_file_that_is_gone_counts_as_it_was(client, files):
    file = files.write("m_gone.py", "def fit():\n    return 'still'\n")
    mine = files.load("m_gone")
    assert client.submit(mine.fit).result(timeout=60) == "still"
    file.unlink()
    assert client.submit(mine.fit).result(timeout=60) == "still"


def test_a_module_that_was_imported_again_here(client, files):
    files.write("m_again.py", "class Thing:\n    word = 'old'\n    def tell(self):\n        return self.word\n")
    mine = files.load("m_again")
    assert client.submit(mine.Thing().tell).result(timeout=60) == "old"
    files.write("m_again.py", "class Thing:\n    word = 'newer'\n    def tell(self):\n        return self.word\n")
    importlib.reload(mine)
    assert client.submit(mine.Thing().tell).result(timeout=60) == "newer"


def test_a_task_may_send_on_what_has_come_with_it(client, files):
    """A task that is a client itself has no files of these modules, perhaps."""
    file = files.write("m_relay.py", "import m_relayed\ndef names(modules):\n    return m_relayed.names(modules)\n")
    files.write("m_relayed.py", "def names(modules):\n    return {s.name: s.text for s in modules()}\n")
    mine = files.load("m_relay")

    def relays(gone):
        import os

        from zmqsched.payload.modules import Modules
        from zmqsched.payload.shipped import Shipped

        os.rename(gone, f"{gone}.away")
        try:
            return mine.names(lambda: Shipped(Modules().bundle(frozenset({"m_relay"})).blob)._sources)
        finally:
            os.rename(f"{gone}.away", gone)

    sources = client.submit(relays, str(file)).result(timeout=60)
    assert sources.keys() == {"m_relay", "m_relayed"}
    assert sources["m_relay"] == file.read_bytes()


def test_a_module_that_is_loaded_when_it_is_used_is_not_loaded_by_looking(files):
    class Lazy(ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"loaded for {name}")

    sys.modules["m_lazy_module"] = Lazy("m_lazy_module")
    assert Modules().named_in(pack_call((textwrap.dedent,), {})) == frozenset()


def test_inspect_and_tracebacks_in_the_worker_find_the_text(client, files):
    files.write("m_inspect.py", "def source():\n    import inspect, m_inspect\n    return inspect.getsource(m_inspect)\n")
    mine = files.load("m_inspect")
    assert "return inspect.getsource" in client.submit(mine.source).result(timeout=60)


# --- what travels, and what does not --------------------------------------------------------------------------------------


def sources_of(bundle) -> list[str]:
    from zmqsched.payload.shipped import Shipped

    return [source.name for source in Shipped(bundle.blob)._sources]


def test_only_what_is_imported_travels(files):
    files.write("m_needs.py", "import os, numpy, m_needed\nfrom zmqsched import Client\n")
    files.write("m_needed.py", "try:\n    import m_missing\nexcept ImportError:\n    pass\n")
    files.write("m_secret.py", "PASSWORD = 'x'\n")
    mine = files.load("m_needs")
    files.load("m_secret")
    modules = Modules()
    assert modules.named_in(pack_call((mine,), {})) == {"m_needs"}
    assert sources_of(modules.bundle(frozenset({"m_needs"}))) == ["m_needed", "m_needs"]


def test_what_is_installed_does_not_travel():
    modules = Modules()
    assert modules.named_in(pack_call((np.random.default_rng, textwrap.dedent, pytest.raises), {})) == frozenset()
    assert modules.bundle(frozenset({"numpy", "textwrap", "pytest", "zmqsched.client"})) is None


def test_a_package_with_compiled_parts_is_the_nodes_to_have(files):
    files.write("m_compiled/__init__.py", "def fit():\n    pass\n")
    mine = files.load("m_compiled")
    modules = Modules()
    assert modules.named_in(pack_call((mine.fit,), {})) == {"m_compiled"}
    part = ModuleType("m_compiled.fast")
    part.__file__ = str(files.path / "m_compiled" / f"fast{modules_suffix()}")
    sys.modules["m_compiled.fast"] = part
    try:
        assert modules.named_in(pack_call((mine.fit,), {})) == frozenset()
    finally:
        del sys.modules["m_compiled.fast"]


def modules_suffix() -> str:
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def test_values_name_no_modules(files):
    files.write("m_word.py", "")
    files.load("m_word")
    assert Modules().named_in(pack_call(("m_word", 1, {"m_word": b"m_word"}), {})) == frozenset()


def test_looking_for_changes_takes_no_time_to_speak_of(files, monkeypatch):
    file = files.write("m_often.py", "def fit():\n    return 1\n")
    mine = files.load("m_often")
    pickler = FunctionPickler()
    first = pickler.pack(mine.fit)
    looked = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: looked.append(path) or real(path, **how))
    began = time.perf_counter()
    for _ in range(5_000):
        assert pickler.pack(mine.fit) is first
    seconds = time.perf_counter() - began
    assert looked.count(str(file)) < 2 + seconds / LOOK_S
    monkeypatch.undo()


def test_a_version_that_comes_back_is_the_same_module(client, files):
    """A task of before, run again after a newer one, finds what it had."""
    files.write("m_versions.py", SEES)
    mine = files.load("m_versions")
    seen: dict[tuple[int, int], list[int]] = {}
    for number in range(30):
        version = number % 2
        files.write("m_versions.py", SEES + "# another\n" * version)
        pid, kept = client.submit(mine.see, number).result(timeout=60)
        assert kept == [*seen.get((pid, version), ()), number]
        seen[pid, version] = kept


def test_sets_that_share_a_module_all_see_its_change(files):
    files.write("m_shared.py", "X = 1\n")
    for name in ("m_one", "m_two"):
        files.write(f"{name}.py", "import m_shared\ndef fit():\n    return m_shared.X\n")
    one, two = files.load("m_one"), files.load("m_two")
    pickler = FunctionPickler()
    before = [pickler.pack(mine.fit) for mine in (one, two)]
    assert [pickler.pack(mine.fit) for mine in (one, two)] == before
    files.write("m_shared.py", "X = 22\n")
    time.sleep(4 * LOOK_S)
    after = [pickler.pack(mine.fit) for mine in (one, two)]
    assert all(new[0] != old[0] for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("/home/me/project/model.py", True),
        ("/tmp/ipykernel_7/123.py", True),
        ("<ipython-input-3>", True),
        (textwrap.__file__, False),
        (np.__file__, False),
        ("/usr/lib/python3/dist-packages/apt/cache.py", False),
        ("<frozen importlib._bootstrap>", False),
        (sys.modules["zmqsched"].__file__, False),
    ],
)
def test_whose_a_file_is(file, own):
    assert is_users(file) is own
