"""The short forms of the chaos scenarios (``make chaos`` runs the long ones): what they assert is in ``chaos/``.

They mostly wait, for somebody to be given up or to come back; so several run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from chaos.figures import Figure, merged
from chaos.scenarios import SCENARIOS

AT_ONCE = 3
NAMES = [name for name, scenario in SCENARIOS.items() if not scenario.system]
Runs = dict[str, Future[list[Figure]]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    chosen = [item.callspec.params["name"] for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(SCENARIOS[name].run, **SCENARIOS[name].short) for name in chosen}


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario(runs: Runs, name: str):
    figures = runs[name].result()
    assert all(figure.samples for figure in figures), "something was not measured"


def test_figures_are_what_they_say():
    few = Figure("few", "s", [3.0, 1.0, 2.0], 2.5)
    many = Figure("many", "s", [float(number) for number in range(1, 201)], 198, "p99")
    assert (few.median, few.p99, few.worst, few.met) == (2.0, 3.0, 3.0, False)
    assert (many.median, many.p99, many.worst, many.met) == (100.5, 198.0, 200.0, True)
    assert merged([[few], [Figure("few", "s", [9.0], 2.5)]]) == [Figure("few", "s", [3.0, 1.0, 2.0, 9.0], 2.5)]
