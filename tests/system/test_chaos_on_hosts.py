"""The short forms of the chaos scenarios that need root or system packages (Debian: iproute2, nftables, libfaketime)."""

import pytest
from chaos.scenarios import SCENARIOS

pytestmark = pytest.mark.system


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.system])
def test_a_scenario(name):
    scenario = SCENARIOS[name]
    if why_not := scenario.why_not():
        pytest.skip(why_not)
    assert all(figure.samples for figure in scenario.run(**scenario.short))
