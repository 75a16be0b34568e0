"""Makes the prompt of a request from the true tokens of the turns before it, and tokenises only what is new.

A history that is rendered again is seldom made of the tokens that were generated: templates print arguments in their
own way and leave thoughts out, and tokenisers divide text otherwise than a model does. Here the rendering of the whole
history is laid beside the known turns. What stands between turns must be the same, character by character. A turn may
be rendered in any way as long as the template does not intend another text than it did within the turn's job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from astraea_jax.agents.meaning import Message
from astraea_jax.agents.turns import Turn, ids_of
from astraea_jax.models.tokenizer import Tokenizer

Mode = Literal["off", "job", "session"]
Why = Literal["new", "same", "messages", "tools", "text", "template", "cut", "border", "off"]
"""Why the known part of a prompt ends where it does: nothing was known; everything known goes on; a message, the tools
or the template's text between turns differ; the template intends another text for a turn; a turn did not reach the
client as it was generated; new text cannot be tokenised by itself; continuity is off."""

MAX_PROMPTS = 256
"""Generation prompts that are remembered."""
ANSWER, NEXT = "answer of a probe", "message after a probe"


class Place(NamedTuple):
    """Where a turn stands in a rendering."""

    begin: int
    stop: int
    """Where its stop text begins."""
    end: int


class Chat(NamedTuple):
    """What is rendered."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None
    template_arguments: Mapping[str, Any]


class Prompt(NamedTuple):
    """A prompt that was made, and what later ones can build on."""

    ids: list[int]
    why: Why
    message: int | None = None
    """The first message that is not known like this."""
    kept: int = 0
    """Tokens at its beginning that are those of known turns."""
    base: Turn | None = None
    """The last known turn that it continues token by token."""
    new: int = 0
    """Where the tokens after this turn begin."""
    text: str = ""
    """The rendering after this turn, without the generation prompt."""
    undo: int = 0
    """See :class:`.turns.Piece`."""


class Continuity:
    """Continues chats of one model.

    Args:
        tokenizer: of the model.
        mode: ``"job"``: the template's will is done about turns of earlier jobs; ``"session"``: the tokens of all turns
            stay, whatever a template leaves out later.
    """

    def __init__(self, tokenizer: Tokenizer, mode: Mode):
        self._tokenizer = tokenizer
        self._mode = mode
        added = tokenizer.added_tokens()
        self.stops = {i: text for text, i in added.items() if i in tokenizer.eos_ids}
        """Tokens that end a turn and are always told from the text around them."""
        texts = sorted(self.stops.values(), key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._ids = {text: i for i, text in self.stops.items()}
        self._generation_prompts: dict[tuple[bool, str, str], str] = {}
        self._ends_turns: dict[tuple[bool, bool, bool], bool] = {}

    def prompt(self, chat: Chat, turns: Sequence[Turn], job: int, *, generation_prompt: bool = True) -> Prompt:
        """The prompt of a chat.

        Args:
            chat: the history, in which known turns stand as they were generated.
            turns: all of it that is known.
            job: number of the job that goes on; of a new one, any other.
            generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            CheckpointError, TypeError, ValueError: the chat cannot be rendered or tokenised.
        """
        rendered = self._render(chat, generation_prompt)
        end = len(rendered) - (len(self._generation_prompt(rendered, chat)) if generation_prompt else 0)
        known = turns[-1].pieces() if turns else []
        places, why, message = self._places(rendered, chat, turns, known, job)
        if places:
            kept, at = known[: len(places)], places[-1]
            new = self._after(rendered, at, kept[-1])
            if new is not None:
                before = ids_of(kept)
                same = len(before) + common(new, known[len(places) :])
                return Prompt(before + new, why, message, same, kept[-1], len(before), rendered[at.end : end])
            why, message = "border", kept[-1].end - 1
        ids = self._tokenizer.encode_rendered(rendered)
        return Prompt(ids, why, message, common(ids, known), text=rendered[:end])

    def _places(
        self, rendered: str, chat: Chat, turns: Sequence[Turn], known: Sequence[Turn], job: int
    ) -> tuple[list[Place], Why, int | None]:
        """Where the turns stand whose tokens stay, and why and at which message these end."""
        places = self._find(rendered, known)
        if places and len(places) == len(known) and not self._ends(chat, known[-1]):
            places = places[:-1]
        for i, (turn, place) in enumerate(zip(known, places, strict=False)):
            if not self._accepts(turn, rendered[place.begin : place.end], chat, known[: i + 1], job):
                return places[:i], "template", turn.end - 1
        if len(places) < len(known):
            turn, at = known[len(places)], places[-1].end if places else 0
            assert turn.piece is not None
            if rendered.startswith(turn.piece.text, at):
                return places, "template", turn.end - 1
            other: Why = "text" if chat.tools == turn.program.tools else "tools"
            return places, other, 0 if turn.previous is None else turn.previous.end
        last = known[-1].end if known else 0
        cut = next((turn.end - 1 for turn in turns if turn.end > last and turn.answer is not None), None)
        return places, "new" if not turns else "same" if cut is None else "cut", cut

    def _render(self, chat: Chat, add_generation_prompt: bool) -> str:
        return self._tokenizer.render_chat(
            chat.messages, chat.tools, add_generation_prompt=add_generation_prompt, **chat.template_arguments
        )

    def _render_ended(self, chat: Chat) -> str:
        """The chat without a generation prompt; nothing if the template refuses that."""
        try:
            return self._render(chat, False)
        except ValueError:
            return ""

    def _find(self, rendered: str, known: Sequence[Turn]) -> list[Place]:
        """Where the turns of ``known`` stand, up to the first that is not found."""
        places: list[Place] = []
        at = 0
        for turn in known:
            piece = turn.piece
            assert piece is not None
            begin = at + len(piece.text)
            stop = self._stop.search(rendered, begin)
            found = stop is not None and piece.stop in (None, stop[0]) and rendered.startswith(piece.text, at)
            if stop is None or not found:
                break
            at = stop.end()
            places.append(Place(begin, stop.start(), at))
        return places

    def _accepts(self, turn: Turn, rendered: str, chat: Chat, known: Sequence[Turn], job: int) -> bool:
        """Whether the tokens of a turn stay: the template intends ``rendered`` now."""
        piece = turn.piece
        assert piece is not None
        if piece.rendered is None:
            if turn.job == job:
                piece.rendered = rendered
            elif self._mode == "job":
                ended = Chat(chat.messages[: turn.end], chat.tools, chat.template_arguments)
                before = self._render_ended(ended)
                places = self._find(before, known)
                if len(places) < len(known):
                    return False
                piece.rendered = before[places[-1].begin : places[-1].end]
        return self._mode == "session" or turn.job == job or piece.rendered == rendered

    def _after(self, rendered: str, place: Place, turn: Turn) -> list[int] | None:
        """Tokens of what follows a turn; None if they cannot be told without what comes before."""
        assert turn.piece is not None
        ids = self._tokenizer.encode_rendered(rendered[place.stop :])
        if ids[:1] != [self._ids[rendered[place.stop : place.end]]]:
            return None
        return ids if turn.piece.stop is None else ids[1:]

    def _generation_prompt(self, rendered: str, chat: Chat) -> str:
        """The end of a rendering that is there for the generation only."""
        arguments = json.dumps(chat.template_arguments, sort_keys=True, default=str)
        key = (chat.tools is not None, arguments, chat.messages[-1]["role"])
        prompt = self._generation_prompts.get(key)
        if prompt is None or not rendered.endswith(prompt):
            without = self._render_ended(chat)
            prompt = rendered[len(without) if rendered.startswith(without) else _agreeing(rendered, without) :]
            if len(self._generation_prompts) >= MAX_PROMPTS:
                self._generation_prompts.clear()
            self._generation_prompts[key] = prompt
        return prompt

    def _ends(self, chat: Chat, turn: Turn) -> bool:
        """Whether the template writes a stop text between a turn like ``turn`` and the message after it.

        Otherwise the first stop text would be that of the next message, which would be taken for a part of the turn.
        """
        calls = turn.answer is not None and bool(turn.answer.get("tool_calls"))
        key = (chat.tools is not None, calls, chat.messages[turn.end]["role"] == "tool")
        if key not in self._ends_turns:
            self._ends_turns[key] = self._probe(chat.tools, calls, key[2])
        return self._ends_turns[key]

    def _probe(self, tools: Sequence[Any] | None, calls: bool, answered: bool) -> bool:
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": ANSWER}}}
        said = {"content": "", "tool_calls": [call]} if calls else {"content": ANSWER}
        then = {"role": "tool", "name": "f", "tool_call_id": call["id"]} if answered else {"role": "user"}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", **said}, {**then, "content": NEXT}]
        try:
            rendered = self._tokenizer.render_chat(messages, tools, add_generation_prompt=False)
        except ValueError:
            return False
        begin = rendered.find(ANSWER)
        stop = self._stop.search(rendered, max(begin, 0))
        return begin >= 0 and stop is not None and stop.start() < rendered.find(NEXT, begin)


def common(ids: Sequence[int], known: Sequence[Turn]) -> int:
    """How many tokens at the beginning of ``ids`` are those of the known turns."""
    return _agreeing(ids, ids_of(known))


def _agreeing(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
