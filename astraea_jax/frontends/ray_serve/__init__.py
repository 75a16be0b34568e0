"""Serves a model on Ray Serve: every replica of the deployment is one engine, and Ray places, heals and scales them.

    from ray import serve
    from astraea_jax.frontends import ray_serve

    serve.run(ray_serve.app("Qwen/Qwen3-0.6B", deployment={"num_replicas": 2, "ray_actor_options": {"num_gpus": 1}}))

What Serve's proxies need besides is said in docs/several-machines.md.
"""

from __future__ import annotations

try:
    import ray.serve  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "astraea_jax.frontends.ray_serve needs Ray Serve: pip install 'astraea-jax[ray]'", name=error.name
    ) from None

from astraea_jax.frontends.ray_serve.app import app, build

__all__ = ["app", "build"]
