"""What a host may use: the smallest of what affinity, cgroup and Slurm allow, and the GPUs that are shown."""

import os
import platform
import time

import pytest

from zmqsched import host
from zmqsched.options import size_argument


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A host with eight CPUs, no limits and no GPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    for name in ("SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


QUOTAS = [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)]


@pytest.mark.parametrize(("quota", "cpus"), QUOTAS)
def test_a_cgroups_quota_limits_the_cpus(bare, quota, cpus):
    (bare / "cpu.max").write_text(quota + "\n")
    assert host.usable_cpus() == cpus


def test_so_does_an_old_cgroups_and_slurm(bare, monkeypatch):
    (bare / "cpu").mkdir()
    (bare / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (bare / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert host.usable_cpus() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert host.usable_cpus() == 3


def test_a_cgroups_limit_is_the_memory(bare):
    (bare / "memory.max").write_text("1048576\n")
    assert host.usable_memory() == 1048576
    (bare / "memory.max").write_text("max\n")
    assert host.usable_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_slurm_says_when_the_allocation_ends():
    assert host.walltime({}) == 0.0
    assert 3500 < host.walltime({"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}) <= 3600
    assert host.walltime({"SLURM_JOB_END_TIME": str(int(time.time()) - 60)}) == 1.0, "not 0, which is no end"
    assert host.walltime({"SLURM_JOB_END_TIME": "NONE"}) == 0.0


@pytest.mark.parametrize(("shown", "gpus"), [("3,5", ["3", "5"]), ("", []), ("-1", []), ("GPU-abc", ["GPU-abc"])])
def test_cuda_visible_devices_says_which_gpus(monkeypatch, shown, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert host.gpus() == gpus


@pytest.mark.parametrize(("script", "gpus"), [("printf '0\\n1\\n'", ["0", "1"]), ("exit 9", [])])
def test_else_nvidia_smi_lists_them(bare, script, gpus):
    tool = bare / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert host.gpus() == gpus


def test_without_either_there_are_none():
    assert host.gpus() == []


def test_a_process_says_where_and_with_what_it_runs():
    here = host.where()
    assert (here.pid, here.python) == (os.getpid(), platform.python_version())
    assert {"pyzmq", "cloudpickle", "msgspec"} <= dict(here.versions).keys()


def test_a_broker_takes_a_quarter_of_the_memory_and_not_too_little(bare):
    (bare / "memory.max").write_text(f"{8 << 30}\n")
    assert host.room_for_tasks() == min(2 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    (bare / "memory.max").write_text("1048576\n")
    assert host.room_for_tasks() == 256 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("600K", 614400), ("1.5m", 3 << 19), ("2G", 2 << 30), ("1T", 1 << 40)],
)
def test_sizes_are_written_with_a_unit_or_without(text, size):
    assert size_argument(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e30", "K", "2GB", "2 Q", "much", "1e400T"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size: write it as 500M or 2G"):
        size_argument(text)


def test_the_cpus_are_divided_among_the_workers():
    assert host.thread_limits(2, {}) == dict.fromkeys(host.THREADS, "4")
    assert host.thread_limits(3, {})["OMP_NUM_THREADS"] == "2"
    assert host.thread_limits(16, {})["OPENBLAS_NUM_THREADS"] == "1"


def test_a_number_of_threads_that_the_user_has_set_stays():
    limits = host.thread_limits(2, {"MKL_NUM_THREADS": "7"})
    assert "MKL_NUM_THREADS" not in limits
    assert limits["OMP_NUM_THREADS"] == "4"
    assert host.thread_limits(2, {"OMP_NUM_THREADS": "7"}) == {}, "the others follow it"
