"""JSON files of a checkpoint folder, and their fields, each checked where it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CheckpointError

MAX_LAYERS = 1024
"""Far more than any model has; a mistyped number is refused before a decoder of that size is built."""

Json = Mapping[str, Any]


def layers(config: Json) -> int:
    """The number of layers."""
    count = size(config, "num_hidden_layers")
    if count > MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {count}; at most {MAX_LAYERS} are served")
    return count


def size(config: Json, field: str, default: int | None = None) -> int:
    """A positive integer; without it, ``default``."""
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
        raise CheckpointError(f"config.json: {field} is {value!r}; a positive integer is needed")
    return value


def number(config: Json, field: str, default: float | None = None) -> float:
    """A positive number; without it, ``default``."""
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"config.json: {field} is {value!r}; a positive number is needed")
    return float(value)


def whole(config: Json, field: str, default: int) -> int:
    """An integer that may be 0; where the field is absent, ``default``."""
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**24:
        raise CheckpointError(f"config.json: {field} is {value!r}; an integer of 0 or more is needed")
    return value


def optional_number(config: Json, field: str) -> float | None:
    """A positive number, or None."""
    return None if config.get(field) is None else number(config, field)


def numbers(config: Json, field: str, count: int) -> tuple[float, ...]:
    """So many positive numbers."""
    value = config.get(field)
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointError(f"config.json: {field} must be a list of {count} numbers, one for each rotated pair")
    return tuple(number({field: one}, field) for one in value)


def flag(config: Json, field: str, default: bool = False) -> bool:
    """True or false; without it, ``default``."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} is {value!r}; true or false is needed")
    return default if value is None else value


def part(config: Json, field: str) -> Json:
    """An object within; without it, an empty one."""
    value = config.get(field)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config.json: {field} is {value!r}; an object is needed")
    return value or {}


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; ``missing`` stands in for a file that is not there.

    Raises:
        CheckpointError: the file is missing and may not be, or is no JSON object.
    """
    if not path.is_file():
        if missing is None:
            raise CheckpointError(f"{path} is missing; is this a Hugging Face checkpoint folder?")
        return missing
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def read_text(path: Path) -> str:
    """A text file from a checkpoint folder, in UTF-8 whatever the locale.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
