"""The documents are true: README's programs run and print what it says, and what is named anywhere exists."""

from __future__ import annotations

import ast
import doctest
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from chaos.scenarios import SCENARIOS
from conftest import Scripts

from zmqsched.__main__ import main
from zmqsched.clusterfile import ClusterFile

ROOT = Path(__file__).parent.parent
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDE]
# Pages whose programs need more than zmqsched does.
WITH_PACKAGES = {"integrations": [pytest.mark.system]}
PACKAGE = ROOT / "zmqsched"
SEPARATOR = "-- the next snippet --"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs(page: Path = README) -> list[tuple[str, str | None]]:
    """The page's python blocks, and the text block that follows as what each prints."""
    blocks = BLOCK.findall(page.read_text())
    following = [*blocks[1:], ("", "")]
    return [
        (source, text if next_kind == "text" else None)
        for (kind, source), (next_kind, text) in zip(blocks, following, strict=True)
        if kind == "python"
    ]


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines, as words: those of console blocks, and those in the text that begin with zmqsched."""
    text = page.read_text()
    lines = [line for kind, block in BLOCK.findall(text) if kind in ("console", "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:python -m )?zmqsched [^`\n]+|make [^`\n]+)`", BLOCK.sub("", text))
    for line in lines:
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words[2:] if words[:2] == ["python", "-m"] else words


FAMILIES = ("config", "keys")  # whose commands have two words


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "zmqsched", *command, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_there_are_programs_and_commands():
    """Or the tests below would find nothing wrong with nothing."""
    assert len(programs()) >= 2
    assert {words[1] for words in commands(README) if words[0] == "zmqsched"} == {
        "up", "ls", "status", "down", "broker", "node", "exec", "doctor", "clean"
    }  # fmt: skip


@pytest.mark.parametrize("number", range(len(programs())))
def test_programs_of_the_readme_run_as_pasted(scripts: Scripts, number: int):
    source, printed = programs()[number]
    out, err = scripts.run(source)
    assert err == ""
    assert printed is None or out == printed
    scripts.home.assert_nothing_left()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=WITH_PACKAGES.get(page.stem, []), id=page.stem)
        for page in (ROOT / "docs" / "index.md", *GUIDE)
    ],
)
def test_the_snippets_of_each_page_are_one_program_that_prints_what_is_shown(scripts: Scripts, page: Path):
    snippets = programs(page)
    assert snippets, "a page of the guide without a snippet"
    out, err = scripts.run(f"print({SEPARATOR!r})\n".join(source for source, _ in snippets), timeout_s=150)
    assert err == ""
    for (source, expected), printed in zip(snippets, out.split(f"{SEPARATOR}\n"), strict=True):
        wanted = expected or ""  # "..." stands for anything
        assert doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS), f"{source}printed:\n{printed}"
    scripts.home.assert_nothing_left()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in commands(page):
        if program == "make":
            assert words[0] in targets, f"make {words[0]}"
        if program != "zmqsched":
            continue
        command = words[0]
        assert re.search(rf"^  {command} ", help_of(), re.MULTILINE), f"zmqsched {command}"
        own = words[1 : words.index("--") if "--" in words else None]  # what follows is another command's
        family = command in FAMILIES and words[1:2] and words[1].isalpha()
        said = help_of(*words[:2]) if family else help_of(command)
        for option in {word.partition("=")[0] for word in own if word.startswith("-")}:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", said), f"zmqsched {command} {option}"


def cluster_files() -> Iterator[pytest.param]:
    """Those in the pages, and those of the examples whose launchers come with zmqsched."""
    for page in PAGES:
        blocks = [text for kind, text in BLOCK.findall(page.read_text()) if kind == "toml"]
        yield from (pytest.param(text, id=f"{page.stem}-{number}") for number, text in enumerate(blocks))
    for path in sorted((ROOT / "examples").glob("*.toml")):
        yield pytest.param(path.read_text(), id=path.name)


@pytest.mark.parametrize("text", list(cluster_files()))
def test_cluster_files_are_right_and_can_be_started(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    ClusterFile.load(path)
    assert main(["up", str(path), "--dry-run"]) == 0
    assert "zmqsched broker" in capsys.readouterr().out


def keys_of(struct: type[msgspec.Struct], path: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        parts = [kind for kind in (field.type, *get_args(field.type)) if isinstance(kind, type)]
        inner = next((kind for kind in parts if issubclass(kind, msgspec.Struct)), None)
        yield from keys_of(inner, f"{path}{field.name}.") if inner else [f"{path}{field.name}"]


def test_every_key_of_a_cluster_file_is_in_the_guide_and_no_other():
    table = re.findall(r"^`([a-z_.]+)` \|.*\| \S", (ROOT / "docs" / "guide" / "launching.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(keys_of(ClusterFile))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path):
    missing = [name for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()) if not (ROOT / name).exists()]
    assert missing == []


def test_each_chaos_scenario_has_its_row_in_the_table_of_promises():
    rows = re.findall(r"\| `make chaos ONLY=([\w-]+)` \| \S.*$", RELIABILITY.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(SCENARIOS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_what_the_architecture_names_is_in_the_code():
    named = re.findall(r"`([^`\n]+)`", BLOCK.sub("", ARCHITECTURE.read_text()))
    files = [name for name in named if re.fullmatch(r"[\w/]+\.py", name)]
    missing = [name for name in files if not any((base / name).exists() for base in (ROOT, PACKAGE))]
    dotted = [name for name in named if re.fullmatch(r"[A-Za-z_]+\.[A-Za-z_]+(\(\))?", name) and name not in files]
    missing += [name for name in dotted if not _defined(name.removesuffix("()"))]
    assert len(files) > 20
    assert len(dotted) > 20
    assert missing == []


def _defined(dotted: str) -> bool:
    """``Class.name`` in one of the classes of that name; if none of ours has that name, both words occur somewhere."""
    owner, name = dotted.split(".")
    known = _names_by_class()
    return name in known[owner] if owner in known else {owner, name} <= _words_of_the_code()


@functools.cache
def _names_by_class() -> dict[str, set[str]]:
    """What each class defines, assigns or reads by name; classes of the same name in two modules count as one."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names = found.setdefault(node.name, set())
                for inner in ast.walk(node):
                    match inner:
                        case ast.FunctionDef(name=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                            names.add(name)
    return found


@functools.cache
def _words_of_the_code() -> set[str]:
    return {word for path in PACKAGE.rglob("*.py") for word in re.findall(r"\w+", path.read_text())}


def test_the_table_of_layers_has_each_module():
    table = re.search(r"^layer \| modules.*?\n\n", ARCHITECTURE.read_text(), re.MULTILINE | re.DOTALL)
    assert table is not None
    modules = [name for row in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[1])]
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(modules) == sorted(there)
