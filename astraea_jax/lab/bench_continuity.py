"""Measures what it costs to recognise a long conversation and to compare it with its known turns, per request.

An agent's history grows, turn by turn, until its prompt has as many tokens as asked for; its client prints arguments
anew and changes a header at every request. Then the parts of a request's work are timed, as medians. Rendering and
tokenising stand apart: every server does these, and one without continuity tokenises the whole history each time. No
device is involved, and all of it runs in the threads of the doors, never in the engine's.

  python scripts/bench_continuity.py
  python scripts/bench_continuity.py --tokens=10000,100000 --result_chars=20000
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

from absl import flags

from astraea_jax.agents import meaning
from astraea_jax.agents.continuity import Continuity
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.recognition import recognise
from astraea_jax.agents.turns import ids_of
from astraea_jax.agents.volatile import without_volatile
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.models import resolve
from astraea_jax.models.chat import normalise_messages
from astraea_jax.models.tokenizer import Tokenizer

T = TypeVar("T")

FLAGS = flags.FLAGS
flags.DEFINE_list("tokens", ["10000", "100000"], "Lengths of histories, in tokens.")
flags.DEFINE_integer("result_chars", 4000, "Characters of a tool's result.", lower_bound=1)
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


def main(_: list[str]) -> None:
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))
    found = [measure(tokenizer, int(tokens)) for tokens in FLAGS.tokens]
    columns = ("part", *(f"{figures['tokens']:,} tokens, {figures['messages']} messages" for figures in found))
    names = [name for name in found[0] if name not in ("messages", "tokens")]
    rows = [(name, *(f"{figures[name]:.2f}" for figures in found)) for name in names]
    publish("bench_continuity", [Section("Milliseconds per request, medians", columns, rows)], {"rows": found})


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
