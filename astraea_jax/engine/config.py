"""The options of an engine: what each may be, and which dtypes, kernels and devices they choose."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astraea_jax.engine.tenant_weights import Weights
from astraea_jax.errors import StartupError, shown
from astraea_jax.kernels import BACKENDS, Backend, choose
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.formats import EIGHT_BITS, FORMATS, Format
from astraea_jax.models.sharding import check_mesh, mesh_of
from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.strategies import STRATEGIES

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("fp8",)
"""KV dtypes other than that of the activations."""
LARGEST_COUNT = 2**31 - 1
"""Counts of tokens, rows and pages are int32 on the device."""
LARGEST_SIZE = 2**63 - 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of an engine that suit a kind of device."""

    max_seqs: int
    max_step_tokens: int
    page_size: int


SIZES = {"cpu": Sizes(max_seqs=64, max_step_tokens=512, page_size=16)}
"""Platform -> sizes, for those that are not given. A CPU's time grows with every token, so that a long step keeps those
who decode waiting."""
ACCELERATOR = Sizes(max_seqs=256, max_step_tokens=2048, page_size=64)
"""For other platforms. With pages of 16 tokens the KV of a program came back from the host in some 35 pieces, which
took the host longer than a step took an H200; with 64 there are 12 (counted in simulation)."""


def default_sizes(platform: str) -> Sizes:
    """Sizes for a kind of device, as JAX names it."""
    return SIZES.get(platform, ACCELERATOR)


@dataclass(frozen=True)
class Whole:
    """An option that is an integer."""

    least: int = 1
    most: int = LARGEST_COUNT

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most

    def __str__(self) -> str:
        most = f" and at most {self.most}" if self.most == LARGEST_COUNT else ""
        return f"an integer of at least {self.least}{most}"


@dataclass(frozen=True)
class Seconds:
    """An option that is a time."""

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and 0 < value <= sys.float_info.max  # type: ignore[operator] # integers may be beyond it

    def __str__(self) -> str:
        return "a finite number of seconds above 0"


@dataclass(frozen=True)
class Choice:
    """An option that is one of some names, which may grow while the process runs (a backend of one's own)."""

    names: Collection[str]

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Kind:
    """An option of which only the type is fixed."""

    type: type
    text: str

    def __contains__(self, value: object) -> bool:
        return isinstance(value, self.type)

    def __str__(self) -> str:
        return self.text


SWITCH = Kind(bool, "True or False")
FOLDER = Kind(str, "the name of a folder")


def _option(default: Any, allowed: Whole | Seconds | Choice | Kind | Weights) -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and policy of an engine.

    Raises:
        StartupError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    max_seqs: int = _option(None, Whole())
    """Requests that run at once. None: 256, on a CPU 64."""
    max_step_tokens: int = _option(None, Whole())
    """Tokens of one step, prefill and decode together. None: 2,048, on a CPU 512."""
    page_size: int = _option(None, Whole())
    """Tokens per KV page. None: 64, on a CPU 16."""
    kv_bytes: int | None = _option(None, Whole(1, LARGEST_SIZE))
    """Memory for KV pages on each device. None: most of what is free on an accelerator, 512 MiB on a CPU."""
    host_kv_bytes: int | None = _option(None, Whole(0, LARGEST_SIZE))
    """Pinned memory of each process for the KV of waiting programs, used under memory pressure; 0 means no host tier.
    None: half of the machine's memory (60 GiB at most) on an accelerator, none on a CPU, which has no other memory."""
    residency: str | None = _option(None, Choice(STRATEGIES))
    """Strategy for the KV of waiting programs. None: the policy's own, or else adaptive."""
    max_context: int | None = _option(None, Whole())
    """Prompt and output tokens of one request. None: the model's own limit, or less if the pages do not hold it."""
    dtype: str | None = _option(None, Choice(DTYPES))
    """Dtype of activations, and of weights and KV unless they have their own; a CPU's activations are float32 with any.
    None: float32 on a CPU, bfloat16 elsewhere."""
    quantize: str | None = _option(None, Choice(FORMATS))
    """Form of the layers' weight matrices: 8 bits with a scale per output channel, or 4 with one per 128 inputs of a
    channel. None: as they are stored if that is in fewer bits, else ``dtype``."""
    kv_dtype: str | None = _option(None, Choice(KV_DTYPES))
    """``"fp8"`` (float8_e4m3fn without scales, clipped at 448) holds twice the tokens of 16 bits in the same memory.
    None: ``dtype``."""
    tensor_parallel: int = _option(1, Whole())
    """Devices that share one replica of the model and its KV."""
    data_parallel: int = _option(1, Whole())
    """Replicas of the model in this process, each with its own devices, KV and running requests. The other sizes are
    per replica, except host_kv_bytes, which all replicas share."""
    attention: str | None = _option(None, Choice(BACKENDS))
    """Attention backend. None: the preferred one for this kind of device."""
    scan_layers: bool | None = _option(None, SWITCH)
    """Run the layers as one loop over stacked weights and pages, which compiles one layer instead of all. None: on a
    TPU only, where a layer is read out of the stack as it is used; a GPU would copy its weights first."""
    policy: str = _option("astraea", Choice(SERVING))
    """Order in which requests run."""
    compile_cache: str | None = _option(None, FOLDER)
    """Folder where compiled steps are kept for later starts. None: as JAX is configured, by default nowhere."""
    tenant_weights: str | None = _option(None, Weights())
    """Shares of the machine where several owners' requests wait, as text (:func:`.tenant_weights.parsed`). Who is not
    named has 1; who has 0 is served while nobody else waits. None: all are equal."""
    max_queued: int = _option(1024, Whole())
    """Requests that may wait; beyond that they are refused."""
    max_programs: int = _option(8192, Whole())
    """Sessions remembered at once; beyond that the owner of most idle ones loses the longest idle."""
    session_ttl_s: float = _option(600.0, Seconds())
    """Seconds after which an idle session is forgotten."""
    step_timeout_s: float = _option(120.0, Seconds())
    """Seconds after which a step counts as hung; the engine then ends."""
    kv_events: bool = _option(False, SWITCH)
    """Tell which blocks of prompts are cached (``Engine.kv_events``), for routers."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_option(field.name, getattr(self, field.name))
        self._fill_in_sizes()
        if self.max_step_tokens < self.max_seqs:
            raise StartupError(
                f"max_step_tokens {self.max_step_tokens} is below max_seqs {self.max_seqs}: "
                "a step must hold one token of every running request"
            )

    def _fill_in_sizes(self) -> None:
        """Choose what was not given, so that given sizes fit: as many rows as a step has tokens, and the reverse."""
        if None in (self.max_seqs, self.max_step_tokens, self.page_size):
            sizes, fill_in = default_sizes(jax.default_backend()), partial(object.__setattr__, self)
            fill_in("max_seqs", self.max_seqs or min(sizes.max_seqs, self.max_step_tokens or sizes.max_seqs))
            fill_in("max_step_tokens", self.max_step_tokens or max(sizes.max_step_tokens, self.max_seqs))
            fill_in("page_size", self.page_size or sizes.page_size)

    def weight_dtype(self) -> Any:
        """The dtype of weights that are not quantized, and of activations but on a CPU."""
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(self.dtype or default)

    def quantized(self) -> Format | None:
        """The form into which the layers' weight matrices are brought, or None.

        Raises:
            StartupError: this device cannot compute with it.
        """
        if self.quantize is None:
            return None
        if self.quantize in EIGHT_BITS:
            _on_device(EIGHT_BITS[self.quantize], "quantize")
        return FORMATS[self.quantize]

    def page_dtype(self) -> Any:
        """The dtype of keys and values.

        Raises:
            StartupError: this device cannot compute with it.
        """
        return self.weight_dtype() if self.kv_dtype is None else _on_device(EIGHT_BITS[self.kv_dtype], "kv_dtype")

    def stacks(self) -> bool:
        """Whether the layers run as one loop over stacked weights."""
        return jax.default_backend() == "tpu" if self.scan_layers is None else self.scan_layers

    def backend(self, model: ModelConfig) -> Backend:
        """The attention backend for this model.

        Raises:
            StartupError: the configured backend is not available here, or cannot serve this model.
        """
        return choose(
            self.attention,
            jax.default_backend(),
            kv_heads=model.num_kv_heads // self.tensor_parallel,
            head_dim=model.head_dim,
            page_size=self.page_size,
            dtype=self.page_dtype(),
            sinks=model.sinks,
        )

    def meshes(self, model: ModelConfig) -> list[Mesh]:
        """The devices of each replica of the model.

        Raises:
            StartupError: there are too few, or they cannot divide the model.
        """
        devices, shared = jax.devices(), self.tensor_parallel
        wanted = shared * self.data_parallel
        if jax.process_count() > 1 and (self.data_parallel > 1 or wanted != len(devices)):
            raise StartupError(
                f"{jax.process_count()} processes serve one replica of the model on all their devices; "
                f"start each with tensor_parallel {len(devices)} and data_parallel 1"
            )
        if wanted > len(devices):
            of_cpu = devices[0].platform == "cpu"
            way_out = f", or set JAX_NUM_CPU_DEVICES={wanted} in the environment" if of_cpu else ""
            raise StartupError(
                f"tensor_parallel {shared} times data_parallel {self.data_parallel} makes {wanted} devices, "
                f"and there are {len(devices)} ({devices[0].device_kind}); choose less{way_out}"
            )
        meshes = [mesh_of(devices[first : first + shared]) for first in range(0, wanted, shared)]
        try:
            check_mesh(model, meshes[0])
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        if model.vocab_size % shared:
            log.warning(
                "%d devices do not divide the %d tokens of the vocabulary: each holds the whole embedding",
                shared,
                model.vocab_size,
            )
        return meshes


def check_option(name: str, value: object) -> None:
    """Check the value of a field of :class:`EngineConfig`; no device is looked at.

    Raises:
        StartupError: it is not allowed.
    """
    field = EngineConfig.__dataclass_fields__[name]
    allowed = field.metadata["allowed"]
    if value in allowed or (value is None and field.default is None):
        return
    also = ", or None" if field.default is None else ""
    raise StartupError(f"{name} is {shown(value)}; it must be {allowed}{also}")


def _on_device(dtype: Any, option: str) -> Any:
    """Return ``dtype`` if this device converts to it and back, which is tried on the device."""
    numbers = np.array([-112, -1, 0, 3, 120], np.float32)  # exact in both
    try:
        converted = jax.jit(lambda x: x.astype(dtype))(numbers)
        back = np.asarray(jax.jit(lambda x: x.astype(jnp.float32) + 0.0)(converted))
    except Exception as error:  # the kinds of error differ between compilers
        back = np.array((str(error) or type(error).__name__).splitlines()[0])
    if not np.array_equal(back, numbers):
        kind = jax.local_devices()[0].device_kind
        raise StartupError(f"{option}: {kind} cannot compute with {dtype} ({back}); start without --{option}")
    return dtype
