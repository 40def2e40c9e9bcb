"""The simulator's own proof: it finds each bug that ``mutants.py`` plants in the cores."""

import pytest
from mutants import MUTANTS, NEAR, NOTHING, WITHIN, Mutant, planted, search


@pytest.mark.timeout(300)  # as a rule a second; a bug that is hardly found any more takes long
@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulator_finds(name):
    seed, what = search(name)
    print(f"{name}: found at seed {seed} of {WITHIN}: {what}")


@pytest.mark.parametrize("text", ["this is not there", "self.placement.enqueue(task)"])
def test_a_bug_that_cannot_be_planted_is_an_error(text):
    with pytest.raises(LookupError, match="times, not once"):
        planted(Mutant("book", ((text, "pass"),)))


def test_those_that_are_hardly_found_are_there():
    assert NEAR.keys() < MUTANTS.keys()


def test_without_a_bug_none_is_found():
    with pytest.raises(AssertionError, match="not found within 5 seeds"):
        search(NOTHING, within=5)
