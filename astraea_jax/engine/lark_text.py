"""Writes Lark grammars for text in which a model's control tokens stand, as llguidance reads them.

A control token such as ``<tool_call>`` must come as the one token that the model was trained on. Text matches no
control token, so free text ends before one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

TEXT = "TEXT: /(?s:.*)/\n"


@dataclass(frozen=True)
class Thought:
    """A thought that a turn may hold before its constrained part; its text is free."""

    begin: str = "<think>"
    end: str = "</think>"
    opened: bool = False
    """The prompt has written ``begin``, so the turn begins within the thought; otherwise it may do without one."""
    answer: str = ""
    """Markup that may stand between the thought and what is constrained."""


class LarkText:
    """Writes text as Lark, control tokens as such.

    Args:
        control_tokens: text and id of the tokens that match no text.
    """

    def __init__(self, control_tokens: Mapping[str, int]):
        self.control_tokens = control_tokens
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if control_tokens else "(?!)")

    def literal(self, text: str) -> str:
        """Lark for exactly this text, in which control tokens are such."""
        pieces = [piece for piece in self._pattern.split(text) if piece]
        return " ".join(
            f"<[{self.control_tokens[piece]}]>" if piece in self.control_tokens else json.dumps(piece)
            for piece in pieces
        )

    def until(self, rule: str, text: str) -> tuple[str, str]:
        """Free text that ends with the first ``text``.

        Args:
            rule: name for a rule of its own, in lower case.
            text: not empty.

        Returns:
            Lark for it, and the definitions that this needs besides ``TEXT``.
        """
        if token := self._pattern.search(text):
            rest = self.literal(text[token.start() :])
            if not token.start():
                return f"TEXT {rest}", ""
            before = "".join(f"\\x{{{ord(char):x}}}" for char in text[: token.start()])
            return f"{rule.upper()} {rest}", f"{rule.upper()}: /(?s:.*){before}/\n"
        return rule, f"{rule}[lazy]: TEXT {json.dumps(text)}\n"

    def thought(self, thought: Thought) -> str:
        """Lark of a whole grammar: the thought, then the grammar named ``body``."""
        rest, definitions = self.until("thought_end", thought.end)
        space = r"/[ \n\r\t]{1,8}/?"
        body = f"({self.literal(thought.answer)})? @body" if thought.answer else "@body"
        if thought.opened:
            return f"start: {rest} {space} {body}\n{definitions}{TEXT}"
        return f"start: (thought {space})? {body}\nthought: {self.literal(thought.begin)} {rest}\n{definitions}{TEXT}"
