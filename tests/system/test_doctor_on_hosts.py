"""``zmqsched doctor`` on the way to hosts that a real sshd serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import sshd
from conftest import Home
from sshd import Hosts

pytestmark = sshd.MARKS


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with sshd.checked_hosts() as hosts:
        yield hosts


def doctor(hosts: Hosts, home: Home, *names: str, code: int = 0) -> dict[str, dict[str, tuple[str, str, str]]]:
    """By host and step: state, what was found, and what to do."""
    words = [sys.executable, "-m", "zmqsched", "doctor", "-o", "json", f"--python={sys.executable}", *names]
    words += ["--ssh-option=-F", f"--ssh-option={hosts.config}"]
    done = subprocess.run(
        [*hosts.on(), *words], env={**os.environ, "ZMQSCHED_DIR": str(home.path)}, capture_output=True, text=True,
        timeout=90, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    found: dict[str, dict[str, tuple[str, str, str]]] = {name: {} for name in names}
    for one in json.loads(done.stdout):
        found[one["host"]][one["hop"]] = one["state"], one["found"], one["fix"]
    return found


def test_hosts_are_walked_to_and_back_and_a_firewall_only_makes_them_slow(hosts: Hosts, clusters: Home):
    hosts.add("open", apart=True)
    walled = hosts.add("walled", apart=True)
    with walled.firewall():
        found = doctor(hosts, clusters, "open", "walled")
    for host in found.values():
        assert list(host)[:5] == ["resolve", "reach", "authenticate", "versions", "clock"]
        assert "failed" not in {state for state, _, _ in host.values()}
    state, what, _ = found["open"]["way back"]
    assert (state, what.startswith(f"reaches {sshd.HERE}:")) == ("ok", True)
    state, what, fix = found["walled"]["way back"]
    assert (state, f"tcp://{sshd.HERE}:" in what, "ssh -R" in fix) == ("slow", True, True)


def test_the_first_hop_that_fails_is_named(hosts: Hosts, clusters: Home):
    down = hosts.add("down")
    down.end()
    changed = hosts.add("changed")
    stranger = hosts.add("stranger", shell="false #")
    hosts.knows(changed, hosts.keygen("another"))
    found = doctor(hosts, clusters, "down", "changed", "stranger", "no-such-host.invalid", code=1)
    last = {name: (*list(steps.items())[-1][1], list(steps)[-1]) for name, steps in found.items()}
    assert last["down"][0::3] == ("failed", "reach")
    assert last["changed"][0::3] == ("failed", "authenticate")
    assert "ssh-keygen -R changed" in last["changed"][2]
    assert last["stranger"][0::3] == ("failed", "versions")
    assert last["no-such-host.invalid"][0::3] == ("failed", "resolve")
    assert stranger.processes() == {}
