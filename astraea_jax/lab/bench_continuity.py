"""Measures what turns reuse of the turns before them, and what it costs to recognise a long conversation.

First, agents that think and call several tools at once run long sessions through every API, with each mode of
``--turn_continuity``, on a pretended device whose model writes what a script says (:mod:`.continuity_load`); and the
bundled model works for some on this machine's device.

Then an agent's history grows, turn by turn, until its prompt has as many tokens as asked for; its client prints
arguments anew and changes a header at every request. Then the parts of a request's work are timed, as medians.
Rendering and tokenising stand apart: every server does these, and one without continuity tokenises the whole history
each time. No device is involved, and all of it runs in the threads of the doors, never in the engine's.

  python scripts/bench_continuity.py
  python scripts/bench_continuity.py --sessions=0 --tokens=10000,100000 --result_chars=20000
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

from absl import flags

from astraea_jax.agents import meaning
from astraea_jax.agents.continuity import Continuity, Mode
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.recognition import recognise
from astraea_jax.agents.turns import ids_of
from astraea_jax.agents.volatile import without_volatile
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.agent_sessions import TEMPLATES
from astraea_jax.lab.continuity_load import MODES, measure_bundled
from astraea_jax.lab.continuity_load import measure as measure_reuse
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.models import resolve
from astraea_jax.models.chat import normalise_messages
from astraea_jax.models.tokenizer import Tokenizer

T = TypeVar("T")

FLAGS = flags.FLAGS
flags.DEFINE_list("tokens", ["10000", "100000"], "Lengths of histories, in tokens.")
flags.DEFINE_integer("result_chars", 4000, "Characters of a tool's result.", lower_bound=1)
flags.DEFINE_integer("turns", 30, "Turns of a session.", lower_bound=2)
flags.DEFINE_integer("sessions", 2, "Sessions of each API; 0: leave these out.", lower_bound=0)
flags.DEFINE_integer("runs", 15, "Times that each part is measured.", lower_bound=1)
define_flags("bench_continuity")

OWNER, SESSION = "owner", "session"
WORDS = "the price of lamp no. 47 is 14 coins; "


def grown(conversations: Conversations, tokenizer: Tokenizer, tokens: int) -> list[dict[str, Any]]:
    """The messages of a session that has grown to a prompt of so many tokens."""
    result = (WORDS * (FLAGS.result_chars // len(WORDS) + 1))[: FLAGS.result_chars]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "x-anthropic-billing-header: cch=00000;\nYou sell lamps."},
        {"role": "user", "content": "What do they cost?"},
    ]
    while True:
        messages[0] = {
            **messages[0],
            "content": f"x-anthropic-billing-header: cch={len(messages):05x};\nYou sell lamps.",
        }
        opened = conversations.begin(OWNER, SESSION, messages)
        if len(opened.prompt) >= tokens:
            opened.ended()
            return messages
        arguments = {"item": f"lamp {len(messages)}", "shop": WORDS}
        ids = tokenizer.encode(f"<tool_call>{json.dumps(arguments, indent=1)}</tool_call>")
        call = {"type": "function", "id": f"call{len(messages):05}", "function": {"name": "price"}}
        call["function"] = {"name": "price", "arguments": json.dumps(arguments, separators=(",", ":"))}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        opened.ended([*ids, *sorted(tokenizer.eos_ids)[-1:]], answer, "tool_calls")
        messages += [answer, {"role": "tool", "tool_call_id": call["id"], "name": "price", "content": result}]


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Median milliseconds, and what comes of it."""
    times = []
    for _ in range(FLAGS.runs):
        began = time.perf_counter()
        found = work()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times), found


def measure(tokenizer: Tokenizer, tokens: int) -> dict[str, float]:
    """Milliseconds of each part of the work on one request."""
    conversations = Conversations(tokenizer)
    messages = grown(conversations, tokenizer, tokens)
    owner = conversations.owners.get(OWNER, time.monotonic())
    given = normalise_messages(messages)
    parts: dict[str, float] = {}
    parts["volatile headers"], (stable, _) = timed(lambda: without_volatile(given))
    parts["digests of all messages"], digests = timed(lambda: meaning.digests(stable))
    parts["the longest known history"], match = timed(lambda: recognise(owner, SESSION, stable, digests))
    parts["turns as they were generated"], chat = timed(lambda: match.restored(stable))
    assert match.turn is not None
    known = match.turn.pieces()
    rendering, rendered = timed(lambda: tokenizer.render_chat(chat))
    continuity = Continuity(tokenizer, "job")
    parts["turns in the rendering"], places = timed(lambda: continuity.find(rendered, known))
    assert len(places) == len(known), "not all of the history was found again"
    parts = {"recognised and compared": sum(parts.values()), **parts}
    parts["rendering"] = rendering
    parts["a list of the known tokens"], ids = timed(lambda: ids_of(known))
    parts["tokenising what is new"], _ = timed(lambda: tokenizer.encode_rendered(rendered[places[-1].stop :]))
    parts["tokenising everything"], _ = timed(lambda: tokenizer.encode_rendered(rendered))
    return {"messages": len(messages), "tokens": len(ids), **parts}


WAYS: tuple[tuple[str, Mode, bool], ...] = (
    ("off", "off", True),
    ("off, header unchanged", "off", False),
    ("job", "job", True),
    ("session", "session", True),
)
"""Name of a column, its mode, and whether clients change a header at every request."""
FIGURES = "share of the reusable prefix from the cache within a job · tokens computed per prompt there · for a new job"


async def measure_sessions() -> tuple[list[Section], dict[str, Any]]:
    """Run the sessions; returns their tables and figures."""
    sections: list[Section] = []
    figures: dict[str, Any] = {}
    for template in TEMPLATES:
        found = {
            name: await measure_reuse(template, mode, FLAGS.turns, FLAGS.sessions, changes_header=changes)
            for name, mode, changes in WAYS
        }
        figures[template] = {name: {api: asdict(one) for api, one in way.items()} for name, way in found.items()}
        rows = [(api, *(way[api].text() for way in found.values())) for api in found["job"]]
        sections.append(Section(f"A template that {template}: {FIGURES}", ("", *found), rows))
    bundled = {mode: await measure_bundled(mode, 4 * FLAGS.sessions) for mode in MODES}
    figures["bundled"] = {mode: asdict(one) for mode, one in bundled.items()}
    row = ("astraea-tiny", *(one.text() for one in bundled.values()))
    sections.append(Section(f"The bundled model, on this device: {FIGURES}", ("", *MODES), [row]))
    return sections, figures


def main(_: list[str]) -> None:
    sections, figures = asyncio.run(measure_sessions()) if FLAGS.sessions else ([], {})
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))
    found = [measure(tokenizer, int(tokens)) for tokens in FLAGS.tokens]
    columns = ("part", *(f"{figures['tokens']:,} tokens, {figures['messages']} messages" for figures in found))
    names = [name for name in found[0] if name not in ("messages", "tokens")]
    rows = [(name, *(f"{figures[name]:.2f}" for figures in found)) for name in names]
    sections.append(Section("Milliseconds per request, medians", columns, rows))
    publish("bench_continuity", sections, {"rows": found, "sessions": figures})


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
