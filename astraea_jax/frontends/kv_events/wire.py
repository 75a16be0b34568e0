"""vLLM's KV events, byte for byte as version 0.32 packs them (``vllm/distributed/kv_events.py``).

A batch is an array ``[time, events, rank]``; an event is a map with its name as ``type``, in which fields that have
their default are left out. Whoever reads them needs no hash function: hashes are names that a worker uses
consistently, here the last 64 bits of a chain of SHA-256. What a block holds is said by its tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from hashlib import sha256
from typing import Any

import msgpack
import numpy as np

from astraea_jax.scheduler.kv_log import Block, Record, Removed, Stored
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.wait import DEVICE, HOST

MEDIUM = {DEVICE: "GPU", HOST: "CPU"}
"""Tier -> what vLLM calls it, on whatever device."""
GROUP = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
"""The layers that blocks are told of; window pages are not."""
MAX_BLOCKS = 512
"""Blocks of a batch at most, so that none is packed for long, while the serving loop would wait for Python."""


def pack(records: Iterable[Record], time_s: float, *, page_size: int, rank: int) -> Iterator[bytes]:
    """Pack records into batches.

    Args:
        records: what has happened, in order.
        time_s: seconds since 1970.
        page_size: tokens of a block.
        rank: number of the replica, which vLLM calls its data-parallel rank.
    """
    packer = msgpack.Packer(unicode_errors="replace")  # a name that is no Unicode must not spoil the others' batch
    for events in _batches(records, page_size):
        yield packer.pack([time_s, events, rank])


def _batches(records: Iterable[Record], page_size: int) -> Iterator[list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    room = MAX_BLOCKS
    for record in records:
        for first in range(0, len(record), MAX_BLOCKS):
            count = min(MAX_BLOCKS, len(record) - first)
            if count > room:
                yield events
                events, room = [], MAX_BLOCKS
            events.append(_event(record, slice(first, first + count), page_size))
            room -= count
    if events:
        yield events


def _event(record: Record, part: slice, page_size: int) -> dict[str, Any]:
    """Make an event of a part of a record."""
    if isinstance(record, Stored):
        return _stored(record.blocks[part], MEDIUM[record.tier], page_size)
    if isinstance(record, Removed):
        names = [block_name(block_hash) for block_hash in record.hashes[part]]
        return {"type": "BlockRemoved", "block_hashes": names, "medium": MEDIUM[record.tier], "group_idx": 0}
    return {"type": "AllBlocksCleared"}


def _stored(blocks: list[Block], medium: str, page_size: int) -> dict[str, Any]:
    """Make an event of blocks, each of which continues the one before it."""
    parent = blocks[0].parent
    event = {
        "type": "BlockStored",
        "block_hashes": [block_name(block.hash) for block in blocks],
        "parent_block_hash": None if parent is None else block_name(parent),
        "token_ids": np.frombuffer(b"".join(block.tokens for block in blocks), np.int32).tolist(),
        "block_size": page_size,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        "extra_keys": [_extra_keys(block) for block in blocks],
        **GROUP,
    }
    session = session_name(blocks[0].session)
    return event if session is None else {**event, "session_id": session}


def block_name(block_hash: bytes) -> int:
    """The name of a block: the last 64 bits of its hash, as vLLM has them."""
    return int.from_bytes(block_hash[-8:], "big")


def session_name(key: Hashable | None) -> str | None:
    """The name by which a client calls its session; None: it has none. ``key`` is the engine's: owner and name."""
    return key[1] if isinstance(key, tuple) else None


def salt_name(salt: bytes) -> str:
    """The name of a salt, given as the start of its chain. It tells equal from different, and not the salt."""
    return f"salt:{sha256(b'astraea_jax kv events' + salt).hexdigest()[:32]}"


def _extra_keys(block: Block) -> list[str] | None:
    """What counts beside its tokens. A salt does, and as in vLLM only the first block of a prompt names it."""
    return None if block.parent is not None or block.salt == salted("") else [salt_name(block.salt)]
