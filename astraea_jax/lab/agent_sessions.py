"""Long sessions of an agent that thinks and calls several tools at once: what its model writes, what its tools return.

All of it is made up, and follows from a *ticket*, which names a session and a turn. A ticket stands in whatever the
client says last, so a model that is played by a script knows from its prompt what to write. The texts are as long as a
coding agent's, roughly: a few lines of thought, one to three calls, results of a page at most.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer

STOP = "<|im_end|>"
JOB = 10
"""Turns of a job: the last one answers, the others call tools."""
TAIL = 1_024
"""Tokens at the end of a prompt in which its ticket stands."""
TICKET = re.compile(r"\(ticket (\d+)-(\d+)\)")
SEPARATORS = ((", ", ": "), (",", ":"), (", ", ":"))
"""Ways in which models print JSON."""
SYSTEM = "You look after a code base. Read before you write, and say what you have found."
PIECES = (
    *("the reader", "the cache", "a test", "the scheduler", "this module", "the second branch", "its caller"),
    *("an older version", "the error path", "one of the options", "the loop", "a comment", "the table of names"),
)
DEEDS = (
    *("is read before", "depends on", "does not close", "is tested by", "hides", "waits for", "was written before"),
    *("shares its state with", "is slower than", "returns what comes from", "was meant to replace"),
)
TOOLS: Sequence[Mapping[str, Any]] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in arguments.items()},
                "required": [*arguments],
            },
        },
    }
    for name, text, arguments in (
        ("read_file", "Lines of a file.", {"path": "string", "first": "integer", "count": "integer"}),
        ("search", "Lines that match.", {"pattern": "string", "path": "string", "context": "integer"}),
        ("run_tests", "Outcome of tests.", {"path": "string", "quick": "boolean"}),
    )
)

THOUGHTS = "{{ '<think>\n' + m.reasoning_content | trim + '\n</think>\n\n' }}"
TEMPLATE = (
    """{%- set last = namespace(query=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.query = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- endif -%}
{%- if tools -%}
{{- '\n\nThere are these tools:\n' -}}{%- for tool in tools -%}{{ tool | tojson }}{{ '\n' }}{%- endfor -%}
{{- 'To call one, write <tool_call>\n{"name": its name, "arguments": an object}\n</tool_call>' -}}
{%- endif -%}{{- '<|im_end|>\n' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if m.reasoning_content and (KEEPS or loop.index0 > last.query) -%}"""
    + THOUGHTS
    + """{%- endif -%}
{{- (m.content or '') | trim -}}
{%- for call in m.tool_calls or [] -%}
{%- if not loop.first or (m.content or '') | trim -%}{{- '\n' -}}{%- endif -%}
{{- '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) -}}
{{- '\n</tool_call>' -}}
{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif not loop.first or m.role != 'system' -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
)
TEMPLATES = {
    "drops thoughts": TEMPLATE.replace("KEEPS", "false"),
    "keeps thoughts": TEMPLATE.replace("KEEPS", "true"),
}
"""Like Qwen3's in what matters: the first one leaves out the thoughts before the last message of the user, the second
one leaves out none."""


def make_tokenizer(template: str) -> Tokenizer:
    """Make the bundled model's tokenizer with a chat template of :data:`TEMPLATES`, and with tags for thoughts."""
    raw = tokenizers.Tokenizer.from_file(str(resolve("astraea-tiny") / "tokenizer.json"))
    raw.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    stop = raw.token_to_id(STOP)
    assert stop is not None
    return Tokenizer(raw, bos_id=None, eos_ids=frozenset({stop}), template=TEMPLATES[template], special={})


@dataclass(frozen=True)
class Ticket:
    """A turn of a session."""

    session: int
    turn: int

    def __str__(self) -> str:
        return f"(ticket {self.session}-{self.turn})"

    @property
    def begins_job(self) -> bool:
        """Whether the user says something before it."""
        return self.turn % JOB == 0

    @property
    def _random(self) -> random.Random:
        return random.Random(str(self))

    def question(self) -> str:
        """Return what the user says before the turn."""
        return f"{prose(self._random, 4)} Why is that? {self}"

    def result(self, call: int) -> str:
        """Return the result of a call of the turn before this one."""
        return f"{prose(random.Random(f'{self} {call}'), 12)} {self}"

    def seconds(self, call: int) -> float:
        """Return how long a call of the turn before this one takes: half a second, now and then several."""
        return random.Random(f"seconds {self} {call}").lognormvariate(math.log(0.5), 0.8)

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls that the model makes in the turn."""
        rng = random.Random(f"calls {self}")
        return [] if self.turn % JOB == JOB - 1 else [_call(rng) for _ in range(rng.randint(1, 3))]

    def written(self) -> str:
        """Return what the model writes in the turn; it prints JSON in a way of its own."""
        rng = self._random
        thought, said = prose(rng, rng.randint(2, 6)), prose(rng, rng.randint(1, 2))
        printed = [json.dumps(call, separators=rng.choice(SEPARATORS)) for call in self.calls()]
        tagged = [f"<tool_call>\n{call}\n</tool_call>" for call in printed]
        return "\n".join([f"<think>\n{thought}\n</think>\n\n{said}", *tagged])


def prose(rng: random.Random, sentences: int) -> str:
    """Make sentences that say nothing."""
    parts = ((rng.choice(PIECES).capitalize(), rng.choice(DEEDS), rng.choice(PIECES)) for _ in range(sentences))
    return " ".join(" ".join(part) + "." for part in parts)


def _call(rng: random.Random) -> dict[str, Any]:
    path = f"src/{rng.choice('abcdefgh')}{rng.randrange(100)}/reader.py"
    arguments: dict[str, dict[str, Any]] = {
        "read_file": {"path": path, "first": rng.randrange(900), "count": 40},
        "search": {"pattern": f"def .*{rng.choice(PIECES)}", "path": path, "context": rng.randrange(5)},
        "run_tests": {"path": path, "quick": rng.random() < 0.5},
    }
    name = rng.choice([*arguments])
    return {"name": name, "arguments": arguments[name]}


class Author:
    """Writes for the model. Now and then it divides a text into tokens otherwise than the tokenizer, as models do.

    Args:
        tokenizer: of the model.
        odd: share of turns that are so divided, each at one place.
    """

    def __init__(self, tokenizer: Tokenizer, odd: float = 0.25):
        self._tokenizer, self._odd = tokenizer, odd

    def __call__(self, prompt: Sequence[int]) -> list[int]:
        """Write after a prompt.

        Raises:
            RuntimeError: it has no ticket.
        """
        found = TICKET.findall(self._tokenizer.decode(prompt[-TAIL:], delimiters=True))
        if not found:
            raise RuntimeError("the prompt ends without a ticket")
        ticket = Ticket(*map(int, found[-1]))
        rng, text = random.Random(f"divided {ticket}"), ticket.written()
        at = rng.randrange(len(text)) if rng.random() < self._odd else 0
        return [i for part in (text[:at], text[at:], STOP) if part for i in self._tokenizer.encode_after(part)]
