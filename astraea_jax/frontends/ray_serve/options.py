"""Options of an app on Ray Serve: plain data, so that it travels, and no device is touched where it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from astraea_jax.agents import formats
from astraea_jax.agents.continuity import Mode
from astraea_jax.engine.config import EngineConfig, Seconds, Whole, check_option
from astraea_jax.errors import StartupError, shown
from astraea_jax.frontends.http.guard import Bounds
from astraea_jax.frontends.http.waiting import Limits

ENGINE_FIELDS: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(EngineConfig)}
LARGEST_MAX_SEQS = 256
"""Requests that run at once on the largest kind of device, unless ``max_seqs`` says otherwise."""


@dataclass(frozen=True)
class Options:
    """Everything that a replica needs to know.

    Raises:
        StartupError: a value cannot be; the message names it and what may be.
    """

    model: str = "astraea-tiny"
    """A folder that all machines have, a bundled model, an id of the Hugging Face hub, or with ``random_weights`` a
    published shape."""
    revision: str | None = None
    random_weights: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`~astraea_jax.engine.config.EngineConfig`. The devices decide what is left out, and they are
    known only where a replica runs."""
    processes: int = 1
    """Processes of one replica; each beyond the first has a bundle of the replica's placement group."""
    served_model_names: Sequence[str] = ()
    """Further names of the model."""
    call_format: str | None = None
    turn_continuity: Mode = "job"
    api_keys: Sequence[str] = field(default=(), repr=False)
    """Keys that calls need, or ``@FILE`` with one on each line, which every machine has. What a config file says is on
    Ray's dashboard for whoever reaches it, so keys belong into a file."""
    admin_keys: Sequence[str] = field(default=(), repr=False)
    allowed_hosts: Sequence[str] | None = None
    """Names by which HTTP requests may call the proxies; any by default."""
    max_body_bytes: int = Bounds.body_bytes
    max_wait_s: float = Limits.wait_s

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not isinstance(self.revision, str | None):
            raise StartupError(f"model is {shown(self.model)}, revision {shown(self.revision)}; they must be texts")
        if not isinstance(self.engine, Mapping):
            raise StartupError(f"engine is {shown(self.engine)}; it must be a mapping of fields, {{}} for none")
        if unknown := sorted(set(map(str, self.engine)) - set(ENGINE_FIELDS)):
            raise StartupError(f"engine has {', '.join(unknown)}; its fields are {', '.join(ENGINE_FIELDS)}")
        for name, value in self.engine.items():
            check_option(name, value)
        allowed: dict[str, tuple[object, ...]] = {
            "turn_continuity": get_args(Mode),
            "call_format": (None, *formats.NAMES),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise StartupError(f"{name} is {shown(value)}; it must be one of {', '.join(map(str, values))}")
        for name in ("processes", "max_body_bytes"):
            if (value := getattr(self, name)) not in Whole():
                raise StartupError(f"{name} is {shown(value)}; it must be {Whole()}")
        if self.max_wait_s not in Seconds():
            raise StartupError(f"max_wait_s is {shown(self.max_wait_s)}; it must be {Seconds()}")
        self._check_lists()

    def _check_lists(self) -> None:
        for name in ("served_model_names", "api_keys", "admin_keys", "allowed_hosts"):
            value = getattr(self, name)
            if value is None and name == "allowed_hosts":
                continue
            if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
                was = f"of type {type(value).__name__}" if "keys" in name else shown(value)  # a key is for no log
                raise StartupError(f"{name} is {was}; it must be a list of texts, [] for none")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Make them of named values.

        Raises:
            StartupError: a name is unknown, or a value cannot be.
        """
        names = [each.name for each in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise StartupError(f"there is no option {', '.join(unknown)}; there are {', '.join(names)}, deployment")
        return cls(**given)

    @property
    def at_once(self) -> int:
        """Requests that a replica takes at once: those that run and those that wait. Beyond that it refuses."""
        given = {name: value for name, value in self.engine.items() if value is not None}
        of = ENGINE_FIELDS | {"max_seqs": LARGEST_MAX_SEQS} | given
        return int(of["data_parallel"]) * (int(of["max_seqs"]) + int(of["max_queued"]))
