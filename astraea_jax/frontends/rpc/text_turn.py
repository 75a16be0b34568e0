"""A turn of a request in text, which the conversation that it belongs to is told of."""

from __future__ import annotations

from astraea_jax.engine.generation import Delta
from astraea_jax.frontends.programs import End, Opening, Programs


class TextTurn:
    """Collects what a request in text is answered, and ends its turn before the client has the last of it.

    Args:
        programs: have opened it.
        opening: the request.
        program: in which it runs.
        final: the program ends with it.
    """

    def __init__(self, programs: Programs, opening: Opening, program: str | None, final: bool):
        self._programs, self._opening, self._program, self._final = programs, opening, program, final
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._ended = False

    def add(self, delta: Delta) -> None:
        """Take in what the client is told next."""
        self._texts.append(delta.text)
        self._ids += delta.token_ids
        if delta.finish_reason is not None and delta.finish_reason != "cancelled":
            text, whole = "".join(self._texts), delta.stop is None
            self._end(End(delta.finish_reason, self._ids, text, whole, calls=None, final=self._final))

    def end(self) -> None:
        """End a turn that has not come to its end."""
        self._end(End("cancelled", final=self._final))

    def _end(self, end: End) -> None:
        if not self._ended:
            self._ended = True
            self._programs.end(self._opening, self._program, end)
