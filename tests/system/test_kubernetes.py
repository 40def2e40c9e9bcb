"""The Kubernetes manifests: valid by the schema of each version that is current, and what they run works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zmqsched import LocalCluster
from zmqsched.config import ConnectionFile, cluster_dir, role_file

pytestmark = pytest.mark.system
kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")

MANIFESTS = sorted((Path(__file__).parents[2] / "examples" / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod(name: str) -> dict[str, Any]:
    (found,) = [
        document["spec"]["template"]["spec"] for path in MANIFESTS for document in documents(path)
        if document["kind"] == "Deployment" and document["metadata"]["name"] == name
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_the_manifests_are_valid(version):
    found = [document for path in MANIFESTS for document in documents(path)]
    assert [document["kind"] for document in found] == ["Service", "Deployment", "Deployment"]
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_is_looked_at():
    broken = documents(MANIFESTS[0])[0]
    broken["spec"]["port"] = broken["spec"].pop("ports")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_broker_and_nodes_find_each_other():
    service, deployment = documents(MANIFESTS[0])
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {port["name"]: port["containerPort"] for port in pod("zmqsched-broker")["containers"][0]["ports"]}
    assert f":{ports['work']}" in pod("zmqsched-broker")["containers"][0]["command"][-1]
    assert service["metadata"]["name"] in pod("zmqsched-node")["initContainers"][0]["command"][-1]


def test_nothing_secret_is_in_a_command_or_a_variable():
    for name in ("zmqsched-broker", "zmqsched-node"):
        for container in pod(name)["containers"] + pod(name).get("initContainers", []):
            assert all("secretKeyRef" not in str(variable) for variable in container.get("env", []))
    assert "secret" not in str(pod("zmqsched-node")["containers"][0]["volumeMounts"])


def test_the_copy_of_the_key_is_one_that_a_node_takes(tmp_path):
    """The init container's command on a real file, as a Secret shows it: readable by others, and a link."""
    with LocalCluster(1, listen="127.0.0.1") as cluster:
        original = role_file(cluster_dir(cluster.name), "node")
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "..data").write_text(original.read_text())
        (tmp_path / "secret" / "node.json").symlink_to("..data")
        (init,) = pod("zmqsched-node")["initContainers"]
        environment = {**os.environ, "SECRET": str(tmp_path / "secret"), "OWN": str(tmp_path)}
        subprocess.run(init["command"], env=environment, check=True, timeout=60)
        copy, file = ConnectionFile.load(tmp_path / "node.json"), ConnectionFile.load(original)
        assert copy.client_secret == file.client_secret
        tcp = [address for address in file.addresses.work if address.startswith("tcp://")]
        here = [address.replace("127.0.0.1", "zmqsched-broker") for address in tcp]
        assert [address for address in copy.addresses.work if address.startswith("tcp://")] == here


@pytest.mark.parametrize("name", ["zmqsched-broker", "zmqsched-node"])
def test_the_options_are_ones_that_there_are(name):
    _, command, *options = pod(name)["containers"][0]["command"]
    known = subprocess.run(
        [sys.executable, "-m", "zmqsched", command, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert options
    assert all(option.partition("=")[0] in known.stdout for option in options), json.dumps(options)
