"""Nodes on hosts that a real sshd serves: on ports of this machine, or in network namespaces with their own addresses."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import sshd
from conftest import PATIENCE_S, Home, alive, eventually
from sshd import HERE, Hosts

from zmqsched import Client, LocalCluster
from zmqsched.clusterfile import NodeGroup
from zmqsched.config import CONNECTION_FILE, cluster_dir
from zmqsched.errors import StartError
from zmqsched.launch import remote
from zmqsched.launch.base import Launched, Site
from zmqsched.launch.ssh import SSHLauncher

pytestmark = sshd.MARKS


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with sshd.checked_hosts() as hosts:
        yield hosts


class Here:
    """A broker where the hosts can be reached, and what launchers are to know of it."""

    def __init__(self, hosts: Hosts, home: Home, listen: str) -> None:
        self._hosts = hosts
        command = ["broker", "--name=lab", f"--listen={listen}", "--until-eof", "--ready-fd=1"]
        self._broker = subprocess.Popen(
            [*hosts.on(), sys.executable, "-m", "zmqsched", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        facts = json.loads(self._broker.stdout.readline())
        self.path = Path(facts["file"])
        self.site = Site(self.path, self.path.parent)
        self.client = Client(self.path)
        self._launchers: list[SSHLauncher] = []

    def launcher(self, *names: str, **group: object) -> SSHLauncher:
        options = {"slots": 1, "python": sys.executable, "ssh_options": self._hosts.options} | group
        made = SSHLauncher(NodeGroup(name="g", launcher="ssh", hosts=names, **options), self.site)
        self._launchers.append(made)
        return made

    def sockets(self, launcher: SSHLauncher) -> list[Path]:
        """The ends there of all ways back to the broker."""
        return [
            Path(remote.tunnel_path(there.token, role)) for there in launcher._remotes.values() for role in remote.ROLES
        ]

    def log(self, label: str) -> str:
        return self.site.log_path(label).read_text()

    def close(self) -> None:
        self.client.shutdown(wait=False, cancel_futures=True)
        for launcher in self._launchers:
            launcher.close()
        with self._broker:
            self._broker.stdin.close()
            assert self._broker.wait(timeout=PATIENCE_S) == 0


@contextlib.contextmanager
def broker(hosts: Hosts, home: Home, listen: str = "") -> Iterator[Here]:
    with hosts.inside() if hosts.here else contextlib.nullcontext():
        here = Here(hosts, home, listen)
        try:
            yield here
        finally:
            here.close()


def one(launcher: SSHLauncher, label: str = "g-1") -> Launched:
    return next(found for found in launcher.poll() if found.label == label)


def states(launcher: SSHLauncher) -> dict[str, str]:
    return {found.label: found.state for found in launcher.poll()}


def all_run(launcher: SSHLauncher) -> bool:
    found = launcher.poll()
    assert not [each.why for each in found if each.why]
    return all(each.state == "running" for each in found)


def where() -> str:
    return os.uname().nodename


def test_nodes_on_several_hosts(hosts, clusters):
    names = ["alpha", "beta"]
    for name in names:
        hosts.add(name)
    with broker(hosts, clusters) as here:
        launcher = here.launcher(*names)
        launcher.start(["g-1", "g-2", "g-3"])
        assert set(states(launcher).values()) <= {"starting", "running"}
        eventually(lambda: all_run(launcher))
        # The broker listens on loopback alone, which on another host would be another's.
        assert [found.where for found in launcher.poll()] == [
            f"{name}, back through ssh -R" for name in ("alpha", "beta", "alpha")
        ]
        assert {found.label: found.node for found in launcher.poll()} == {n.label: n.id for n in here.client.nodes()}
        ran = {here.client.submit(where).result(timeout=60) for _ in range(20)}
        assert ran <= set(names)
        launcher.stop(["g-2"])
        assert hosts.hosts[1].processes() == {}
        eventually(lambda: [node.state for node in here.client.nodes() if node.label == "g-2"] == ["gone"])  # not lost
        assert states(launcher) == {"g-1": "running", "g-3": "running"}
        launcher.close()
        assert hosts.hosts[0].processes() == {}


NASTY = "it's \"so\" $HOME `id` !! \\n %s\n  second line\n"


@pytest.mark.parametrize("shell", ["", "tcsh"])
def test_what_the_group_says_arrives_as_it_is_whatever_the_login_shell(shell, hosts, clusters, tmp_path):
    hosts.add("alpha", shell=shell)
    (there := tmp_path / "it's a \"place\"").mkdir()
    with broker(hosts, clusters) as here:
        launcher = here.launcher(
            "alpha",
            env={"NASTY": NASTY, "EMPTY": ""},
            cwd=str(there),
            tags=("a tag's",),
            resources={"big disk": 2.0},
            prologue=("read -r mine || echo nothing to read", "echo '{\"node\": \"forged\"}'", 'export LATER="$NASTY"'),
        )
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        assert one(launcher).node == "n1"

        def look() -> tuple[object, ...]:
            return os.environ["NASTY"], os.environ["LATER"], os.environ["EMPTY"], os.getcwd()

        view = here.client.options(tags=["a tag's"], resources={"big disk": 1})
        assert view.submit(look).result(timeout=60) == (NASTY, NASTY, "", str(there))
        assert "nothing to read" in here.log("g-1")
        assert "forged" in here.log("g-1")


def test_nothing_secret_is_on_a_command_line_in_an_environment_or_a_log(hosts, clusters):
    hosts.add("alpha")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha", env={"PASSWORD": "sesame"})
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        secret = here.site.file.client_secret.encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                assert secret not in command + environment
                assert b"sesame" not in command
        assert secret.decode() not in here.log("g-1") + hosts.hosts[0].log()


def test_the_first_python3_that_fits_is_taken(hosts, clusters, tmp_path):
    hosts.add("alpha")
    other = tmp_path / "bin"
    other.mkdir()
    (other / "python3").write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -I "$@"\n')  # has no zmqsched
    (other / "python3").chmod(0o755)
    with broker(hosts, clusters) as here:
        path = f"PATH={shlex.quote(str(other))}:{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        launcher = here.launcher("alpha", python="", prologue=(path,))
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        taken = here.client.submit(lambda: __import__("sys").executable).result(timeout=60)
        assert Path(taken).parent == Path(sys.executable).parent
        assert "No module named 'zmqsched'" in here.log("g-1")


# What goes wrong is said within seconds, with the host's name, ssh's own words, and what to do.


def failure(here: Here, launcher: SSHLauncher) -> str:
    launcher.start(["g-1"])
    ended = eventually(lambda: (found := one(launcher)).state == "ended" and found)
    assert ended.why.startswith("alpha: ")
    return ended.why


def test_a_host_with_another_key(hosts, clusters):
    alpha = hosts.add("alpha")
    hosts.knows(alpha, hosts.keygen("another"))
    with broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha"))
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in why
        assert why.endswith("forget the old one (ssh-keygen -R alpha)")


def test_a_host_that_is_not_known(hosts, clusters):
    hosts.add("alpha")
    (hosts.directory / "known_hosts").write_text("")
    with broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha"))
        assert "Host key verification failed" in why
        assert "log in once by hand (ssh alpha)" in why


def test_a_key_that_is_not_taken(hosts, clusters):
    hosts.add("alpha")
    hosts.key.with_suffix(".pub").write_text("")
    with broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha"))
        assert "Permission denied (publickey)" in why
        assert "ssh-copy-id alpha" in why


def test_a_name_that_does_not_exist(hosts, clusters):
    hosts.add("beta")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha", ssh_options=(*hosts.options, "-o", "HostName=alpha.invalid"))
        why = failure(here, launcher)
        assert "Could not resolve hostname alpha.invalid" in why
        assert "no such host" in why


def test_a_host_without_sshd(hosts, clusters):
    hosts.add("alpha").end()
    with broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha"))
        assert "Connection refused" in why
        assert "no sshd answers there" in why


def test_a_host_that_is_down(hosts, clusters):
    alpha = hosts.add("alpha", apart=True)
    with broker(hosts, clusters) as here, alpha.cut_off():
        launcher = here.launcher("alpha", ssh_options=hosts.options[:2])
        why = failure(here, launcher)
        assert "timed out" in why or "No route to host" in why
        assert "is it up" in why
        launcher.close()  # nothing was started there, so nothing is looked for


def test_a_host_that_takes_connections_and_says_nothing(hosts, clusters):
    with hosts.add("alpha").frozen(), broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha", ssh_options=hosts.options[:2]))
        assert "timed out during banner exchange" in why
        assert why.endswith("its sshd is slow: give it longer (ssh_options: -o ConnectTimeout=20)")


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"python": "/nowhere/python3"}, ["/nowhere/python3 is not a Python 3.", "not found", "pip install zmqsched=="]),
        ({"python": "", "prologue": ("PATH=/usr/bin:/bin",)}, ["no python3 of its PATH", "No module named 'zmqsched'"]),
        ({"env": {"PYTHONPATH": "{other}"}}, ["has zmqsched 99.0", "pip install zmqsched=="]),
        ({"cwd": "/no/where"}, ["there is no directory /no/where (cwd)"]),
        ({"prologue": ("exit 7",)}, ["exit code 7"]),
        ({"prologue": ("if then",)}, ["yntax error"]),
    ],
    ids=["no python", "no zmqsched", "another zmqsched", "no directory", "prologue ends", "prologue is wrong"],
)
def test_a_host_where_no_node_can_run(group, says, hosts, clusters, tmp_path):
    other = tmp_path / "zmqsched"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "version.py").write_text("__version__ = '99.0'")
    group = {**group, "env": {name: value.format(other=tmp_path) for name, value in group.get("env", {}).items()}}
    hosts.add("alpha")
    with broker(hosts, clusters) as here:
        why = failure(here, here.launcher("alpha", **group))
        for words in says:
            assert words in why


def test_a_host_with_another_python(hosts, clusters):
    hosts.add("alpha")
    with broker(hosts, clusters) as here:
        told = msgspec.structs.replace(here.site.file, python="3.99.1")
        told.write(other := here.site.directory / "other.json")
        launcher = SSHLauncher(here.launcher("alpha").group, Site(other, here.site.directory))
        why = failure(here, launcher)
        launcher.close()
        assert f"{sys.executable}: is Python 3.{sys.version_info[1]}" in why
        assert "python3.99 -m pip install zmqsched" in why


def test_without_ssh_or_tcp_nothing_is_started(hosts, clusters, monkeypatch):
    hosts.add("alpha")
    with broker(hosts, clusters) as here:
        with LocalCluster(1) as plain:
            site = Site(cluster_dir(plain.name) / CONNECTION_FILE, here.site.directory)
            with pytest.raises(StartError, match="has Unix sockets only"):
                SSHLauncher(here.launcher("alpha").group, site).start(["g-1"])
        launcher = here.launcher("alpha")
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(StartError, match="cannot start 'ssh'"):
            launcher.start(["g-1"])


# The way to the broker.


def nested(numbers: list[int]) -> int:
    from zmqsched import get_client

    return sum(get_client().map(abs, numbers))


def test_a_node_that_can_reach_the_broker_does_not_take_the_way_back(hosts, clusters, caplog):
    hosts.add("alpha", apart=True)
    with broker(hosts, clusters, HERE) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        assert one(launcher).where == "alpha"
        eventually(lambda: f"its broker at tcp://{HERE}:" in here.log("g-1"))  # said when its workers are ready, too
        assert here.client.submit(where).result(timeout=60) == "alpha"
        assert not caplog.records


def test_where_only_port_22_passes_the_connection_goes_back_through_it(hosts, clusters, caplog):
    """Also that of tasks which are clients, and of large results. The way back is this user's alone."""
    alpha = hosts.add("alpha", apart=True)
    with broker(hosts, clusters, HERE) as here, alpha.firewall():
        launcher = here.launcher("alpha", slots=2)
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        assert one(launcher).where == "alpha, back through ssh -R"
        assert [record.getMessage() for record in caplog.records] == [
            "g-1 on alpha reaches the broker through ssh only, which is slower"
        ]
        for path in here.sockets(launcher):
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert here.client.submit(where).result(timeout=60) == "alpha"
        assert here.client.submit(bytes, 8_000_000).result(timeout=60) == bytes(8_000_000)
        assert here.client.submit(nested, [-1, 2, -3]).result(timeout=60) == 6
        assert [node.state for node in here.client.nodes()] == ["alive"]


def test_where_ssh_may_not_forward_either_it_is_said(hosts, clusters):
    alpha = hosts.add("alpha", apart=True, options={"AllowStreamLocalForwarding": "no"})
    with broker(hosts, clusters, HERE) as here, alpha.firewall():
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        why = eventually(lambda: (found := one(launcher)).state == "ended" and found.why)
        assert f"tcp://{HERE}:" in why
        assert "remote port forwarding failed" in why
        assert "AllowStreamLocalForwarding" in why


def test_a_way_back_that_others_could_use_is_not_taken(hosts, clusters):
    alpha = hosts.add("alpha", apart=True, options={"StreamLocalBindMask": "0111"})
    with broker(hosts, clusters, HERE) as here, alpha.firewall():
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        why = eventually(lambda: (found := one(launcher)).state == "ended" and found.why)
        assert "open to other users: StreamLocalBindMask in sshd_config" in why


# What breaks while nodes run.


def sleep_for(seconds: float) -> str:
    time.sleep(seconds)
    return os.uname().nodename


def test_a_host_that_is_cut_off_for_a_moment_comes_back_and_no_task_is_lost(hosts, clusters):
    alpha, beta = (hosts.add(name, apart=True) for name in ("alpha", "beta"))
    with broker(hosts, clusters, HERE) as here:
        launcher = here.launcher("alpha", "beta")
        launcher.start(["g-1", "g-2"])
        eventually(lambda: all_run(launcher))
        futures = [here.client.submit(sleep_for, 0.1) for _ in range(100)]
        eventually(lambda: futures[5].done())
        with alpha.cut_off():
            eventually(lambda: "lost" in {node.state for node in here.client.nodes()})
            done = sum(future.done() for future in futures)
            eventually(lambda: sum(future.done() for future in futures) > done or done == len(futures))  # at the other
        eventually(lambda: sum(node.state == "alive" for node in here.client.nodes()) == 2)
        assert {future.result(timeout=60) for future in futures} == {"alpha", "beta"}
        assert all_run(launcher)
        assert alpha.processes()
        assert beta.processes()


def test_a_host_that_stays_away_is_given_up_and_what_was_left_there_is_ended_first(hosts, clusters):
    """The connection of ssh breaks, so nobody looks after the node any more; it may be alive. The next one there ends it."""
    alpha, _ = (hosts.add(name, apart=True) for name in ("alpha", "beta"))
    quick = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    with broker(hosts, clusters, HERE) as here:
        launcher = here.launcher("alpha", "beta", ssh_options=(*hosts.options, *quick))
        launcher.start(["g-1", "g-2"])
        eventually(lambda: all_run(launcher))
        node = launcher._children["g-1"].facts["pid"]
        os.kill(node, signal.SIGSTOP)  # it cannot end by itself
        with alpha.cut_off():
            lost = eventually(lambda: (found := one(launcher)).why and found)
            assert (lost.state, lost.node) == ("starting", "")
            assert lost.why.startswith("alpha: exit code 255: ")
            assert f"Timeout, server {alpha.address} not responding" in lost.why
            assert lost.why.endswith("the connection broke; what ran there runs elsewhere")
            assert one(launcher, "g-2").state == "running"
            assert here.client.submit(where).result(timeout=60) == "beta"
        eventually(lambda: one(launcher).state == "running")
        assert not alive(node)
        assert one(launcher).where == "alpha"


def test_a_node_that_does_not_end_by_itself_is_ended_by_a_second_connection(hosts, clusters):
    alpha = hosts.add("alpha")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1", "g-2"])
        eventually(lambda: all_run(launcher))
        future = here.client.options(requeue=False).submit(sleep_for, 600)
        eventually(lambda: future.running())
        os.kill(launcher._children["g-1"].facts["pid"], signal.SIGSTOP)
        launcher.stop(["g-1"])
        assert len([line for line in alpha.processes().values() if "--label=g-1" in line]) == 0
        launcher.stop(["g-2"], at_once=True)
        assert alpha.processes() == {}


def test_what_may_be_left_is_said_when_its_host_is_not_there(hosts, clusters):
    alpha = hosts.add("alpha", apart=True)
    with broker(hosts, clusters, HERE) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        node = launcher._children["g-1"].facts["pid"]
        os.kill(node, signal.SIGSTOP)  # it cannot end by itself
        with alpha.cut_off():
            for _ in range(2):
                with pytest.raises(StartError, match=r"nodes may be left on alpha \(ssh: connect to host"):
                    launcher.close()
        assert alive(node)
        launcher.close()
        assert alpha.processes() == {}


def test_what_could_not_be_ended_then_is_ended_when_its_host_is_back(hosts, clusters):
    alpha = hosts.add("alpha", apart=True)
    with broker(hosts, clusters, HERE) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        os.kill(launcher._children["g-1"].facts["pid"], signal.SIGSTOP)  # it cannot end by itself
        with alpha.cut_off(), pytest.raises(StartError, match="nodes may be left on alpha"):
            launcher.stop(["g-1"])
        assert alpha.processes()
        eventually(lambda: launcher.poll() == [] and not alpha.processes())


@pytest.mark.parametrize("victim", ["ssh", "sshd"])
def test_when_the_connection_is_cut_the_node_ends(victim, hosts, clusters):
    alpha = hosts.add("alpha")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        future = here.client.options(requeue=False).submit(sleep_for, 600)
        eventually(lambda: future.running())
        if victim == "ssh":
            os.kill(launcher._children["g-1"].pid, signal.SIGKILL)
        else:
            alpha.end()
        eventually(lambda: not alpha.processes())
        if victim == "ssh":
            ended = eventually(lambda: (found := one(launcher)).state == "ended" and found)
            assert ended.why.startswith("alpha: killed by SIGKILL")
            launcher.start(["g-1"])
        else:
            assert eventually(lambda: one(launcher).why).startswith("alpha: exit code 255")
            alpha.begin()
        eventually(lambda: one(launcher).state == "running")


DRIVER = """
import sys
from pathlib import Path
from zmqsched import Client
from zmqsched.clusterfile import NodeGroup
from zmqsched.launch.base import Site
from zmqsched.launch.ssh import SSHLauncher
path, config, *hosts = sys.argv[1:]
group = NodeGroup(name="g", launcher="ssh", hosts=hosts, slots=1, python=sys.executable, ssh_options=("-F", config))
launcher = SSHLauncher(group, Site(Path(path), Path(path).parent))
launcher.start([f"g-{n}" for n in range(len(hosts))])
print(flush=True)
import time
time.sleep(600)
"""


def test_nothing_is_left_anywhere_when_the_program_that_has_launched_is_killed(hosts, clusters):
    names = ["alpha", "beta", "gamma"]
    for name in names:
        hosts.add(name, apart=True)
    with broker(hosts, clusters, HERE) as here:
        command = [sys.executable, "-c", DRIVER, str(here.path), str(hosts.config), *names]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
            driver.stdout.readline()
            eventually(lambda: len([node for node in here.client.nodes() if node.state == "alive"]) == 3)
            futures = [here.client.options(requeue=False).submit(sleep_for, 600) for _ in names]
            eventually(lambda: all(future.running() for future in futures))
            driver.kill()
        for host in hosts.hosts:
            eventually(lambda host=host: not host.processes())
        eventually(lambda: {node.state for node in here.client.nodes()} <= {"gone", "lost"})


def test_a_preview_is_what_is_run(hosts, clusters):
    hosts.add("alpha")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha", env={"GREETING": "hello"}, prologue=("module load tools",))
        lines = launcher.preview(["g-1", "g-2"])
        assert sum(line.startswith("ssh -F ") and "-- alpha exec sh" in line.replace("'", "") for line in lines) == 2
        assert "#   export GREETING=hello" in lines
        assert "#   module load tools" in lines
        assert any(" node --connect=- --label=g-2 --slots=1" in line for line in lines)
        for option in ("BatchMode=yes", "ServerAliveInterval=10"):
            assert all(option in line for line in lines if line.startswith("ssh "))
        assert launcher.poll() == []


def test_an_sshd_that_is_busy_is_asked_again(hosts, clusters):
    hosts.add("alpha", options={"MaxStartups": "1:100:1"})
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1", "g-2", "g-3"])
        eventually(lambda: all_run(launcher))
        assert "kex_exchange_identification" in "".join(here.log(f"g-{number}") for number in (1, 2, 3))


def test_what_the_login_shell_prints_does_not_disturb(hosts, clusters):
    greeting = """printf 'Welcome! '; echo '{"error": "forged", "type": "StartError"}'; printf 'Your prompt: '; """
    hosts.add("alpha", options={"ForceCommand": greeting + 'exec sh -c "$SSH_ORIGINAL_COMMAND"'})
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        assert "Welcome! " in here.log("g-1")


def test_through_a_jump_host(hosts, clusters):
    """As the user's ssh goes there by itself. What is in between sees nothing but ssh."""
    hosts.add("alpha", apart=True)
    beta = hosts.add("beta", apart=True)
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha", ssh_options=(*hosts.options, "-J", "beta"))
        launcher.start(["g-1"])
        eventually(lambda: all_run(launcher))
        assert here.client.submit(where).result(timeout=60) == "alpha"
        assert f"Accepted publickey for root from {beta.address}" in hosts.hosts[0].log()
        assert beta.processes() == {}


def test_over_a_connection_that_the_user_shares(hosts, clusters):
    """One that is there is used (a second factor is asked for once), none is made, and it is not ended."""
    alpha = hosts.add("alpha")
    shared = ("-F", str(hosts.config), "-o", f"ControlPath={hosts.directory}/shared")
    with subprocess.Popen(["ssh", *shared, "-M", "-N", "alpha"], stderr=subprocess.DEVNULL) as master:
        try:
            eventually((hosts.directory / "shared").exists)
            with broker(hosts, clusters) as here:
                launcher = here.launcher("alpha", ssh_options=shared)
                launcher.start(["g-1", "g-2"])
                eventually(lambda: all_run(launcher))
                assert alpha.log().count("Accepted publickey") == 1
                assert here.client.submit(where).result(timeout=60) == "alpha"
                os.kill(launcher._children["g-1"].pid, signal.SIGKILL)
                eventually(lambda: not [line for line in alpha.processes().values() if "--label=g-1" in line])
                launcher.stop(["g-2"])
                assert alpha.processes() == {}
                assert master.poll() is None
        finally:
            master.terminate()


def test_what_a_user_has_configured_for_other_purposes_does_not_disturb(hosts, clusters):
    hosts.own = {
        "RemoteCommand": "true",
        "RequestTTY": "force",
        "LogLevel": "QUIET",
        "ControlMaster": "auto",
        "ControlPersist": "yes",
        "ControlPath": f"{hosts.directory}/own",
        "ExitOnForwardFailure": "yes",
        "LocalForward": f"{hosts.directory}/same localhost:1",
    }
    alpha = hosts.add("alpha")
    with broker(hosts, clusters) as here:
        launcher = here.launcher("alpha")
        launcher.start(["g-1", "g-2"])
        eventually(lambda: all_run(launcher))
        assert not (hosts.directory / "own").exists()
        launcher.close()
        hosts.key.with_suffix(".pub").write_text("")
        assert "Permission denied (publickey)" in failure(here, here.launcher("alpha"))
        assert alpha.processes() == {}
