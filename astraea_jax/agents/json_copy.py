"""Rewrites a JSON object, while it is written, as ``json.dumps`` prints its value."""

from __future__ import annotations

import json

import regex

from astraea_jax.agents.call_json import DECODER

_TOKEN = regex.compile(
    r'(?P<space>[ \t\n\r]++)|(?P<mark>[{}\[\]:,"])|(?P<scalar>[^ \t\n\r{}\[\]:,"]++)(?=.)', regex.DOTALL
)
_STRING = regex.compile(
    r"""(?P<plain>[^"\\]++)|(?P<end>")|
    (?P<escape>\\(?:["\\/bfnrt]|u(?:(?!d[89a-f])[0-9a-f]{4}|d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2})))""",
    regex.VERBOSE | regex.IGNORECASE,
)
MAX_SCALAR = 400
"""Characters of a number; a longer one is not rewritten, but read with the whole."""


class JsonCopy:
    """Rewrites an object piece by piece; however it is cut, the pieces joined are the same.

    They are the beginning of ``json.dumps(value, ensure_ascii=False)``, without the brace that closes the object. At
    the first thing that is not strict JSON, or that needs the whole to be understood, no more is written. Nothing is
    checked beyond that: who reads the whole finds out.
    """

    def __init__(self) -> None:
        self.ended = False
        """The closing brace was seen."""
        self.taken = 0
        """Characters up to where it ended, or all of them."""
        self._lost = False
        self._held = ""
        self._depth = 0
        self._in_string = False
        self._after_value = False
        self._comma = ""
        """Separator that is written if a value follows."""

    def feed(self, text: str) -> str:
        """Take the next piece; returns what is written for it."""
        text, at, written = self._held + text, 0, []
        self.taken -= len(self._held)
        while at < len(text) and not (self.ended or self._lost):
            found = (_STRING if self._in_string else _TOKEN).match(text, at, partial=True)
            if found is not None and found.partial and len(text) - at <= MAX_SCALAR:
                break
            try:
                written.append(self._rewritten(found))
            except ValueError:
                self._lost = True
                break
            at = found.end()
        self._held = "" if self.ended or self._lost else text[at:]
        self.taken += at + len(self._held)
        return "".join(written)

    def _rewritten(self, found: regex.Match[str] | None) -> str:
        if found is None or found.partial:
            raise ValueError("not JSON")
        if self._in_string:
            return self._string_piece(found)
        if found["space"]:
            return ""
        if found["scalar"]:
            if len(found[0]) > MAX_SCALAR:
                raise ValueError("a long number")
            return self._begin_value(after=True) + json.dumps(DECODER.decode(found["scalar"]))
        return self._mark(found["mark"])

    def _string_piece(self, found: regex.Match[str]) -> str:
        if found["end"]:
            self._in_string = False
            return '"'
        text = found[0] if found["plain"] else DECODER.decode(f'"{found[0]}"')
        text.encode()  # half of a surrogate pair is refused
        return json.dumps(text, ensure_ascii=False)[1:-1]

    def _mark(self, mark: str) -> str:
        if mark == '"':
            begun = self._begin_value(after=True)
            self._in_string = True
            return begun + '"'
        if mark in "{[":
            self._depth += 1
            return self._begin_value(after=False) + mark
        if mark in ",:":
            if not self._after_value:
                raise ValueError(f"nothing before {mark!r}")
            self._after_value, self._comma = False, ", " if mark == "," else ""
            return "" if self._comma else ": "
        if self._comma:
            raise ValueError(f"',' before {mark!r}")
        self._depth -= 1
        self._after_value, self.ended = True, self._depth == 0
        return "" if self.ended else mark

    def _begin_value(self, *, after: bool) -> str:
        if self._after_value:
            raise ValueError("no ',' between values")
        comma, self._comma, self._after_value = self._comma, "", after
        return comma
