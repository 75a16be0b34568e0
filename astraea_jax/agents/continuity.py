"""Makes the prompt of a request from the true tokens of the turns before it, and tokenises only what is new.

A history that is rendered again is seldom made of the tokens that were generated: templates print arguments in their
own way and leave thoughts out, and tokenisers divide text otherwise than a model does. Here the rendering of the whole
history is laid beside the known turns. What stands between turns must be the same, character by character. A turn may
be rendered in any way as long as the template does not intend another text than it did within the turn's job.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from astraea_jax.agents.meaning import Message
from astraea_jax.agents.turns import Piece, Turn, ids_of
from astraea_jax.engine.encoding import check_length
from astraea_jax.models.tokenizer import Tokenizer

Mode = Literal["off", "job", "session"]
Why = Literal["new", "same", "messages", "tools", "text", "template", "cut", "border", "off"]
"""Why the known part of a prompt ends where it does: nothing was known; everything known goes on; a message, the tools
or the template's text between turns differ; the template intends another text for a turn; a turn did not reach the
client as it was generated; new text cannot be tokenised by itself; continuity is off."""

MAX_PROMPTS = 256
"""Generation prompts that are remembered."""
MAX_PROMPT_CHARS = 4096
"""Length of such a prompt."""
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
    base: Piece | None = None
    """The last turn before the new text."""
    fresh: Sequence[Piece] = ()
    """Turns up to this one that were tokenised anew."""
    new: int = 0
    """Where the tokens of the new text begin."""
    text: str = ""
    """The new text, without the generation prompt."""
    undo: int = 0
    """See :class:`.turns.Piece`."""


class Continuity:
    """Continues chats of one model.

    Args:
        tokenizer: of the model.
        mode: ``"job"``: where the template intends another text for turns of earlier jobs, it is tokenised anew;
            ``"session"``: the tokens of all turns stay, whatever a template leaves out later.
        max_context: chats that cannot fit into so many tokens are refused before they are tokenised; None: none is.
    """

    def __init__(self, tokenizer: Tokenizer, mode: Mode, max_context: int | None = None):
        self._max_context = max_context
        self._tokenizer = tokenizer
        self._mode = mode
        self._ids = {text: i for text, i in tokenizer.added_tokens().items() if i in tokenizer.eos_ids}
        self._texts = {i: text for text, i in self._ids.items()}
        stops = sorted(self._ids, key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, stops)) or "(?!)")
        self._generation_prompts: dict[bytes, str] = {}
        self._ends_turns: dict[tuple[bool, bool, bool], bool] = {}

    def stop_of(self, ids: Sequence[int]) -> str | None:
        """Return the text of the stop token with which generated tokens end, if they do."""
        return self._texts.get(ids[-1]) if ids else None

    def prompt(self, chat: Chat, turns: Sequence[Turn], job: int, *, generation_prompt: bool = True) -> Prompt:
        """Return the prompt of a chat.

        Args:
            chat: the history, in which known turns stand as they were generated.
            turns: all of it that is known.
            job: number of the job that goes on; of a new one, any other.
            generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            CheckpointError, TypeError, ValueError: the chat cannot be rendered or tokenised.
        """
        rendered = self.rendered(chat, generation_prompt)
        end = len(rendered) - (len(self._generation_prompt(rendered, chat)) if generation_prompt else 0)
        known = turns[-1].pieces() if turns else []
        places = self.find(rendered, known)
        if places and len(places) == len(known) and not self._ends(chat, known[-1]):
            places.pop()
        kept, why, message = self._kept(rendered, chat, turns, known, places, job)
        before = ids_of(known[:kept])
        try:
            fresh, new = self._tokenised(rendered, known, places, kept)
        except _NoBorder:
            ids = self._tokenizer.encode_rendered(rendered)
            return Prompt(ids, "border", 0, agreeing(ids, ids_of(known)), text=rendered[:end])
        base = fresh[-1] if fresh else known[kept - 1] if kept else None
        ids = before + ids_of(fresh)
        same = len(before) + agreeing([*ids[len(before) :], *new], ids_of(known[kept:]))
        begin = places[-1].end if places else 0
        return Prompt(ids + new, why, message, same, base, fresh, len(ids), rendered[begin:end])

    def rendered(self, chat: Chat, add_generation_prompt: bool) -> str:
        """Return the chat as :meth:`~astraea_jax.models.tokenizer.Tokenizer.render_chat` returns it.

        Raises:
            CheckpointError, TypeError, ValueError: the same.
            RequestError: it cannot fit into the context.
        """
        rendered = self._tokenizer.render_chat(
            chat.messages, chat.tools, add_generation_prompt=add_generation_prompt, **chat.template_arguments
        )
        if self._max_context is not None:
            check_length(self._tokenizer, len(rendered), self._max_context)
        return rendered

    def _render_ended(self, chat: Chat) -> str:
        """Return the chat without a generation prompt; nothing if the template refuses that."""
        try:
            return self.rendered(chat, False)
        except ValueError:
            return ""

    def find(self, rendered: str, known: Sequence[Piece]) -> list[Place]:
        """Return where the turns of ``known`` stand, up to the first that is not found."""
        places: list[Place] = []
        at = 0
        for piece in known:
            begin = at + len(piece.text)
            stop = self._stop.search(rendered, begin)
            found = stop is not None and piece.stop in (None, stop[0]) and rendered.startswith(piece.text, at)
            if stop is None or not found:
                break
            at = stop.end()
            places.append(Place(begin, stop.start(), at))
        return places

    def _kept(
        self,
        rendered: str,
        chat: Chat,
        turns: Sequence[Turn],
        known: Sequence[Piece],
        places: Sequence[Place],
        job: int,
    ) -> tuple[int, Why, int | None]:
        """Tell how many known turns stay token by token, why no more, and which message is the first other one."""
        for i, (piece, place) in enumerate(zip(known, places, strict=False)):
            if not piece.whole:
                return i, "cut", piece.end - 1
            if not self._accepts(piece, rendered[place.begin : place.end], chat, known[: i + 1], job):
                return i, "template", piece.end - 1
        count = len(places)
        if count == len(known):
            return count, "same" if turns else "new", None
        if rendered.startswith(known[count].text, places[-1].end if places else 0):
            return count, "template", known[count].end - 1
        return count, "text" if chat.tools == turns[-1].program.tools else "tools", known[count - 1].end if count else 0

    def _accepts(self, piece: Piece, rendered: str, chat: Chat, known: Sequence[Piece], job: int) -> bool:
        """Tell if the tokens of a turn, the last of ``known``, stay where the template writes ``rendered`` now."""
        if piece.rendered is None:
            if piece.job == job:
                piece.rendered = rendered
            elif self._mode == "job":
                before = self._render_ended(chat._replace(messages=chat.messages[: piece.end]))
                places = self.find(before, known)
                if len(places) < len(known):
                    return False
                piece.rendered = before[places[-1].begin : places[-1].end]
        return self._mode == "session" or piece.job == job or piece.rendered == rendered

    def _tokenised(
        self, rendered: str, known: Sequence[Piece], places: Sequence[Place], kept: int
    ) -> tuple[list[Piece], list[int]]:
        """Return what follows the turns that stay: further turns as they are rendered now, and the tokens of new text.

        Each turn but the first begins with the stop text of the one before, so that it can be tokenised by itself.

        Raises:
            _NoBorder: that is not so.
        """
        fresh: list[Piece] = []
        before = known[kept - 1] if kept else None
        begin = places[kept - 1].stop if kept else 0
        for piece, place in zip(known[kept:], places[kept:], strict=False):
            ids = [*self._after(before, rendered[begin : place.stop]), self._ids[rendered[place.stop : place.end]]]
            turn = rendered[place.begin : place.end]
            stop = rendered[place.stop : place.end]
            before = Piece(before, piece.text, array("i", ids), stop, piece.end, piece.job, rendered=turn)
            fresh.append(before)
            begin = place.stop
        return fresh, self._after(before, rendered[begin:])

    def _after(self, before: Piece | None, text: str) -> list[int]:
        """Tokenise text that begins with the stop text of a turn, without its stop token if the turn has that."""
        ids = self._tokenizer.encode_rendered(text)
        if before is None:
            return ids
        stop = self._stop.match(text)
        if stop is None or ids[:1] != [self._ids[stop[0]]]:
            raise _NoBorder
        return ids if before.stop is None else ids[1:]

    def _generation_prompt(self, rendered: str, chat: Chat) -> str:
        """Return the end of a rendering that is there for the generation only."""
        context = [chat.tools is not None, chat.template_arguments, chat.messages[-1]["role"]]
        key = sha256(json.dumps(context, sort_keys=True).encode()).digest()  # a client's arguments may be long
        prompt = self._generation_prompts.get(key)
        if prompt is None or not rendered.endswith(prompt):
            without = self._render_ended(chat)
            prompt = rendered[len(without) if rendered.startswith(without) else agreeing(rendered, without) :]
            if len(self._generation_prompts) >= MAX_PROMPTS:
                self._generation_prompts.clear()
            if len(prompt) <= MAX_PROMPT_CHARS:
                self._generation_prompts[key] = prompt
        return prompt

    def _ends(self, chat: Chat, piece: Piece) -> bool:
        """Return whether the template writes a stop text between a turn like this one and the message after it.

        Otherwise the first stop text would be that of the next message, which would be taken for a part of the turn.
        Behind the last message none can be.
        """
        if piece.end == len(chat.messages):
            return True
        calls = bool(chat.messages[piece.end - 1].get("tool_calls"))
        key = (chat.tools is not None, calls, chat.messages[piece.end]["role"] == "tool")
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


class _NoBorder(Exception):
    """A stop token does not keep the texts before and after it apart."""


def agreeing(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items at the beginning are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
