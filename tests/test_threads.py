"""How many threads the numerical libraries of a worker may start: set before a task can import one."""

import os
import subprocess
import sys

import pytest
from conftest import eventually

from zmqsched import Client, LocalCluster
from zmqsched.config import CONNECTION_FILE, cluster_dir
from zmqsched.host import THREADS, usable_cpus


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


def environment():
    return {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}


def test_the_workers_of_all_nodes_of_a_host_share_its_cpus():
    with LocalCluster(n_workers=2, n_nodes=2) as cluster, Client(cluster) as client:
        assert client.submit(environment).result() == dict.fromkeys(THREADS, str(max(1, usable_cpus() // 2)))


def test_what_the_user_has_set_is_what_workers_get(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with LocalCluster(n_workers=1) as cluster, Client(cluster) as client:
        assert client.submit(environment).result() == {"OMP_NUM_THREADS": "7"}


def test_a_node_started_by_hand_divides_what_its_host_has():
    with LocalCluster(n_workers=1) as cluster, Client(cluster) as client:
        file = cluster_dir(cluster.name) / CONNECTION_FILE
        command = [sys.executable, "-m", "zmqsched", "node", "--connect", file, "-n", "2", "--tag", "by-hand"]
        with subprocess.Popen(command) as node:
            try:
                eventually(lambda: len(client.nodes()) == 2)  # what no node can run fails after a while
                set_there = client.options(tags=["by-hand"]).submit(os.getenv, "OMP_NUM_THREADS").result(timeout=60)
            finally:
                node.terminate()
        assert set_there == str(max(1, usable_cpus() // 2))
