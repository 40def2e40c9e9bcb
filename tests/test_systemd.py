"""The example units: what they start behaves as systemd wants it, and systemd itself finds nothing wrong with them."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Home, eventually

from zmqsched import Client
from zmqsched.config import find_cluster, role_file

pytestmark = pytest.mark.system

UNITS = Path(__file__).parent.parent / "examples" / "systemd"
CLUSTER, NODE = UNITS / "zmqsched.service", UNITS / "zmqsched-node.service"
INSTALLED = "%h/.local/bin/zmqsched"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    home = Home()
    monkeypatch.setenv("ZMQSCHED_DIR", str(home.path))
    yield home
    try:
        home.assert_nothing_left()
    finally:
        home.remove()


def service(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(path.read_text())
    assert parser["Install"]["WantedBy"] == "default.target"
    return dict(parser["Service"])


@contextlib.contextmanager
def started(path: Path, **values: Path) -> Iterator[subprocess.Popen[str]]:
    """As the service manager does: without a terminal, in a session of its own."""
    words = shlex.split(service(path)["ExecStart"].replace(INSTALLED, f"{sys.executable} -m zmqsched"))
    for name, value in values.items():
        words = [word.replace(name, str(value)) for word in words]
    assert "%" not in " ".join(words)
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            if path == CLUSTER:
                assert "cluster default is up" in process.stdout.readline()
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], path: Path) -> str:
    """With KillMode=mixed the first process alone is told; by the end of the time it has to have ended, well."""
    settings = service(path)
    assert settings["KillMode"] == "mixed"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out


def test_the_cluster_is_there_until_it_is_told_to_end(home: Home):
    with started(CLUSTER) as process:
        with Client() as client:
            assert client.submit(pow, 2, 5).result() == 32
        assert "cluster default is stopped (SIGTERM)" in end(process, CLUSTER)


def test_zmqsched_down_is_an_end_in_order_too(home: Home):
    with started(CLUSTER) as process:
        subprocess.run([sys.executable, "-m", "zmqsched", "down"], check=True, stdout=subprocess.DEVNULL, timeout=60)
        assert process.wait(60) == 0, "Restart=on-failure leaves it ended"
        process.communicate()


def test_the_node_joins_with_its_file_and_drains_when_it_is_told_to_end(home: Home, tmp_path: Path):
    with started(CLUSTER) as process:
        (tmp_path / ".config" / "zmqsched").mkdir(parents=True)
        file = tmp_path / ".config" / "zmqsched" / "node.json"
        shutil.copy(role_file(home.path / "default", "node"), file)
        assert file.stat().st_mode & 0o777 == 0o600
        with started(NODE, **{"%h": tmp_path}) as node, Client() as client:
            eventually(lambda: len([one for one in client.nodes() if one.state == "alive"]) == 2)
            end(node, NODE)
            eventually(lambda: [one.state for one in client.nodes() if one.pid == node.pid] == ["gone"])
        assert find_cluster().name == "default"
        end(process, CLUSTER)


@pytest.mark.system
@pytest.mark.parametrize("unit", [CLUSTER, NODE], ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze (Debian: systemd)")
    installed = tmp_path / "zmqsched"
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(INSTALLED, str(installed)))
    words = [program, "--user", "--man=no", "verify", str(copy)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    copy.write_text(copy.read_text().replace("KillMode=mixed", "KillMod=mixed\nExecStart=/none"))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "KillMod" in done.stderr, "the check itself works"
