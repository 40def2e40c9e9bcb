"""NumPy in workers starts as many threads as a worker has CPUs, because it is told so before it is imported."""

import numpy as np
import pytest

from zmqsched import Client, LocalCluster
from zmqsched.host import THREADS, usable_cpus

pytestmark = pytest.mark.system


def threads():
    from threadpoolctl import threadpool_info

    np.ones((4, 4)) @ np.ones((4, 4))
    return {pool["user_api"]: pool["num_threads"] for pool in threadpool_info()}


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_cpus_are_divided_among_the_workers(clusters, workers):
    with LocalCluster(workers) as cluster, Client(cluster) as client:
        assert client.submit(threads).result() == {"blas": max(1, usable_cpus() // workers)}


def test_what_the_user_has_set_stays(clusters, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with LocalCluster(1) as cluster, Client(cluster) as client:
        assert client.submit(threads).result() == {"blas": 1}
