"""A real Slurm on this machine, in a directory of its own: munged, slurmctld and two slurmd.

The two hosts of it, ``zs1`` and ``zs2``, are this one; each says that it has four CPUs, however many there are. Unless it is
asked for there is no accounting, hence no ``sacct``, as on many small sites. It needs root (Debian: slurm-wlm, munge;
slurmdbd and mariadb-server-core for accounting).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually, processes_knowing

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
FOR_ACCOUNTING = ("mariadbd", "slurmdbd", "sacct", "sacctmgr")
SBIN = "/usr/sbin"
HOSTS = ("zs1", "zs2")
CPUS = 4
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

CONF = """\
ClusterName=zs
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
{accounting}
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
KillWait=10
NodeName={hosts[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName={hosts[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 State=UP
"""


NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
# Jobs that have ended slurmctld forgets at once, so that only slurmdbd knows them.
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={directory}/munge/socket
MinJobAge=2
"""
DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=zs
LogFile={directory}/slurmdbd.log
PidFile={directory}/slurmdbd.pid
"""


def missing(*, accounting: bool) -> str:
    """What this machine lacks for it; "" if nothing."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    commands = (*COMMANDS, *FOR_ACCOUNTING) if accounting else COMMANDS
    lacking = [name for name in commands if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    return f"no {', '.join(lacking)} (Debian: slurm-wlm, munge, slurmdbd, mariadb-server-core)" if lacking else ""


class Slurm:
    """It runs from ``start`` to ``stop``; ``environment`` is what its commands need."""

    def __init__(self, *, accounting: bool) -> None:
        self._accounting = accounting
        self.directory = Path(tempfile.mkdtemp(prefix="zsslurm", dir="/tmp"))
        self.environment = {"SLURM_CONF": str(self.directory / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.directory.chmod(0o755)
        for name in ("munge", "state", *(f"spool-{host}" for host in HOSTS)):
            (self.directory / name).mkdir(mode=0o700)
        key = self.directory / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        *ports, accounting_port = free_ports(4)
        accounting = ACCOUNTING.format(port=accounting_port, directory=self.directory) if self._accounting else NO_ACCOUNTING
        conf = CONF.format(
            host=socket.gethostname(), directory=self.directory, ports=ports, hosts=HOSTS, cpus=CPUS, accounting=accounting
        )  # fmt: skip
        (self.directory / "slurm.conf").write_text(conf)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={self.directory}/munge/{file}" for option, file in files.items()]
        self._run("munged", "--foreground", "--force", *options)
        eventually((self.directory / "munge" / "socket").exists, START_TIMEOUT_S)
        if self._accounting:
            self._start_accounting(accounting_port)
        self._run("slurmctld", "-D")
        eventually(self._answers, START_TIMEOUT_S)
        for host in HOSTS:
            self._run("slurmd", "-D", "-N", host)
        eventually(lambda: self("sinfo", "-h", "-o", "%D %t") == f"{len(HOSTS)} idle", START_TIMEOUT_S)

    def stop(self) -> None:
        """End its jobs and itself; nothing of it is left."""
        if len(self._daemons) > 1:
            with contextlib.suppress(subprocess.SubprocessError, AssertionError):
                self.empty()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in processes_knowing(self.directory):  # of jobs
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __call__(self, *words: str) -> str:
        """What a command of it says."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **self.environment}
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """State of what waits or runs, by job id (``7``, ``8_1``)."""
        return dict(line.split("|", 1) for line in self("squeue", "-h", "-r", "-o", "%i|%T").splitlines())

    def begin(self, job: str) -> None:
        """Have one that was requeued begin now. Slurm has it wait for two minutes, counted anew when its end is complete."""

        def runs() -> bool:
            state = self.jobs().get(job)
            if state == "PENDING":
                with contextlib.suppress(AssertionError):  # it has begun since
                    self("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state == "RUNNING"

        eventually(runs)

    def empty(self) -> None:
        """Cancel every job, and wait until both hosts are idle."""
        self("scancel", "--quiet", "--user=root")
        self("scontrol", "update", "PartitionName=short", "State=UP")
        eventually(lambda: not self.jobs() and self("sinfo", "-h", "-o", "%D %t") == f"{len(HOSTS)} idle")

    def _answers(self) -> bool:
        done = subprocess.run(["scontrol", "ping"], env={**os.environ, **self.environment}, capture_output=True, check=False)
        return done.returncode == 0 and b"is UP" in done.stdout

    def _start_accounting(self, port: int) -> None:
        """slurmdbd, and its database: behind a Unix socket in this directory, which nobody else may enter."""
        data, end = self.directory / "sql", self.directory / "sql" / "socket"
        data.mkdir(mode=0o700)
        options = [f"--datadir={data}", f"--socket={end}", f"--pid-file={data}/pid", "--skip-networking", "--user=root"]
        small = ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]
        self._run("mariadbd", "--no-defaults", *options, "--skip-grant-tables", *small)
        eventually(end.exists, START_TIMEOUT_S)
        conf = self.directory / "slurmdbd.conf"
        conf.write_text(DBD_CONF.format(port=port, directory=self.directory))
        conf.chmod(0o600)
        self.environment["MYSQL_UNIX_PORT"] = str(end)
        self._run("slurmdbd", "-D")
        eventually(lambda: _listens(port), START_TIMEOUT_S)
        self("sacctmgr", "--immediate", "add", "cluster", "zs")

    def _run(self, name: str, *words: str) -> None:
        command = shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")
        with open(self.directory / f"{name}.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen(  # its own environment: what of the tests' is in a job, the job was submitted with
                    [command, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                    env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **self.environment},
                )
            )  # fmt: skip
        time.sleep(0.05)
        assert self._daemons[-1].poll() is None, (self.directory / f"{name}.out").read_text()


def _listens(port: int) -> bool:
    with socket.socket() as end:
        return end.connect_ex(("127.0.0.1", port)) == 0


def free_ports(number: int) -> list[int]:
    """TCP ports of loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def running_slurm(*, accounting: bool = False) -> Iterator[Slurm]:
    """For a fixture of the session, or of a module."""
    if lacking := missing(accounting=accounting):
        pytest.skip(lacking)
    slurm = Slurm(accounting=accounting)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
