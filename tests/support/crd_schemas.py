"""Names and types of the fields that our manifests may set, from the custom resource definitions of who reads them.

``python tests/support/crd_schemas.py LWS.yaml RAYSERVICE.yaml`` writes ``crd_schemas.json`` anew: of every object that
a manifest of ``deploy/`` sets, all fields by name, and of those that it sets their types, what they must have and their
permitted values. Nothing else of the definitions is kept. They were

* leaderworkerset.x-k8s.io_leaderworkersets.yaml of LeaderWorkerSet v0.10.0 (commit 060ab4d),
* ray.io_rayservices.yaml of KubeRay v1.7.0-rc.0 (commit feeaf72),

both under the Apache License 2.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).parents[2] / "deploy"
FILE = Path(__file__).with_suffix(".json")
KEPT = ("type", "enum", "minimum", "maximum")


def manifests() -> list[dict[str, Any]]:
    """All documents of ``deploy/`` that Kubernetes reads."""
    documents = [
        document for path in sorted(DEPLOY.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
    ]
    return [document for document in documents if "apiVersion" in document]


def reduced(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that says whether ``values`` and others like them are right."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept: dict[str, Any] = {name: schema[name] for name in KEPT if name in schema}
    if "properties" in schema:
        found = {name: [value[name] for value in values if name in value] for name in schema["properties"]}
        kept["properties"] = {
            name: reduced(schema["properties"][name], inside) if inside else {} for name, inside in found.items()
        }
        kept["required"] = schema.get("required", [])
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = reduced(schema["additionalProperties"], [])
    if "items" in schema:
        kept["items"] = reduced(schema["items"], [item for value in values for item in value])
    return kept


def main(paths: list[str]) -> None:
    """Write the file."""
    schemas = {}
    for path in paths:
        definition = yaml.safe_load(Path(path).read_text())
        kind = definition["spec"]["names"]["kind"]
        ours = [document for document in manifests() if document["kind"] == kind]
        [version] = [v for v in definition["spec"]["versions"] if f"/{v['name']}" in ours[0]["apiVersion"]]
        schema = reduced(version["schema"]["openAPIV3Schema"], ours)
        schema["properties"]["metadata"] = {"type": "object"}
        schema["apiVersion"] = f"{definition['spec']['group']}/{version['name']}"
        schemas[kind] = schema
    FILE.write_text(json.dumps(schemas, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
