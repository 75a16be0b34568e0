"""Every option of an engine is checked when it is given: its type, its range, and what may be chosen."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from astraea_jax.engine.config import EngineConfig, Seconds, Whole
from astraea_jax.errors import StartupError, shown
from astraea_jax.kernels import BACKENDS, Reference
from astraea_jax.scheduler.policies import SERVING, make_policy
from astraea_jax.scheduler.strategies import STRATEGIES

FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}
WRONG_TYPES = ([], {}, b"int8", object(), np.dtype("float32"), np.ones(2), "sixteen", 512.5, 1 + 2j, "", 10**5000)
COUNTS = [name for name, field in FIELDS.items() if isinstance(field.metadata["allowed"], Whole)]
TIMES = [name for name, field in FIELDS.items() if isinstance(field.metadata["allowed"], Seconds)]


def refused(name: str, value: object) -> str:
    with pytest.raises(StartupError) as caught:
        EngineConfig(**{name: value})
    said = str(caught.value)
    assert said.startswith(f"{name} is {shown(value)}; it must be ")
    return said.partition("it must be ")[2]


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_refused(name):
    for value in WRONG_TYPES:
        fine = isinstance(value, str) if name == "compile_cache" else name in TIMES and isinstance(value, float)
        assert fine or refused(name, value)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("scan_layers", "kv_events")])
def test_truth_is_no_number_and_no_name(name):
    assert refused(name, True)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 16.0, 2**63, "1", np.int64(16)], ids=repr)
def test_counts_are_whole_and_in_range(name, value):
    assert refused(name, value).startswith("an integer of at least ")


def test_counts_fit_the_device():
    assert refused("max_seqs", 0) == "an integer of at least 1 and at most 2147483647, or None"
    assert refused("max_queued", 2**31) == "an integer of at least 1 and at most 2147483647"
    assert refused("host_kv_bytes", -1) == "an integer of at least 0, or None"
    assert EngineConfig(kv_bytes=2**40, host_kv_bytes=0).kv_bytes == 2**40


@pytest.mark.parametrize("name", TIMES)
def test_times_are_finite_and_above_zero(name):
    for value in (0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf, "600", None):
        assert refused(name, value) == "a finite number of seconds above 0"
    for value in (1, 0.5, 1e9, np.float64(3)):
        assert getattr(EngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dtype", "int3", "one of float32, bfloat16, float16, or None"),
        ("quantize", "int3", "one of int8, fp8, int4, or None"),
        ("kv_dtype", "int8", "one of fp8, or None"),
        ("residency", "belady", f"one of {', '.join(STRATEGIES)}, or None"),
        ("policy", "luck", f"one of {', '.join(SERVING)}"),
        ("policy", "srpt-clairvoyant", f"one of {', '.join(SERVING)}"),  # it needs to know what is to come
        ("policy", None, f"one of {', '.join(SERVING)}"),
        ("scan_layers", 1, "True or False, or None"),
        ("compile_cache", 3, "the name of a folder, or None"),
    ],
)
def test_names_are_chosen_from_what_there_is(name, value, allowed):
    assert refused(name, value) == allowed


def test_sizes_must_fit_together():
    with pytest.raises(StartupError, match="max_step_tokens 4 is below max_seqs 64"):
        EngineConfig(max_seqs=64, max_step_tokens=4)


@pytest.mark.parametrize(
    ("platform", "sizes"), [("cpu", (64, 512, 16)), ("gpu", (256, 2048, 64)), ("tpu", (256, 2048, 64))]
)
def test_sizes_that_are_not_given_are_the_devices_and_fit_those_that_are(platform, sizes, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    def sizes_of(**given: int) -> tuple[int, int, int]:
        config = EngineConfig(**given)
        return config.max_seqs, config.max_step_tokens, config.page_size

    assert sizes_of() == sizes
    assert sizes_of(max_seqs=1000) == (1000, max(1000, sizes[1]), sizes[2])
    assert sizes_of(max_step_tokens=4, page_size=1) == (4, 4, 1)
    assert sizes_of(max_seqs=3, max_step_tokens=5) == (3, 5, sizes[2])


@pytest.mark.parametrize("policy", SERVING)
def test_every_policy_serves_with_its_own_residency_and_with_any_other(policy):
    for residency in (None, *STRATEGIES):
        config = EngineConfig(policy=policy, residency=residency)
        strategy = make_policy(config.policy, strategy=config.residency).strategy
        assert residency is None or isinstance(strategy, STRATEGIES[residency])


def test_a_backend_of_ones_own_can_be_chosen(monkeypatch):
    assert "mine" not in refused("attention", "mine")
    monkeypatch.setitem(BACKENDS, "mine", Reference)
    assert EngineConfig(attention="mine").attention == "mine"
