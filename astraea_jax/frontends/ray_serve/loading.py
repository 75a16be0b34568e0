"""The engine of a replica, in one process or over several.

With several, the process of the replica is the leader; the others are actors, one in each further bundle of the
replica's placement group. Ray only starts them: steps pass between them as they always do (``engine/multiprocess.py``).
If one of them dies, the engine does, its replica fails its health check, and Ray starts all of them again.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import Any

import jax
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from astraea_jax.engine import multiprocess
from astraea_jax.engine.compilation import default_cache, use_cache
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.loading import load_model, random_model
from astraea_jax.engine.replicas import load_engine
from astraea_jax.errors import StartupError
from astraea_jax.frontends.hub import find_model
from astraea_jax.frontends.ray_serve.options import Options

log = logging.getLogger(__name__)


def start_engine(options: Options) -> Serving:
    """Load the model and start what serves it; takes as long as the compilation does.

    Raises:
        CheckpointError, StartupError: it cannot be served here; the message says why.
    """
    if options.processes > 1:
        _lead(options)
    engine = load_engine(_model(options), _config(options), random_weights=options.random_weights)
    engine.start()
    return engine


def _model(options: Options) -> str:
    return options.model if options.random_weights else str(find_model(options.model, options.revision))


def _config(options: Options) -> EngineConfig:
    if "compile_cache" not in options.engine and not jax.config.values["jax_compilation_cache_dir"]:
        try:
            use_cache(default_cache())
        except StartupError as error:
            log.warning("%s; every start compiles everything", error)
    return EngineConfig(**options.engine)


def _lead(options: Options) -> None:
    """Start the followers, and make this process the leader.

    Raises:
        StartupError: they do not find each other.
    """
    group = ray.util.get_current_placement_group()
    actor: Any = Follower  # which Ray has made of the class
    address = f"{ray.util.get_node_ip_address()}:{_free_port()}"
    for process in range(1, options.processes):
        wanted = dict(group.bundle_specs[process])
        actor.options(
            num_cpus=wanted.pop("CPU", 0),
            num_gpus=wanted.pop("GPU", 0),
            memory=wanted.pop("memory", None),
            resources=wanted,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=process),
        ).remote().follow.remote(options, address, process)
    multiprocess.join(address, options.processes, 0)


@ray.remote
class Follower:
    """A process of a replica beyond its first. It ends with the leader, whose child it is."""

    def follow(self, options: Options, address: str, process: int) -> None:
        """Repeat what the leader at ``address`` dispatches, until it ends."""
        multiprocess.join(address, options.processes, process)
        config, model = _config(options), _model(options)
        loaded: Any = random_model(model, config) if options.random_weights else load_model(model, config)
        multiprocess.follow(loaded, config)


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("", 0))) as server:
        port: int = server.getsockname()[1]
        return port
