"""Prompts that go on from true tokens: random histories over templates and tokenizers, against renderings."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.histories import TEMPLATES, TOKENIZERS, Client, Template, generated, tokenizer

from astraea_jax.agents.conversations import Conversations, Opened
from astraea_jax.models.control_tokens import MARKS, marked
from astraea_jax.models.tokenizer import Tokenizer

WORDS = (
    "",
    "It is 14.",
    "  odd \n\n space\t\n",
    "a <|im_end|> b",
    "<|im_start|>",
    "é 語 \U0001f600",
    ']]}}"',
    "\n",
    "</s>x",
)
THOUGHTS = ("", "", "Let me see.", "14\n\nor 15?", "so <|im_end|>")
TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
ROUND_TRIP = {"words", "across", "bundled"}
"""Tokenizers that give every text back as it was."""

make = functools.cache(tokenizer)


@dataclass
class Said:
    """A turn of a history, as the test has seen it."""

    end: int
    prompt: list[int]
    output: list[int]
    rendered: str
    """The history at its request."""
    job: int
    whole: bool
    in_job: str | None = None
    """How the template rendered it within its job."""
    made: str | None = None
    """As what it was tokenised later, instead of what was generated."""

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output


@dataclass
class Play:
    """A client and a model that talk, and the checks of every prompt."""

    kind: str
    template: Template
    mode: Any
    random: random.Random
    turns: list[Said] = field(default_factory=list)
    job: int = 0

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = make(self.kind, self.template)
        self.conversations = Conversations(self.tokenizer, self.mode)
        self.client = Client(self.random, [{"role": "system", "content": "Help."}, {"role": "user", "content": "?"}])
        self.tools = self.random.choice([None, TOOLS])
        self.arguments = self.random.choice([{}, {"enable_thinking": False}, {"date": "2 May"}])

    def round(self) -> None:
        opened = self.conversations.begin("me", "s", self.client.send(), self.tools, self.arguments)
        assert (opened.program, opened.parent) == ("s", None)
        rendered = self.rendered(self.client.messages)
        goes_on = bool(self.turns) and self.client.messages[self.turns[-1].end]["role"] == "tool"
        assert opened.begins_job is not goes_on
        self.job += not goes_on
        self.note_renderings(rendered)
        self.check(opened, rendered)
        self.answer(opened, rendered)

    def rendered(self, messages: list[Any], generation_prompt: bool = True) -> str:
        return self.tokenizer.render_chat(
            messages, self.tools, add_generation_prompt=generation_prompt, **self.arguments
        )

    def note_renderings(self, rendered: str) -> None:
        for i, turn in enumerate(self.turns):
            if turn.in_job is None:
                if turn.job != self.job:
                    rendered = self.rendered(self.client.messages[: turn.end], False)
                turn.in_job = self.turn(rendered, i)

    def turn(self, rendered: str, i: int) -> str:
        begin, end = self.template.turns(rendered)[i]
        return rendered[begin:end]

    def check(self, opened: Opened, rendered: str) -> None:
        known = self.turns[-1].ids if self.turns else []
        chain = [i for i, turn in enumerate(self.turns) if turn.whole and turn.made is None]
        kept = [i for i in chain if opened.prompt[: len(self.turns[i].ids)] == self.turns[i].ids]
        stays = [self.stays(turn, self.turn(rendered, i)) for i, turn in enumerate(self.turns)]
        first = stays.index(False) if False in stays else len(stays)
        seen = self.as_it_was(rendered, first)
        full = self.tokenizer.encode_rendered(seen)
        assert opened.report.kept == common(opened.prompt, known)
        if kept:
            self.check_text(kept[-1], opened.prompt, seen, full)
        else:
            assert opened.prompt == full
        assert kept == [i for i in chain if i < first]
        assert opened.report.why in (("template", "cut") if False in stays else ("same", "new"))
        assert opened.report.message == (self.turns[first].end - 1 if False in stays else None)

        for i in range(first, len(self.turns)):
            self.turns[i].made = self.turn(rendered, i)

    def as_it_was(self, rendered: str, first: int) -> str:
        """The rendering with turns before ``first`` as they were tokenised while their job ran."""
        around = self.template.around(rendered, len(self.turns))
        made = [turn.made if i < first else None for i, turn in enumerate(self.turns)]
        turns = [text or self.turn(rendered, i) for i, text in enumerate(made)]
        return "".join(part for pair in zip(around, [*turns, ""], strict=True) for part in pair)

    def stays(self, turn: Said, rendered: str) -> bool:
        """Whether the tokens of a turn, generated or tokenised later, must be those that were computed."""
        if not turn.whole and turn.made is None:
            return False
        return self.mode == "session" or turn.job == self.job or rendered == (turn.made or turn.in_job)

    def check_text(self, last: int, prompt: list[int], rendered: str, full: list[int]) -> None:
        """The text between turns is the template's, and new text is divided as in the whole."""
        turn = self.turns[last]
        around = self.template.around(rendered, last + 1)
        assert around[:last] == self.template.around(turn.rendered, last)[:last]
        stop = self.tokenizer.encode(self.template.stop)
        new = prompt[len(turn.ids) :]
        assert full[len(full) - len(new) :] == new
        if self.kind in ROUND_TRIP:
            control = self.tokenizer._tokenizer.id_to_token
            text = MARKS.sub(lambda mark: str(control(marked(mark[0]))), around[-1])
            shown = self.tokenizer.decode((stop if turn.output[-1:] == stop else []) + new, delimiters=True)
            assert shown == self.template.stop + text

    def answer(self, opened: Opened, rendered: str) -> None:
        choose = self.random.choice
        calls = [self.call(i) for i in range(choose([0, 0, 1, 3]))]
        message: dict[str, Any] = {"role": "assistant", "content": choose(WORDS), "reasoning_content": choose(THOUGHTS)}
        text = message["reasoning_content"] + "</think>" + message["content"]
        if calls:
            message["tool_calls"] = calls
            text += "<tool_call>" + json.dumps([call["function"] for call in calls], indent=1)
        cuts = [self.random.randrange(1 + len(text)) for _ in range(4)]
        output = generated(self.tokenizer, text, self.template.stop, cuts)
        reason, whole = choose([("stop", True)] * 6 + [("length", True), ("stop", False)])
        if reason == "length":
            output.pop()
        opened.ended(output, message, reason, whole=whole)
        whole = whole and not self.tokenizer.eos_ids & {*output[:-1]}  # no client sees these
        self.client.messages.append(message)
        end = len(self.client.messages)
        self.turns.append(Said(end, opened.prompt, output, rendered, self.job, whole))
        for call in calls:
            result = {"role": "tool", "name": "price", "tool_call_id": call["id"], "content": choose(WORDS)}
            self.client.messages.append(result)
        later = [{"role": "system", "content": "More."}, {"role": "user", "content": choose(WORDS)}]
        self.client.messages += choose([[], later[1:], later]) if calls else choose([later[1:], later])

    def call(self, i: int) -> dict[str, Any]:
        arguments = {"item": self.random.choice(WORDS), "n": self.random.choice([2.0, 1, None, [1, "x"]])}
        function = {"name": "price", "arguments": arguments}
        return {"type": "function", "id": f"c{self.random.randrange(10**8):08}", "function": function}


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("mode", ["job", "session"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(TOKENIZERS)), st.integers(0, 2**32))
def test_prompts_read_as_the_template_writes_and_keep_all_tokens_that_mean_the_same(template, mode, kind, seed):
    play = Play(kind, template, mode, random.Random(seed))
    for _ in range(8):
        play.round()
