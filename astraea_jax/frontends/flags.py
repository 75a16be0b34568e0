"""An engine's configuration as command-line flags, so that whatever starts an engine can be told the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from absl import flags

from astraea_jax.engine.config import DTYPES, KV_DTYPES, EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.kernels import BACKENDS
from astraea_jax.models.quantize import EIGHT_BITS
from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.strategies import STRATEGIES

OPTIONS: dict[str, tuple[int | type[bool] | Collection[str], str]] = {
    "max_seqs": (1, "Requests that run at once."),
    "max_step_tokens": (1, "Tokens of one step."),
    "page_size": (1, "Tokens per KV page."),
    "kv_bytes": (1, "Memory for KV pages on each device; by default what is free (512 MiB on a CPU)."),
    "host_kv_bytes": (
        0,
        "Pinned host memory for KV of waiting programs, used under memory pressure; 0: none. By default half of the "
        "host's memory on an accelerator, none on a CPU.",
    ),
    "residency": (STRATEGIES, "What becomes of KV while a program waits; by default adaptive."),
    "max_context": (1, "Prompt and output tokens of one request; by default the model's limit."),
    "dtype": (DTYPES, "Of weights and KV; by default float32 on a CPU, bfloat16 elsewhere."),
    "quantize": (EIGHT_BITS, "The layers' weight matrices in eight bits."),
    "kv_dtype": (KV_DTYPES, "KV in eight bits; by default as --dtype says."),
    "attention": (BACKENDS, "Attention kernels; by default those for this kind of device."),
    "tensor_parallel": (1, "Devices that share one copy of the model."),
    "data_parallel": (1, "Copies of the model, each on devices of its own."),
    "scan_layers": (bool, "The layers as one loop, compiled once for all of them; by default on a TPU."),
    "policy": (SERVING, "Order in which requests run; see scheduler/policies."),
    "max_queued": (1, "Requests that may wait; beyond that they are refused."),
}
"""Field of :class:`EngineConfig` -> its least value, its values, or that it is a switch; and what it says."""

MODEL = ("dtype", "quantize", "kv_dtype", "attention", "tensor_parallel", "scan_layers", "kv_bytes")
"""How a model is served, whatever for."""


def engine_flags(*names: str, **defaults: Any) -> Callable[..., EngineConfig]:
    """Define a flag for each of these fields, and return what makes an :class:`EngineConfig` of them and of what it
    is given, which prevails.

    Args:
        names: of :data:`OPTIONS`.
        defaults: other than the engine's.
    """
    for name in names:
        kind, text = OPTIONS[name]
        default = defaults.get(name, getattr(EngineConfig, name))
        if kind is bool:
            flags.DEFINE_bool(name, default, text)
        elif isinstance(kind, int):
            flags.DEFINE_integer(name, default, text, lower_bound=kind)
        else:
            flags.DEFINE_enum(name, default, list(kind), text)
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # or else --help would not show it

    def config(**more: Any) -> EngineConfig:
        chosen: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
        return EngineConfig(**(chosen | more))

    return config


def engine_title(engine: Engine) -> str:
    """In what a benchmark's table was measured: dtypes, attention, devices."""
    config, layout = engine.config, engine.layout
    said = [f"{config.quantize} weights in {layout.dtype.name}" if config.quantize else layout.dtype.name]
    if config.kv_dtype:
        said.append(f"{config.kv_dtype} KV")
    said.append(layout.backend.name)
    if config.tensor_parallel > 1:
        said.append(f"{config.tensor_parallel} devices")
    return ", ".join(said)
