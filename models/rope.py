"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and how models stretch them to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Linear:
    """Positions are divided by ``factor`` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Wavelengths beyond the original context are stretched by ``factor``, and those between two bounds partly."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): as :class:`Llama3`, with bounds in rotations over the original context."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncated: bool = True
    """Whether bounds are rounded to whole dimensions."""
    magnitude: float = 1.0
    """Factor on cosine and sine."""


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): every frequency is divided by a factor of its own."""

    factors: tuple[float, ...]
    """One for each frequency."""
    magnitude: float
    """Factor on cosine and sine."""
    long: bool
    """Whether the factors are those for contexts beyond the original one."""


@dataclass(frozen=True)
class Proportional:
    """Only the first frequencies rotate, those of a head that is rotated as a whole (Gemma 4)."""

    part: float
    """Of the frequencies."""
    factor: float = 1.0
    """Divides them."""


Scaling = Linear | Llama3 | Yarn | LongRope | Proportional


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    partial: float = 1.0
    """Part of a head's dimensions that is rotated, the first ones in a checkpoint. When weights are read, the halves of
    the rotated dimensions are moved to the beginnings of the halves of the head, so that pairs lie as they do in heads
    that are rotated as a whole; the others have frequency 0."""

    def rotated(self, head_dim: int) -> int:
        """Dimensions that are rotated, of ``head_dim``."""
        return int(self.partial * head_dim)

    def order(self, head_dim: int) -> tuple[int, ...]:
        """A checkpoint's dimensions of a head in the order in which decoders here have them."""
        rotated, half = self.rotated(head_dim) // 2, head_dim // 2
        rest = 2 * rotated + half - rotated  # the first dimension of the second half that is not rotated
        first = (*range(rotated), *range(2 * rotated, rest))
        return (*first, *range(rotated, 2 * rotated), *range(rest, head_dim))

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angular frequency of every pair of a head's dimensions, ``[H / 2]`` float32; 0 for those not rotated."""
        rotated = self.rotated(head_dim)
        freqs = self.theta ** (-np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
        return np.pad(_scaled(freqs, self, rotated), (0, (head_dim - rotated) // 2)).astype(np.float32)

    def magnitudes(self, head_dim: int) -> np.ndarray:
        """Factor on cosine and sine of every pair, ``[H / 2]`` float32."""
        magnitude = self.scaling.magnitude if isinstance(self.scaling, Yarn | LongRope) else 1.0
        inside = np.arange(head_dim // 2) < self.rotated(head_dim) // 2
        return np.where(inside, magnitude, 1.0).astype(np.float32)


def _scaled(freqs: np.ndarray, rope: Rope, rotated: int) -> np.ndarray:
    """The frequencies ``[rotated / 2]`` after the scaling of ``rope``."""
    match scaling := rope.scaling:
        case None:
            return freqs
        case Linear():
            return freqs / scaling.factor
        case Llama3():
            turns = scaling.original_max_position * freqs / (2 * math.pi)  # rotations over the original context
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return freqs * (keep + (1 - keep) / scaling.factor)
        case Yarn():
            low, high = (_yarn_bound(turns, scaling, rope, rotated) for turns in (scaling.beta_fast, scaling.beta_slow))
            if scaling.truncated:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotated - 1)
            stretch = np.clip((np.arange(rotated // 2) - low) / (max(high - low, 0) or 0.001), 0.0, 1.0)
            return freqs * (1 - stretch + stretch / scaling.factor)
        case LongRope():
            return freqs / np.array(scaling.factors, np.float32)
        case Proportional():
            return np.where(np.arange(rotated // 2) < int(scaling.part * rotated // 2), freqs / scaling.factor, 0.0)


def _yarn_bound(turns: float, scaling: Yarn, rope: Rope, rotated: int) -> float:
    """Index of the frequency that makes so many rotations over the original context."""
    return rotated * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
