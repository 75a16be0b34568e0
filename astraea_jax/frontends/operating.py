"""The operator's means: metrics, the status page, profiles; and the flags for them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from absl import flags

from astraea_jax.engine.interface import Serving
from astraea_jax.errors import StartupError
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.metrics import PREFIX, Metrics
from astraea_jax.frontends.profiling import Profiler, check_folder
from astraea_jax.frontends.status import Status
from astraea_jax.frontends.tracing import tracing_flags


@dataclass(frozen=True)
class Operator:
    """The parts of a server that are there for its operator."""

    metrics: Metrics
    status: Status
    profiler: Profiler

    @classmethod
    def of(
        cls,
        engine: Serving,
        model: str,
        prefix: str = PREFIX,
        profile_dir: str | None = None,
        continued: Mapping[str, int] | None = None,
    ) -> Operator:
        """Make them for an engine that serves ``model``, and whose front doors count how turns continue.

        Raises:
            StartupError: there is no such folder for profiles, and it cannot be made.
        """
        folder = None if profile_dir is None else check_folder(profile_dir)
        return cls(Metrics(engine, model, prefix, continued), Status(engine, model), Profiler(folder))


def operator_flags() -> Callable[[Serving, str, Mapping[str, int]], Operator]:
    """Define the flags; return a function that makes an :class:`Operator` of their values.

    The function takes an engine, its model and counts of how turns continue. It also begins to trace the engine's
    requests, if the flags say where to.
    """
    flags.DEFINE_string("metrics_prefix", PREFIX, "What metrics' names begin with; vllm: for dashboards made for vLLM.")
    flags.DEFINE_string(
        "profile_dir", None, "Folder for profiles, which the admin key begins; by default none are taken."
    )
    flags.register_validator(
        "metrics_prefix",
        lambda prefix: re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,63}", prefix) is not None,
        "it must be letters, digits, _ and : and not begin with a digit",
    )
    for name in ("metrics_prefix", "profile_dir"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    trace = tracing_flags()

    def operator(engine: Serving, model: str, continued: Mapping[str, int]) -> Operator:
        chosen = flags.FLAGS
        trace(engine, model)
        return Operator.of(engine, model, chosen.metrics_prefix, chosen.profile_dir, continued)

    return operator


def check_profiles(keys: Keys, *, http: bool) -> None:
    """Refuse ``--profile_dir`` where nobody could take profiles.

    Raises:
        StartupError: there is no admin key, or no HTTP.
    """
    if flags.FLAGS.profile_dir is not None and not (keys.administered and http):
        raise StartupError("--profile_dir needs --admin_key, which alone takes profiles, and HTTP; give both")
