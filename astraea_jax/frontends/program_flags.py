"""Continuity of turns as command-line flags; both front doors share what comes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import get_args

from absl import flags

from astraea_jax.agents.continuity import Mode
from astraea_jax.agents.conversations import Conversations
from astraea_jax.engine.interface import Serving
from astraea_jax.frontends.programs import Programs


def program_flags() -> Callable[[Serving], Programs]:
    """Define the flags; return a function that makes :class:`.programs.Programs` of their values and an engine."""
    flags.DEFINE_enum(
        "turn_continuity",
        "job",
        [*get_args(Mode)],
        "How turns go on from the tokens of earlier ones: off: every prompt is what the template makes of what the "
        "client sent; job: within a job, the template's will is done about earlier jobs; session: thoughts of earlier "
        "jobs stay, too.",
    )
    flags.DEFINE_bool(
        "keep_volatile_headers", False, "Keep lines that known clients change with every request in the prompt."
    )
    for name in ("turn_continuity", "keep_volatile_headers"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def programs(engine: Serving) -> Programs:
        chosen = flags.FLAGS
        normalise, ttl_s = not chosen.keep_volatile_headers, engine.config.session_ttl_s
        return Programs(
            engine, Conversations(engine.tokenizer, chosen.turn_continuity, normalise=normalise, ttl_s=ttl_s)
        )

    return programs
