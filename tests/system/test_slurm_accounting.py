"""A Slurm with accounting: how a job ended is known when Slurm itself has forgotten it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from conftest import Home, eventually
from slurm import Slurm, running_slurm

from zmqsched import SlurmCluster
from zmqsched.errors import StartError
from zmqsched.launch.slurm import SlurmLauncher

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def slurm(clusters: Home) -> Iterator[Slurm]:
    with pytest.MonkeyPatch.context() as patch:
        for slurm in running_slurm(accounting=True):
            for name, value in slurm.environment.items():
                patch.setenv(name, value)
            yield slurm


def test_how_jobs_ended_that_slurmctld_has_forgotten(slurm):
    fails = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3")
    wrap = "--wrap=test $SLURM_ARRAY_TASK_ID = 0 || sleep 600"
    array = slurm("sbatch", "--parsable", "--output=/dev/null", "--array=0-1", wrap)
    eventually(lambda: slurm.jobs() == {f"{array}_1": "RUNNING"}, PATIENCE_S)
    slurm("scancel", f"{array}_1")
    eventually(lambda: slurm("squeue", "-h", "--states=all") == "", PATIENCE_S)
    fate = SlurmLauncher.system.fate
    assert fate(fails) == "FAILED, exit code 3"
    assert fate(f"{array}_0") == ""
    assert fate(f"{array}_1") == f"CANCELLED by {os.getuid()}"
    assert fate("987654") is None, "nobody has ever seen it"


def test_a_cluster_tells_how_its_job_failed(slurm):
    cluster = SlurmCluster(slots=1, listen="127.0.0.1", prologue=["echo no module gcc/99 >&2; exit 3"])
    with cluster, pytest.raises(StartError, match=r"FAILED, exit code 3\n\s+no module gcc/99"):
        cluster.wait_for_nodes(1, timeout=PATIENCE_S)
