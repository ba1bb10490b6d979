"""Kubernetes and KServe manifests: valid by their schemas, and true to the image and the server."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KSERVE_SCHEMA = json.loads(Path(__file__).with_name("kserve_schema.json").read_text())
VERSION = "1.31"
PATHS = {"/v2/health/live", "/v2/health/ready"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def one(name: str, kind: str) -> dict[str, Any]:
    (found,) = (each for each in documents(name) if each["kind"] == kind)
    return found


def container(name: str) -> dict[str, Any]:
    if name == "kserve.yaml":
        return one(name, "ServingRuntime")["spec"]["containers"][0]
    return one(name, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def check_kserve(document: dict[str, Any]) -> None:
    """By the schema of KServe, containers by that of a pod of Kubernetes."""
    jsonschema.validate(document, KSERVE_SCHEMA)
    if containers := document["spec"].get("containers"):
        pod = {"metadata": {"name": "x"}, "spec": {"containers": containers}}
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", **pod}, VERSION, strict=True
        )


@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda each: each["kind"])
def test_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("document", documents("kserve.yaml"), ids=lambda each: each["kind"])
def test_kserve(document: dict[str, Any]) -> None:
    check_kserve(document)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ServingRuntime", ("spec", "containers", 0, "imagee"), "x"),
        ("ServingRuntime", ("spec", "containers", 0, "ports", 0, "containerPort"), "8080"),
        ("ServingRuntime", ("spec", "protocolVersions"), ["v3"]),
        ("ServingRuntime", ("spec", "supportedModelFormats", 0, "version"), 1),
        ("InferenceService", ("spec", "predictor", "model", "storage_uri"), "s3://x"),
        ("InferenceService", ("spec", "predictor", "minReplicas"), "2"),
        ("InferenceService", ("metadata", "name"), "Twofour"),
    ],
)
def test_a_wrong_field_is_found(kind: str, path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(one("kserve.yaml", kind))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_kserve(document)


def test_a_wrong_field_of_kubernetes_is_found() -> None:
    deployment = copy.deepcopy(one("kubernetes.yaml", "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kserve.yaml"])
def test_probes_ask_what_the_server_has_on_its_port(name: str) -> None:
    found = container(name)
    http = option(name, "--http")
    ports = {each["name"]: each["containerPort"] for each in found["ports"]}
    probes = {key: found[key]["httpGet"] for key in found if key.endswith("Probe")}
    assert {each["path"] for each in probes.values()} == PATHS
    assert probes["readinessProbe"]["path"] == "/v2/health/ready"
    for probe in probes.values():
        assert str(ports.get(probe["port"], probe["port"])) == http


def option(name: str, option: str) -> str:
    arguments = container(name)["args"]
    return str(arguments[arguments.index(option) + 1])


def test_pods_have_time_to_drain() -> None:
    pod = one("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    predictor = one("kserve.yaml", "InferenceService")["spec"]["predictor"]
    for name, of in (("kubernetes.yaml", pod), ("kserve.yaml", predictor)):
        takes_s = float(option(name, "--drain-delay")) + float(option(name, "--drain"))
        assert of["terminationGracePeriodSeconds"] >= takes_s + 10


def test_services_find_the_pods() -> None:
    deployment = one("kubernetes.yaml", "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    names = {each["name"] for each in container("kubernetes.yaml")["ports"]}
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    services = [each for each in documents("kubernetes.yaml") if each["kind"] == "Service"]
    for service in services:
        assert service["spec"]["selector"].items() <= labels.items()
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= names
    mounts = {each["name"] for each in container("kubernetes.yaml")["volumeMounts"]}
    assert mounts == {each["name"] for each in deployment["template"]["spec"]["volumes"]}
    folders = {each["mountPath"] for each in container("kubernetes.yaml")["volumeMounts"]}
    assert {option("kubernetes.yaml", "--cache"), container("kubernetes.yaml")["args"][0]} < folders


def test_nobody_is_root() -> None:
    pod = one("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    user = re.search(r"^USER (\d+):", (DEPLOY / "Containerfile").read_text(), re.M)
    assert user is not None
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == user[1] != "0"
    assert str(container("kserve.yaml")["securityContext"]["runAsUser"]) == user[1]
    assert container("kubernetes.yaml")["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_runtime_and_its_service_agree() -> None:
    runtime = one("kserve.yaml", "ServingRuntime")
    model = one("kserve.yaml", "InferenceService")["spec"]["predictor"]["model"]
    formats = [(each["name"], each["version"]) for each in runtime["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert container("kserve.yaml")["args"][0] == "/mnt/models"  # where KServe puts storageUri
