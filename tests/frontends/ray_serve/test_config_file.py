"""The config file for ``serve deploy``, by Serve's own schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray._common.utils import import_attr
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

FILE = Path(__file__).parents[3] / "deploy" / "ray_serve.yaml"


@pytest.fixture
def config():
    return ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))


def test_its_application_can_be_built(config):
    (application,) = config.applications
    built = import_attr(application.import_path)(application.args)._bound_deployment
    assert built.name == "Engine"
    assert built.max_ongoing_requests == 64 + 1024
    assert built._deployment_config.autoscaling_config.max_replicas == 4


def test_its_services_are_there(config):
    options = gRPCOptions(**config.grpc_options.model_dump())
    assert len(options.grpc_servicer_func_callable) == 2
