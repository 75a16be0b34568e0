"""KV events are what vLLM packs, byte for byte, and never the salt."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from astraea_jax.frontends.kv_events import wire
from astraea_jax.frontends.kv_events.wire import pack, salt_name
from astraea_jax.scheduler.kv_log import Block, Cleared, Removed, Stored
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.wait import DEVICE, HOST

PACKED_BY_VLLM = (
    "93cb3ff80000000000009481a474797065b0416c6c426c6f636b73436c65617265648ca474797065ab426c6f636b53746f726564ac626c6f63"
    "6b5f68617368657392cf0101010101010101cf0202020202020202b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f69647394"
    "07cd012cce0001117009aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa657874"
    "72615f6b6579739291d92573616c743a6163373466653437363862656139636461613463633764643237613833613933c0a967726f75705f69"
    "647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6eaa73657373696f6e5f6964a1738ba474797065ab"
    "426c6f636b53746f726564ac626c6f636b5f68617368657391cf0303030303030303b1706172656e745f626c6f636b5f68617368cf02020202"
    "02020202a9746f6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e61"
    "6d65c0aa65787472615f6b65797391c0a967726f75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e"
    "74696f6e84a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657392cf0101010101010101cf0404040404040404a66d"
    "656469756da3475055a967726f75705f6964780003"
)
"""What the classes of vLLM 0.32 (vllm/distributed/kv_events.py) and msgspec 0.22 make of the records below, with the
block names, the metadata and the rank that vLLM's block pool, cache manager and publisher fill in."""

H1, H2, H3, H4 = (bytes([i]) * 32 for i in (1, 2, 3, 4))
SALT = salted("tenant")


def block(block_hash, parent, tokens, salt=SALT, session=None):
    return Block(block_hash, parent, np.array(tokens, np.int32).tobytes(), salt, session)


def packed(records, page_size=2):
    return [msgpack.unpackb(batch) for batch in pack(records, 0.0, page_size=page_size, rank=0)]


def test_batches_are_those_of_vllm():
    records = [
        Cleared(),
        Stored(DEVICE, [block(H1, None, [7, 300], session=("", "s")), block(H2, H1, [70_000, 9], session=("", "s"))]),
        Stored(HOST, [block(H3, H2, [1, 2], salt=salted(""))]),
        Removed(DEVICE, [H1, H4]),
    ]
    assert [batch.hex() for batch in pack(records, 1.5, page_size=2, rank=3)] == [PACKED_BY_VLLM]


@pytest.mark.parametrize("salt", ["tenant", "key:0123456789abcdef", "a" * 64])
def test_a_salt_is_told_apart_and_never_told(salt):
    start = salted(salt)
    first, second = block(H1, None, [1, 2], start), block(H2, H1, [3, 4], start)
    [batch] = pack([Stored(DEVICE, [first, second])], 0.0, page_size=2, rank=0)
    [keys, none] = msgpack.unpackb(batch)[1][0]["extra_keys"]
    assert (keys, none) == ([salt_name(start)], None)
    assert salt.encode() not in batch
    assert start not in batch
    assert start.hex().encode() not in batch
    assert salt_name(salted("another")) != salt_name(start) != salt  # and no image's digest: those have 64 hex digits
    assert not all(c in "0123456789abcdef" for c in salt_name(start))


def test_what_nobody_salts_has_no_key():
    [[_, [event], _]] = packed([Stored(DEVICE, [block(H1, None, [1, 2], salted(""))])])
    assert event["extra_keys"] == [None]


@pytest.mark.parametrize(
    ("key", "name"), [(("owner", "name"), "name"), (None, None), (("", "\ud800x"), "?x"), (("", "ü"), "ü")]
)
def test_sessions_have_their_clients_names(key, name):
    [[_, [event], _]] = packed([Stored(DEVICE, [block(H1, None, [1, 2], session=key)])])
    assert event.get("session_id") == name
    assert ("session_id" in event) == (name is not None)


def test_long_records_become_several_batches(monkeypatch):
    monkeypatch.setattr(wire, "MAX_BLOCKS", 4)
    hashes = [i.to_bytes(32, "big") for i in range(1, 12)]
    chain = [block(h, parent, [i, i]) for i, (h, parent) in enumerate(zip(hashes, [None, *hashes], strict=False))]
    batches = packed([Removed(HOST, hashes[:3]), Stored(DEVICE, chain), Cleared()])
    assert all(sum(len(e.get("block_hashes", "1")) for e in events) <= 4 for _, events, _ in batches)
    events = [event for _, events, _ in batches for event in events]
    assert [event["type"] for event in events] == ["BlockRemoved", *["BlockStored"] * 3, "AllBlocksCleared"]
    stored = events[1:4]
    assert [name for event in stored for name in event["block_hashes"]] == [*range(1, 12)]
    assert [event["parent_block_hash"] for event in stored] == [None, 4, 8]
    assert [t for event in stored for t in event["token_ids"]] == [t for i in range(11) for t in (i, i)]
