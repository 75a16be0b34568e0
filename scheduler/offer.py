"""What a waiting request can start from."""

from __future__ import annotations

from typing import NamedTuple

from .program import Request
from .transfer import Part
from .wait import DEVICE, DIFFERS, EVICTED, HOST, RECOMPUTED, UNKNOWN, Resumed


class Offer(NamedTuple):
    """Pages that a waiting request can start from: some on the device, and after those some on the host."""

    request: Request
    own: int
    """Device pages of its program that it goes on with, from the first on."""
    found: list[int]
    """Device pages of equal content, computed by anybody, that come after them."""
    parts: list[Part]
    """Host pages that come after those."""
    tokens: int
    """Tokens on all these pages, which need not be computed."""
    need: int
    """Further device pages, for all its known tokens; those that are restored come first."""
    windows: int
    """Window pages that nobody holds now and that it needs to go on."""

    def device_tokens(self, page_size: int) -> int:
        """Those of the tokens that are on the device."""
        return min(self.tokens, (self.own + len(self.found)) * page_size)

    def resumed(self, page_size: int) -> Resumed:
        """Say where the KV of the request's prompt comes from."""
        program = self.request.program
        device = self.device_tokens(page_size)
        host = self.tokens - device
        if not program.computed:
            return Resumed(device_tokens=device) if device else UNKNOWN
        again = max(0, min(self.request.num_tokens - 1, program.computed) - self.tokens)
        lost = min(self.request.matched, program.computed) - self.tokens
        if again <= page_size:  # a last page that was not full, or is shared, is cheap
            return Resumed(HOST if self.parts else DEVICE, "", device, host, again)
        why = (program.lost or EVICTED) if lost > page_size else DIFFERS
        return Resumed(RECOMPUTED, why, device, host, again)
