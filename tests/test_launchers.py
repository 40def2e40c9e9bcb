"""Launchers by name: those of this package, and those of others by their entry points, as the example's."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from conftest import Scripts

from zmqsched.clusterfile import BatchPart, NodeGroup
from zmqsched.errors import StartError
from zmqsched.launch import ENTRY_POINTS, LAUNCHERS, find_launcher, launcher_names
from zmqsched.launch.base import Launcher, Site, node_command
from zmqsched.launch.local import LocalLauncher
from zmqsched.launch.reach import own_addresses

EXAMPLE = Path(__file__).parent.parent / "examples" / "launcher_plugin"


def install(directory: Path, name: str, points: dict[str, str]) -> None:
    """What an installer leaves behind of a package."""
    metadata = directory / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{point} = {value}" for point, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of others, of which none works."""
    (tmp_path / "zmqsched_bad.py").write_text("import no_such_library\n")
    (tmp_path / "zmqsched_odd.py").write_text("class Odd: pass\n")
    points = {"bad": "zmqsched_bad:Launcher", "odd": "zmqsched_odd:Odd", "gone": "zmqsched_odd:Launcher"}
    install(tmp_path, "zmqsched-others", points)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_each_of_ours_is_found_by_its_name(name: str):
    assert issubclass(find_launcher(name), Launcher)
    assert LAUNCHERS[name].startswith("zmqsched.launch.")


def test_ours_are_loaded_when_they_are_wanted():
    program = """
import sys
from zmqsched.launch import find_launcher
assert not [name for name in sys.modules if name.startswith("zmqsched.launch.")]
find_launcher("local")
assert "zmqsched.launch.ssh" not in sys.modules
assert "importlib.metadata" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_one_that_is_not_there_is_told_with_those_that_are(others: Path):
    with pytest.raises(ValueError, match=r"no launcher 'nice'; there are bad, gone, local, odd, pbs, sge, slurm, ssh$"):
        find_launcher("nice")
    assert "odd" in launcher_names()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bad", r"launcher 'bad' \(zmqsched_bad:Launcher of zmqsched-others\) cannot be imported: ModuleNotFoundError"),
        ("gone", r"launcher 'gone' .* cannot be imported: AttributeError"),
        ("odd", r"launcher 'odd' .* is not a subclass of zmqsched\.launch\.base\.Launcher"),
    ],
)
def test_another_packages_that_cannot_be_used_is_told(others: Path, name: str, says: str):
    with pytest.raises(StartError, match=says):
        find_launcher(name)


def test_what_a_node_offers_is_said_to_the_last_digit():
    group = NodeGroup(resources={"disk": 8_589_934_593.0, "share": 0.1 + 0.2}, memory_limit=123_456_789)
    words = node_command(group, "a-1", "-", "python")
    assert {"--resource=disk=8589934593.0", "--resource=share=0.30000000000000004", "--memory-limit=123456789"} <= set(words)


def test_ours_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, "zmqsched-greedy", {"local": "zmqsched_greedy:Launcher"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_launcher("local") is LocalLauncher


def test_the_example_is_found_by_its_entry_point_and_its_nodes_are_nice(tmp_path: Path, scripts: Scripts):
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(tmp_path, project["name"], project["entry-points"][ENTRY_POINTS])
    program = f"""
        import os
        from zmqsched import Client, Cluster
        with Cluster.from_file({str(EXAMPLE / "cluster.toml")!r}) as cluster, Client(cluster) as client:
            cluster.wait_for_nodes(2, 30)
            print(client.submit(os.nice, 0).result(), sorted(node.label for node in client.nodes()), cluster.failures)
    """
    path = os.pathsep.join([str(tmp_path), str(EXAMPLE), *filter(None, sys.path)])
    out, err = scripts.run(program, PYTHONPATH=path)
    assert (out, err) == (f"{min(19, os.nice(0) + 15)} ['nice-1', 'nice-2'] []\n", "")


def test_the_examples_preview_is_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    kind = import_module("zmqsched_nice").NiceLauncher
    group = NodeGroup(launcher="nice", python="python3", batch=BatchPart(options=("-n", "5")))
    launcher = kind(group, Site(tmp_path, tmp_path))
    (line,) = launcher.preview(["nice-1"])
    assert line.startswith("nice -n 5 python3 -m zmqsched node --connect=- --label=nice-1")
    launcher.close()


def test_the_addresses_of_this_host_are_those_on_the_way_to_the_others():
    assert own_addresses(["127.0.0.1"]) == ["127.0.0.1"]
    assert own_addresses(["me@localhost", "127.0.0.9"]) == ["127.0.0.1"]
    elsewhere = own_addresses()
    assert own_addresses(["no.such.host.invalid"]) == elsewhere
    assert own_addresses(["127.0.0.1", "no.such.host.invalid"]) == elsewhere
