"""Command-line flags: an engine's configuration, and how every command of this package begins and ends."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from astraea_jax.engine.config import SWITCH, Choice, EngineConfig, Seconds, Whole
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.tenant_weights import Weights

OPTIONS = {
    "max_seqs": "Requests that run at once; by default 256, on a CPU 64.",
    "max_step_tokens": "Tokens of one step; by default 2048, on a CPU 512.",
    "page_size": "Tokens per KV page; by default 64, on a CPU 16.",
    "kv_bytes": "Memory for KV pages on each device; by default what is free (512 MiB on a CPU).",
    "host_kv_bytes": "Pinned host memory for KV of waiting programs, used under memory pressure; 0: none. By default "
    "half of the machine's memory on an accelerator, none on a CPU.",
    "residency": "Strategy for the KV of programs that wait; by default adaptive. See scheduler/strategies.py.",
    "max_context": "Prompt and output tokens of one request; by default the model's limit.",
    "dtype": "Dtype of weights and KV; by default float32 on a CPU, bfloat16 elsewhere.",
    "quantize": "Form of the layers' weight matrices in fewer bits.",
    "kv_dtype": "8-bit dtype of KV; by default as --dtype says.",
    "attention": "Attention kernels; by default those for this kind of device.",
    "tensor_parallel": "Devices that share one replica of the model.",
    "data_parallel": "Replicas of the model, each on devices of its own.",
    "scan_layers": "Run the layers as one loop, compiled once for all of them; by default on a TPU.",
    "policy": "Order in which requests run; see scheduler/policies.",
    "tenant_weights": "Shares of tenants while they compete, as tenant=weight,… or @FILE with one on each line; "
    "others have 1.",
    "max_queued": "Requests that may wait; others are refused. Of the last quarter a client gets what it lacks of its "
    "share of all.",
    "max_programs": "Sessions remembered at once; beyond that the owner of most idle ones loses the longest idle.",
    "session_ttl_s": "Seconds after which an idle session is forgotten.",
    "step_timeout_s": "Seconds after which a step counts as hung; the engine then ends.",
}
"""Field of :class:`EngineConfig` -> help text of its flag."""

MODEL = ("dtype", "quantize", "kv_dtype", "attention", "tensor_parallel", "scan_layers", "kv_bytes")
"""Options of how a model is served, whatever for."""

_HELP = {"?", "help", "helpfull", "helpshort", "helpxml"}

_FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}


def engine_flags(*names: str, **defaults: Any) -> Callable[..., EngineConfig]:
    """Define a flag for each of these fields; return a function that makes an :class:`EngineConfig` of their values.

    Args:
        names: of :data:`OPTIONS`.
        defaults: defaults that differ from the engine's.

    Returns:
        A function whose keyword arguments are further fields, and override the flags.
    """
    for name in names:
        text = re.sub(r"; by default [^.]*", "", OPTIONS[name]) if name in defaults else OPTIONS[name]
        _define(name, defaults.get(name, _FIELDS[name].default), text)
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # or else --help would not show it

    def config(**more: Any) -> EngineConfig:
        chosen: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
        return EngineConfig(**(chosen | more))

    return config


def _define(name: str, default: Any, text: str) -> None:
    match _FIELDS[name].metadata["allowed"]:
        case Whole(least, most):
            flags.DEFINE_integer(name, default, text, least, most)
        case Seconds():
            flags.DEFINE_float(name, default, text)  # the range has an open end: EngineConfig checks it
        case Weights():
            flags.DEFINE_string(name, default, text)  # EngineConfig checks it
        case Choice(names):
            flags.DEFINE_enum(name, default, list(names), text)
        case allowed:
            assert allowed is SWITCH
            flags.DEFINE_bool(name, default, text)


def engine_title(engine: Engine) -> str:
    """Describe an engine in one line, for a table's title: dtypes, attention, devices."""
    config, layout = engine.config, engine.layout
    parts = [f"{config.quantize} weights in {layout.dtype.name}" if config.quantize else layout.dtype.name]
    if config.kv_dtype:
        parts.append(f"{config.kv_dtype} KV")
    parts.append(layout.backend.name)
    if config.tensor_parallel > 1:
        parts.append(f"{config.tensor_parallel} devices")
    return ", ".join(parts)


def run_main(main: Callable[[list[str]], object], module: str = "__main__") -> None:
    """Run ``main`` with the flags of the command line, as ``absl`` does, but end with 0 after printing help.

    The help is the docstring of ``module`` and the flags that it defines, whatever file was started.
    """
    if module != "__main__":
        sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def checked(arguments: list[str]) -> object:
        for name in flags.FLAGS:
            if (value := flags.FLAGS[name].value) != value:  # which is so of nan alone, and no bound keeps it out
                raise app.UsageError(f"--{name}: {value} is not a number")
        return main(arguments)

    arguments = ["--help" if argument == "-h" else argument for argument in sys.argv]
    try:
        app.run(checked, arguments)
    except SystemExit as end:
        asked_for_help = not _HELP.isdisjoint(argument.lstrip("-") for argument in arguments if argument[:1] == "-")
        raise SystemExit(0 if asked_for_help else end.code) from None  # absl ends with 1
