"""Manifests of deploy/: fields that Kubernetes knows, flags that we have, and a front that finds what is behind it."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml  # type: ignore[import-untyped]
from absl import flags
from support.crd_schemas import DEPLOY, FILE, manifests

import astraea_jax.frontends.serve  # noqa: F401  (it defines the flags)
from astraea_jax.engine.config import EngineConfig

SCHEMAS = json.loads(FILE.read_text())
VARIABLES = {"LWS_LEADER_ADDRESS": "astraea-0.astraea.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
"""What LeaderWorkerSet sets in every container."""


def of_kind(kind: str) -> dict[str, Any]:
    [found] = [manifest for manifest in manifests() if manifest["kind"] == kind]
    return found


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' templates of a manifest, leaders first."""
    spec = manifest["spec"]
    match manifest["kind"]:
        case "Deployment":
            return [spec["template"]]
        case "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            return [group["leaderTemplate"], group["workerTemplate"]]
        case "RayService":
            cluster = spec["rayClusterConfig"]
            return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return []


PODS = [pytest.param(pod, id=f"{m['kind']}-{i}") for m in manifests() for i, pod in enumerate(pods(m))]


@pytest.mark.parametrize("kind", ["LeaderWorkerSet", "RayService"])
def test_every_field_is_one_of_the_custom_resource(kind: str) -> None:
    manifest, schema = of_kind(kind), SCHEMAS[kind]
    assert manifest["apiVersion"] == schema["apiVersion"]
    jsonschema.validate(manifest, schema)
    for damage in ("spec.replica", "spec.leaderWorkerTemplate.sizes", "spec.rayClusterConfig.rayVersions"):
        wrong = copy.deepcopy(manifest)
        *path, name = damage.split(".")
        place = wrong
        for part in path:
            place = place.setdefault(part, {})
        place[name] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("pod", PODS)
def test_every_field_is_one_of_a_pod(pod: dict[str, Any]) -> None:
    """The templates in custom resources are those of Kubernetes itself, as in a Deployment."""
    template = SCHEMAS["LeaderWorkerSet"]["properties"]["spec"]["properties"]["leaderWorkerTemplate"]
    jsonschema.validate(pod, template["properties"]["leaderTemplate"])


@pytest.mark.parametrize("pod", PODS)
def test_volumes_and_grace_fit(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    for container in spec["containers"]:
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted <= {volume["name"] for volume in spec.get("volumes", [])}
        for grace_s in re.findall(r"--grace_s=(\d+)", " ".join(container.get("args", []))):
            assert spec["terminationGracePeriodSeconds"] > int(grace_s)


@pytest.mark.parametrize("pod", PODS)
def test_every_flag_is_one_of_ours(pod: dict[str, Any]) -> None:
    for container in pod["spec"]["containers"]:
        for argument in container.get("args", []):
            name, _, value = argument.removeprefix("--").partition("=")
            value = re.sub(r"\$\((\w+)\)", lambda found: VARIABLES[found[1]], value)
            flags.FLAGS[name].parser.parse(value)
            assert name in flags.FLAGS


def test_services_lead_to_those_who_answer() -> None:
    documents = manifests()
    for service in [document for document in documents if document["kind"] == "Service"]:
        selected = [
            pod
            for document in documents
            for pod in pods(document)
            if service["spec"]["selector"].items() <= pod.get("metadata", {}).get("labels", {}).items()
        ]
        assert selected
        ports = [{port["name"] for c in pod["spec"]["containers"] for port in c.get("ports", [])} for pod in selected]
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        if "role" in service["spec"]["selector"]:
            assert len(selected) == 1, "followers do not answer"
        assert any(wanted <= there for there in ports)


def test_processes_of_a_group_differ_in_nothing_but_their_number() -> None:
    leader, worker = (pod["spec"]["containers"][0] for pod in pods(of_kind("LeaderWorkerSet")))
    assert leader["args"] == worker["args"]
    assert of_kind("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_the_application_of_ray_is_there() -> None:
    config = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
    [application] = config["applications"]
    module, _, function = application["import_path"].partition(":")
    source = Path(__file__).parents[1] / Path(*module.split(".")) / "__init__.py"
    imported = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    assert function in {name.name for node in imported for name in node.names}
    EngineConfig(**application["args"]["engine"])
    other = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text())
    assert config["grpc_options"] == other["grpc_options"]
    assert application["args"].keys() <= {*other["applications"][0]["args"], "api_keys"}


def test_probes_of_kuberay_can_be_answered() -> None:
    """Workers are asked with wget, and so is everybody if Ray's version is not said; who cannot answer is restarted."""
    assert "install -y --no-install-recommends wget" in (DEPLOY / "Dockerfile").read_text()
    major, minor, _ = map(int, of_kind("RayService")["spec"]["rayClusterConfig"]["rayVersion"].split("."))
    assert (major, minor) >= (2, 60), "the extra wants it"


def test_the_image_has_no_copy_of_the_folder() -> None:
    """Keys that lie in it would stay in a layer, whatever is removed later."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert not [line for line in lines if line.split(" ")[0] in ("COPY", "ADD")]
