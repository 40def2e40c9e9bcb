"""``zmqsched doctor``: each step is made to fail, here, and on the way to hosts by an ``ssh`` that stays here."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Home

from zmqsched import LocalCluster, doctor, hops
from zmqsched.__main__ import main
from zmqsched.config import ClusterLock
from zmqsched.doctor import Finding
from zmqsched.hops import Hop
from zmqsched.version import __version__

pytestmark = pytest.mark.system


def run(*words: str, code: int = 0) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["doctor", *words]) == code
    return out.getvalue()


def states(findings: list[Finding]) -> dict[str, str]:
    return {one.hop: one.state for one in findings}


def step(findings: list[Finding], hop: str) -> Finding:
    return next(one for one in findings if one.hop == hop)


# --- this machine ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_a_machine_that_works_has_no_failed_step():
    found = json.loads(run("-o", "json"))
    assert [one["hop"] for one in found] == [
        "python", "libraries", "directory", "shared memory", "open files", "processes", "CPUs", "memory", "encryption",
        "leftovers", "clusters",
    ]  # fmt: skip
    assert {one["state"] for one in found} <= {"ok", "slow"}
    assert {one["host"] for one in found} == {"here"}
    assert set(found[0]) == {"host", "hop", "state", "found", "fix"}


def test_a_directory_that_others_may_enter_is_the_step_that_fails_with_its_fix(home: Home):
    home.path.chmod(0o755)
    with pytest.raises(Exception, match="is open to other users"):  # the other steps need it
        list(doctor.look_here())
    found = list(doctor.look_at_host())
    assert step(found, "directory") == Finding(
        "directory", "failed", f"{home.path} is open to other users", f"run: chmod 700 {home.path}"
    )
    home.path.chmod(0o700)


def test_a_directory_too_deep_for_sockets_fails(home: Home, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZMQSCHED_DIR", str(home.path / ("deep" * 12)))
    found = step(list(doctor.look_at_host()), "directory")
    assert (found.state, found.fix) == ("failed", "set ZMQSCHED_DIR to a shorter path")


@pytest.mark.parametrize(
    ("files", "state", "said"),
    [
        (100_000, "ok", "100,000 at most"),
        (1024, "slow", "512 nodes at a broker, or 146 workers"),
        (128, "failed", "18 workers"),
    ],
)
def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch, files: int, state: str, said: str):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    found = doctor._open_files()
    assert found.state == state
    assert said in found.found
    assert ("LimitNOFILE" in found.fix) == (state != "ok")


def test_unlimited_is_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, resource.RLIM_INFINITY))
    assert doctor._limit(resource.RLIMIT_NOFILE) == math.inf
    assert doctor._open_files().found == doctor._processes().found == "unlimited"


def test_few_processes_are_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    assert doctor._processes().state == "slow"


def test_shared_memory_that_is_little_or_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor, "LITTLE_SHARED", 1 << 62)
    found = doctor._shared_memory()
    assert (found.state, "--shm-size" in found.fix) == ("slow", True)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert "cannot be written" in doctor._shared_memory().found


def test_encryption_is_measured_and_a_slow_one_has_its_fix(monkeypatch: pytest.MonkeyPatch):
    assert doctor.curve_mbs() > 1
    monkeypatch.setattr(doctor, "curve_mbs", lambda: 35.2)
    found = doctor._encryption()
    assert found.state == "slow"
    assert "CURVE 35 MB/s" in found.found
    assert "--no-binary pyzmq" in found.fix


def test_a_libzmq_without_curve_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zmq.has", lambda _: False)
    assert doctor._libraries().state == "failed"


@pytest.mark.usefixtures("home")
def test_cpus_tell_what_limits_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zmqsched.host.cgroup_cpus", lambda: 1.5)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert doctor._cpus().found.startswith(f"1 of {os.cpu_count()} may be used (affinity ")
    assert doctor._cpus().found.endswith("cgroup quota 1.5, SLURM_CPUS_PER_TASK 1)")


def test_leftovers_are_told(home: Home):
    ClusterLock.acquire("dead").release()
    left = step(list(doctor.look_here()), "leftovers")
    assert re.fullmatch(r"[1-9]\d* of dead clusters", left.found)  # other tests may be killing clusters right now
    assert (left.state, left.fix) == ("ok", "zmqsched clean")


@pytest.mark.usefixtures("home")
def test_clusters_are_asked_and_one_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch):
    with LocalCluster(1, name="alive") as cluster:
        assert step(list(doctor.look_here()), "cluster alive").found == "1 worker on 1 node"
        monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 0.3)
        os.kill(cluster.broker_pid, 19)
        try:
            out = run(code=1)
        finally:
            os.kill(cluster.broker_pid, 18)
    assert "cluster alive failed: zmqsched down alive" in out


# --- the way to a host, with an ssh that stays here ---------------------------------------------------------------------

SSH = """#!/bin/sh
case " $* " in *" -G "*) cat "$FAKE_SSH/settings"; exit "$(cat "$FAKE_SSH/code")";; esac
if [ -e "$FAKE_SSH/said" ]; then cat "$FAKE_SSH/said" >&2; exit 255; fi
for last; do :; done
echo "a login shell says something"
SSH_CONNECTION="$FAKE_CLIENT 1 127.0.0.1 22" exec sh -c "$last"
"""


class Ssh:
    """``settings`` are what ``ssh -G`` prints."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._patch = patch
        script = path / "ssh"
        script.write_text(SSH)
        script.chmod(0o755)
        patch.setenv("PATH", f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("FAKE_SSH", str(path))
        self.comes_from("127.0.0.1")
        self.port = socket.create_server(("127.0.0.1", 0))
        self.settings(hostname="127.0.0.1", port=self.port.getsockname()[1])

    def settings(self, code: int = 0, **settings: object) -> None:
        (self.path / "settings").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        (self.path / "code").write_text(str(code))

    def comes_from(self, address: str) -> None:
        self._patch.setenv("FAKE_CLIENT", address)

    def says(self, error: str) -> None:
        (self.path / "said").write_text(error)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home) -> Iterator[Ssh]:
    ssh = Ssh(tmp_path, monkeypatch)
    yield ssh
    ssh.port.close()


def walk(python: str = sys.executable) -> list[Finding]:
    return list(hops.look_at(Hop("there", (), python), None))


def last(findings: list[Finding]) -> Finding:
    assert "failed" not in {one.state for one in findings[:-1]}
    return findings[-1]


def test_a_good_way_is_walked_to_its_end_and_back(ssh: Ssh):
    found = walk()
    assert [one.hop for one in found] == [
        "resolve", "reach", "authenticate", "versions", "clock", "python", "libraries", "directory", "shared memory",
        "open files", "processes", "CPUs", "memory", "encryption", "way back",
    ]  # fmt: skip
    assert {one.state for one in found} <= {"ok", "slow"}
    assert step(found, "clock").found == "as here"
    assert step(found, "way back").found.startswith("reaches 127.0.0.1:")


def test_the_python_with_zmqsched_is_found_in_the_path(ssh: Ssh):
    assert f"({Path(sys.executable).parent}/python3)" in step(walk(python=""), "versions").found


def test_a_name_that_does_not_resolve(ssh: Ssh):
    ssh.settings(hostname="no-such-host.invalid", port=22)
    found = last(walk())
    assert (found.hop, found.state) == ("resolve", "failed")
    assert "no-such-host.invalid" in found.found
    assert "HostName" in found.fix


def test_a_wrong_configuration_of_ssh(ssh: Ssh):
    ssh.settings(255)
    assert (last(walk()).hop, last(walk()).state) == ("resolve", "failed")


def test_a_port_where_nobody_listens(ssh: Ssh):
    ssh.port.close()
    found = last(walk())
    assert (found.hop, found.state) == ("reach", "failed")
    assert "Connection refused" in found.found


def test_behind_a_jump_host_ssh_finds_the_way(ssh: Ssh):
    ssh.settings(hostname="inside.invalid", port=22, proxyjump="gate")
    found = walk()
    assert step(found, "resolve").found == "left to proxyjump gate"
    assert "reach" not in states(found)
    assert states(found)["way back"] == "ok"


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("me@there: Permission denied (publickey).", "ssh-copy-id there"),
        ("Host key verification failed.", "log in once by hand"),
    ],
)
def test_a_login_that_is_refused(ssh: Ssh, said: str, fix: str):
    ssh.says(said + "\n")
    found = last(walk())
    assert (found.hop, found.state, found.found) == ("authenticate", "failed", said)
    assert fix in found.fix


def test_no_python_there(ssh: Ssh):
    found = last(walk(python="/no/such/python3"))
    assert (found.hop, found.state, found.found) == ("versions", "failed", "no /no/such/python3 that works")


def fake_python(path: Path, **said: object) -> str:
    answer = {"python": sys.version.split()[0], "executable": "/x/python3", "client": "127.0.0.1", "time": 0.0, **said}
    script = path / "python3"
    script.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"python": "3.6.8", "libraries": {}}, "tasks need Python 3"),
        ({"libraries": {}}, f"zmqsched {__version__} is needed, as here"),
        ({"libraries": {"zmqsched": "0.0.1"}}, f"zmqsched {__version__} is needed, as here"),
        ({"libraries": {"zmqsched": __version__, "pyzmq": "1"}}, "cloudpickle, msgspec not found"),
    ],
)
def test_other_versions_there(ssh: Ssh, tmp_path: Path, said: dict[str, object], why: str):
    found = last(walk(python=fake_python(tmp_path, **said)))
    assert (found.hop, found.state) == ("versions", "failed")
    assert why in found.found
    assert f"pip install zmqsched=={__version__}" in found.fix


def test_a_clock_that_is_off_is_told_and_fails_nothing():
    assert hops._clock(-3600.0) == Finding(
        "clock", "ok", "3,600 s behind the one here: no harm to tasks, but to who reads logs"
    )
    assert "ahead of" in hops._clock(5).found
    assert hops._clock(0.2).found == "as here"


def test_a_way_back_that_is_closed_is_slow_for_there_is_another(ssh: Ssh):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        where = f"127.0.0.1:{closed.getsockname()[1]}"
    found = doctor.reaches([f"tcp://{where}"])
    assert (found.state, found.found) == ("slow", f"does not reach the broker: tcp://{where} (connection refused)")
    assert "ssh -R" in found.fix
    ssh.comes_from("192.0.2.1")  # the address of some gate, which this machine cannot listen at
    assert last(walk()) == doctor.no_way_back("sees this machine as 192.0.2.1, which is no address of its own")


def test_with_a_cluster_it_is_its_broker_that_is_to_be_reached(ssh: Ssh, home: Home):
    with LocalCluster(1, name="far", listen="127.0.0.1") as cluster:
        where = next(address for address in cluster.file.addresses.work if address.startswith("tcp://"))
        found = list(hops.look_at(Hop("there", (), sys.executable), cluster.file))
        assert step(found, "way back").found == f"reaches {where.removeprefix('tcp://')} directly"


def test_the_command_looks_at_all_hosts_and_names_the_first_step_that_fails(ssh: Ssh):
    ssh.says("Permission denied (publickey).\n")
    out = run("one,gpu[1-2]", "-o", "json", code=1)
    found = json.loads(out)
    assert {one["host"] for one in found} == {"one", "gpu1", "gpu2"}
    assert [one["hop"] for one in found if one["host"] == "gpu2"] == ["resolve", "reach", "authenticate"]
    assert "authenticate failed: it takes none of your keys" in run("one", code=1)


def test_hosts_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "a[1-"]) == 2
    assert "a[1-" in capsys.readouterr().err


def test_each_step_that_is_not_ok_has_a_fix(ssh: Ssh, monkeypatch: pytest.MonkeyPatch):
    steps: list[Callable[[], Finding]] = [doctor._open_files, doctor._processes, doctor._shared_memory, doctor._encryption]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    monkeypatch.setattr(doctor, "LITTLE_SHARED", 1 << 62)
    monkeypatch.setattr(doctor, "curve_mbs", lambda: 1.0)
    assert all(one().fix and one().state != "ok" for one in steps)
