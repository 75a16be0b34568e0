"""Control tokens that somebody wrote into a chat as text, kept apart from those that its template writes.

Without this, a web page that a tool returns could end its turn and begin another one. Before a chat is rendered, every
control token in its strings becomes a private-use character of its own, which templates leave alone (they trim, split
and print strings as JSON); afterwards each of these becomes a *mark*, a pair of surrogates, which no text can hold. So
marked texts of different chats can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .chat_template import ChatTemplate

OWN_MARKUP = re.compile("think|tool|call|arg|channel|python_tag", re.IGNORECASE)
"""Tokens a model writes itself within its turn, such as ``<think>`` or ``[TOOL_CALLS]``; none that ends a turn."""

OPERATORS = ("assistant", "system", "developer")
"""Roles whose text may hold such markup: the model's own, and instructions that show it."""

PRIVATE_USE = range(0xF0000, 0xFFFFE)

MARKS = re.compile("([\ud800-\udbff][\udc00-\udfff])")
SURROGATE = re.compile("[\ud800-\udfff]")


def mark(token: int) -> str:
    """Two halves of surrogate pairs that stand for a token whose id is below 2**20."""
    return chr(0xD800 + token // 1024) + chr(0xDC00 + token % 1024)


def marked(mark: str) -> int:
    """Id of the token that ``mark`` stands for."""
    return 1024 * (ord(mark[0]) - 0xD800) + ord(mark[1]) - 0xDC00


class ControlTokens:
    """The control tokens of one tokenizer and template.

    Args:
        special: added tokens that are special.
        others: added tokens that are not; of these, control tokens are those which the template itself writes.
        template: writes them.
        ends: tokens that end a turn.
    """

    def __init__(
        self, special: Collection[str], others: Collection[str], template: ChatTemplate, ends: Collection[str] = ()
    ):
        written = {token for token in others if token in template.literal_text and not token.isspace()}
        tokens = sorted({*special, *written} - {""}, key=len, reverse=True)
        self._any = _alternation(tokens)
        self._any_as_json = _alternation([json.dumps(token, ensure_ascii=False)[1:-1] for token in tokens])
        self._foreign_to_operators = _alternation(
            [token for token in tokens if token in ends or not OWN_MARKUP.search(token)]
        )

    def hide(self, messages: list[dict[str, Any]], *others: Any) -> tuple[StandIns, list[Any]]:
        """Stand-ins, and the messages and ``others`` (tools, template arguments) with these in the place of tokens."""
        whole = [_with_whole_tokens(message, self._hidden_in(message)) for message in messages]
        values = [whole, *others]
        text = json.dumps(values, ensure_ascii=False)
        stand_ins = StandIns(text)
        if not self._any_as_json.search(text):  # as in nearly all chats
            return stand_ins, values
        hidden = [stand_ins.put(message, self._hidden_in(message)) for message in whole]
        return stand_ins, [hidden, *(stand_ins.put(other, self._any) for other in others)]

    def _hidden_in(self, message: Mapping[str, Any]) -> re.Pattern[str]:
        return self._foreign_to_operators if message["role"] in OPERATORS else self._any


class StandIns:
    """Private-use characters that stand for tokens.

    Args:
        text: all that is going to be rendered; characters in it stand for themselves.
    """

    def __init__(self, text: str):
        self._free: Iterator[str] = (char for char in map(chr, PRIVATE_USE) if char not in text)
        self._of: dict[str, str] = {}
        """Token -> character."""

    def put(self, value: Any, tokens: re.Pattern[str]) -> Any:
        """``value``, plain data, with stand-ins for ``tokens`` in all its strings, keys included."""
        match value:
            case str():
                return tokens.sub(lambda found: self._char(found[0]), value)
            case dict():
                return {self.put(key, tokens): self.put(item, tokens) for key, item in value.items()}
            case list():
                return [self.put(item, tokens) for item in value]
        return value

    def to_marks(self, rendered: str, ids: Mapping[str, int]) -> str:
        """A rendered chat with marks for the tokens that were hidden, of which ``ids`` has the ids.

        Raises:
            ValueError: it holds half a surrogate pair, which is no text.
        """
        if not rendered.isascii() and (half := SURROGATE.search(rendered)):
            around = rendered[max(0, half.start() - 20) : half.start() + 20]
            raise ValueError(f"the tokenizer cannot encode {around!r}: half a surrogate pair is no text")
        tokens = {written: token for token, char in self._of.items() for written in (char, json.dumps(char)[1:-1])}
        if not tokens:
            return rendered
        return _alternation(list(tokens)).sub(lambda found: mark(ids[tokens[found[0]]]), rendered)

    def _char(self, token: str) -> str:
        if token not in self._of:
            self._of[token] = next(self._free)
        return self._of[token]


def _with_whole_tokens(message: dict[str, Any], tokens: re.Pattern[str]) -> dict[str, Any]:
    """The message with its content parts joined to one if a token spans two of them."""
    if not isinstance(parts := message.get("content"), list):
        return message
    texts = [part["text"] for part in parts]
    if len(tokens.findall("".join(texts))) == sum(len(tokens.findall(text)) for text in texts):
        return message
    return {**message, "content": [{"type": "text", "text": "".join(texts)}]}


def _alternation(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # (?!) matches nowhere
