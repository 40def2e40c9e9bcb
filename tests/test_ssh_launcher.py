"""Nodes by ``ssh`` where there is none: a stand-in runs on this host what it would run on another. What a real sshd shows is
in ``system/test_ssh.py``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Home, alive, children, eventually, processes_knowing

from zmqsched import Client, LocalCluster, SSHCluster
from zmqsched.clusterfile import NodeGroup
from zmqsched.config import CONNECTION_FILE, cluster_dir
from zmqsched.control import ask
from zmqsched.errors import StartError
from zmqsched.launch import remote
from zmqsched.launch.base import Site
from zmqsched.launch.ssh import SSHLauncher

pytestmark = pytest.mark.system

SHELLS = [shell for shell in ("sh", "bash", "csh", "tcsh", "fish", "zsh", "dash") if shutil.which(shell)]
# What a shell must not touch. A newline at its end would be lost, as it is in any shell's $(...).
NASTY = "it's \"so\" $HOME `id` !! !x \\n \\\\ %s %% \t{a,b} *\n  second line; ~ #"


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clusters: Home) -> Path:
    """A directory. While its file ``words`` exists, that is said and nobody is reached; with ``words-HOST`` that one is not.
    With ``hangs-HOST`` nothing comes of it. ``hosts`` has who was asked."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ssh"
    script.write_text(f"""#!/bin/sh
for word; do host=$command; command=$word; done
echo "$host" >> {tmp_path}/hosts
for words in {tmp_path}/words {tmp_path}/words-$host; do
    if [ -e $words ]; then cat $words >&2; exit 255; fi
done
if [ -e {tmp_path}/hangs-$host ]; then exec sleep 600; fi
exec sh -c "$command"
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def one_line() -> str:
    return f"exec 3<&0; printf %s {remote.quote(NASTY)}; cat <&3"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_arrives_whole_in_whatever_shell_one_logs_in_to(shell):
    script = f"\n\nif true; then\n  {one_line()}\nfi\n\n"
    done = subprocess.run(
        [shell, "-c", remote.COMMAND],
        input=remote.line(script) + b'{"a": 1}\nrest',
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.decode() == NASTY + '{"a": 1}\nrest'
    assert done.stderr == b""


def test_a_cluster_of_hosts(fake_ssh, monkeypatch):
    monkeypatch.setenv("HOME", str(home := fake_ssh / "it's home"))
    (home / "a b").mkdir(parents=True)
    (home / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "python").chmod(0o755)
    options = {"python": "~/python", "cwd": "~/a b", "prologue": ["test \"$PWD\" = \"$HOME/a b\" || exit 7", "cd ~"]}
    with SSHCluster(["alpha", "beta"], slots=1, listen="", **options) as cluster, Client(cluster) as client:
        assert [(one.label, one.state, one.where) for one in cluster.nodes()] == [
            ("ssh-1", "running", "alpha"),
            ("ssh-2", "running", "beta"),
        ]
        assert client.submit(pow, 2, 10).result(timeout=60) == 1024
        assert sorted((fake_ssh / "hosts").read_text().split()) == ["alpha", "beta"]
        pids = [node.pid for node in client.nodes()]
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", r"ssh-keygen -R alpha"),
        ("Host key verification failed.", r"log in once by hand \(ssh alpha\)"),
        ("u@alpha: Permission denied (publickey).", "ssh-copy-id alpha"),
        ("ssh: Could not resolve hostname alpha: Name or service not known", "no such host"),
        ("ssh: connect to host alpha port 22: Connection refused", "no sshd answers there"),
        ("ssh: connect to host alpha port 22: Connection timed out", "does a firewall let port 22 through"),
    ],
)
def test_what_ssh_says_is_said_with_what_to_do(words, fix, fake_ssh):
    (fake_ssh / "words").write_text(words)
    with pytest.raises(StartError, match=fix) as caught:
        SSHCluster("alpha", python=sys.executable, listen="")
    assert words in str(caught.value)
    assert "ssh-1 (alpha): alpha: exit code 255" in str(caught.value)


def test_a_host_that_fails_is_told_of_at_once_while_another_hangs(fake_ssh, caplog):
    """In the log, and to whoever asks; and once there is one node, the cluster can go on without the other."""
    (fake_ssh / "words-alpha").write_text("Permission denied (publickey).")
    (fake_ssh / "hangs-beta").touch()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(SSHCluster, ["alpha", "beta"], slots=1, name="lab", python=sys.executable, listen="")
        eventually(lambda: "node ssh-1 (alpha) of cluster lab ended: alpha: exit code 255" in caplog.text)
        nodes = ask("lab", {"do": "nodes"})["nodes"]
        assert [(one["label"], one["state"]) for one in nodes] == [("ssh-1", "ended"), ("ssh-2", "starting")]
        assert "Permission denied (publickey)" in nodes[0]["why"]
        assert not started.done()
        hanging = eventually(lambda: [pid for pid, command in children().items() if command == "sleep 600"])
        os.kill(hanging[0], signal.SIGKILL)
        with pytest.raises(StartError, match="killed by SIGKILL") as caught:
            started.result(timeout=40)
        assert "Permission denied (publickey)" in str(caught.value)
    assert caplog.text.count("killed by SIGKILL") == 0  # the exception says it


def test_what_cannot_do_without_a_host_fails_with_it_while_another_hangs(fake_ssh, caplog, monkeypatch):
    monkeypatch.setattr("zmqsched.cluster.ELSEWHERE_TIMEOUT_S", 6000.0)  # nobody waits for it
    (fake_ssh / "words-alpha").write_text("Permission denied (publickey).")
    (fake_ssh / "hangs-beta").touch()
    with pytest.raises(StartError, match="Permission denied"):
        SSHCluster(["alpha", "beta"], slots=1, python=sys.executable, listen="", min_nodes=2)
    assert not caplog.records
    with pytest.raises(ValueError, match="min_nodes must be between 0 and 1, not 2"):
        SSHCluster(["alpha"], min_nodes=2)


def test_who_is_busy_is_asked_again_and_in_the_end_not_any_more(fake_ssh, monkeypatch):
    monkeypatch.setattr("zmqsched.launch.ssh.uniform", lambda least, most: 0.0)
    (fake_ssh / "words").write_text("kex_exchange_identification: Connection closed by remote host")
    with pytest.raises(StartError, match="kex_exchange_identification"):
        SSHCluster("alpha", python=sys.executable, listen="")
    assert (fake_ssh / "hosts").read_text().split() == ["alpha"] * 6


def test_what_is_left_of_a_node_is_found_by_its_mark_and_nothing_else_is_touched(tmp_path):
    """Also what has left its session, and what does not listen to signals; the ends of its ways back, too."""
    mark = {remote.MARK: "f00d"}
    stubborn = "trap '' TERM HUP; while :; do sleep 0.1; done"
    started = [
        subprocess.Popen(["sh", "-c", stubborn], env={**os.environ, **environment}, start_new_session=True)
        for environment in (mark, mark, {remote.MARK: "beef"}, {})
    ]
    ends = [Path(remote.tunnel_path(token, role)) for token in ("f00d", "beef") for role in remote.ROLES]
    try:
        for end in ends:
            end.touch()
        script = remote.line(remote.sweep_script([("f00d", started[0].pid), ("dead", 0)]))
        subprocess.run(["sh", "-c", remote.COMMAND], input=script, timeout=60, check=True)
        assert [process.poll() for process in started] == [-9, -9, None, None]
        assert [end.exists() for end in ends] == [False, False, True, True]
    finally:
        for process in started:
            process.kill()
            process.wait()
        for end in ends:
            end.unlink(missing_ok=True)


def test_a_node_is_killed_before_its_nursery_which_knows_what_its_tasks_have_started(tmp_path):
    order = tmp_path / "order"
    alone = "while kill -0 $NODE 2>/dev/null; do sleep 0.05; done"
    watch = f"trap 'echo nursery >> {order}' EXIT; {alone}; echo node >> {order}"
    environment = {**os.environ, remote.MARK: "cafe"}
    node = subprocess.Popen(["sleep", "600"], env=environment)
    nursery = subprocess.Popen(["sh", "-c", watch], env={**environment, "NODE": str(node.pid)})
    try:
        sweeper = subprocess.Popen(["sh", "-c", remote.COMMAND], stdin=subprocess.PIPE)
        sweeper.stdin.write(remote.line(remote.sweep_script([("cafe", node.pid)])))
        sweeper.stdin.close()
        assert node.wait(timeout=60) == -9
        assert nursery.wait(timeout=60) == 0  # by itself
        assert sweeper.wait(timeout=60) == 0
        assert order.read_text().split() == ["node", "nursery"]
    finally:
        for process in (node, nursery):
            process.kill()
            process.wait()


def test_a_host_that_answers_but_does_nothing_is_not_taken_for_clean(fake_ssh, tmp_path, monkeypatch):
    """As one whose disk hangs."""
    monkeypatch.setattr("zmqsched.launch.ssh.SWEEP_TIMEOUT_S", 0.5)
    group = NodeGroup(name="g", launcher="ssh", hosts=("alpha",), python=sys.executable, prologue=("sleep 600",))
    with LocalCluster(1, listen="") as cluster:
        directory = cluster_dir(cluster.name)
        launcher = SSHLauncher(group, Site(directory / CONNECTION_FILE, directory))
        launcher.start(["g-1"])
        eventually(lambda: launcher._children["g-1"].spoke)
        mark = Path(launcher._remotes["g-1"].token)
        eventually(lambda: processes_knowing(mark))
        script = fake_ssh / "bin" / "ssh"
        works = script.read_text()
        script.write_text("#!/bin/sh\nexec sleep 600\n")
        with pytest.raises(StartError, match=r"nodes may be left on alpha \(no answer in 0\.5 s\)"):
            launcher.close()
        script.write_text(works)
        launcher.close()
        assert not processes_knowing(mark)
