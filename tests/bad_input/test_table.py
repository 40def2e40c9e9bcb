"""docs/bad-input.md tells of each of the 64 cases, and the test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
FILES = {"W": "test_wire.py", "A": "test_authenticated.py", "P": "test_api.py", "J": "test_journal_files.py"}


def rows() -> dict[int, str]:
    """The last column by case."""
    page = (HERE.parent.parent / "docs" / "bad-input.md").read_text()
    found = re.findall(r"^(\d+(?:, \d+)*) \|.*\|([^|\n]*)$", page, re.MULTILINE)
    return {int(number): tests.strip() for numbers, tests in found for number in numbers.split(", ")}


def numbered(name: str) -> set[int]:
    """The cases that the tests of a file have in their names."""
    names = re.findall(r"^def test((?:_\d\d)+)_", (HERE / name).read_text(), re.MULTILINE)
    return {int(number) for group in names for number in group.strip("_").split("_")}


def test_each_case_is_told_of_and_has_the_tests_that_are_named():
    told = rows()
    assert list(told) == list(range(1, 65))
    there = {letter: numbered(name) for letter, name in FILES.items()}
    missing = {
        case: tests
        for case, tests in told.items()
        if any(case not in there[letter] for letter in FILES if letter in tests.split(", "))
    }
    assert missing == {}
    assert set().union(*there.values()) | {57} == set(told)
    for tests in told.values():
        for path in re.findall(r"`(tests/[\w/]+\.py)`", tests):
            assert (HERE.parent.parent / path).exists()
