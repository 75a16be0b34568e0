"""Weights of tenants as text: the option ``tenant_weights``."""

from __future__ import annotations

from pathlib import Path

MOST = 1e6
"""The largest weight."""


class Weights:
    """An option that says which share of the machine a tenant gets, in proportion to others; who is not named has 1."""

    def __contains__(self, value: object) -> bool:
        try:
            return isinstance(value, str) and bool(parsed(value))
        except ValueError:
            return False

    def __str__(self) -> str:
        return (
            "tenant=weight,tenant=weight,… or @FILE with one of them on each line, each tenant once, "
            f"with weights from 0 to {MOST:g}"
        )


def parsed(text: str | None) -> dict[str, float]:
    """Return weights by tenant.

    Args:
        text: ``tenant=weight`` parted by commas, or ``@`` and the name of a file with one on each line. There tenants
            may have commas, and lines that begin with ``#`` are comments. A tenant is an owner as the doors name it:
            ``key:`` and the first 32 digits of the key's SHA-256, ``salt:`` and a cache salt, ``peer:`` and an address.
            None: no weights.

    Raises:
        ValueError: the file cannot be read, or a part is not what it should be.
    """
    text = text or ""
    lines = text.split(",")
    if text.startswith("@"):
        try:
            lines = [line for line in Path(text[1:]).read_text("utf-8").splitlines() if not line.startswith("#")]
        except OSError as error:
            raise ValueError(f"{text[1:]} cannot be read: {error}") from None
    weights: dict[str, float] = {}
    for line in filter(None, map(str.strip, lines)):
        owner, _, number = line.rpartition("=")
        if "=" not in line or owner in weights or not 0 <= (weight := float(number)) <= MOST:
            raise ValueError(f"{line!r} is not a tenant and its weight, or names a tenant again")
        weights[owner] = weight
    return weights
