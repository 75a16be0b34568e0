"""A subscriber to KV events, as a router has one: it knows the wire and nothing else of us."""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

WAIT_MS = 60_000


class Subscriber:
    """Rebuilds the sets of blocks from batches in the order of their numbers.

    Args:
        endpoint: of the batches.
        replay: where those that were missed are asked for.
        misses: every such batch is thrown away when it comes; 0: none.
    """

    def __init__(self, endpoint: str, replay: str | None = None, misses: int = 0):
        self.media: dict[str, set[int]] = {"GPU": set(), "CPU": set()}
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.stored, self.batches, self.gaps, self.clears = [], [], 0, 0
        self.topics: set[bytes] = set()
        self._next, self._misses, self._seen, self._replay_at = 0, misses, 0, replay
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.set_hwm(0)
        self._live.subscribe(b"")
        self._live.connect(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.destroy(linger=0)

    def read(self, wait_ms: int = 0) -> None:
        """Take in what has come."""
        while self._live.poll(wait_ms):
            topic, number, payload = self._live.recv_multipart()
            assert len(number) == 8
            self.topics.add(topic)
            self._seen += 1
            if not (self._misses and self._seen % self._misses == 0):
                self._take(int.from_bytes(number, "big"), payload)
            wait_ms = 0

    def replay(self) -> None:
        """Ask for what was missed, and take it in."""
        for number, payload in ask_again(self._context, self._replay_at, self._next):
            self._take(number, payload, replayed=True)

    def _take(self, number: int, payload: bytes, replayed: bool = False) -> None:
        if number < self._next:
            return
        if number > self._next and not replayed:
            if self._replay_at is not None:
                self.replay()
            if number < self._next:
                return
        self.gaps += number - self._next
        self._next = number + 1
        self.batches.append(msgpack.unpackb(payload))
        _, events, _ = self.batches[-1]
        for event in events:
            self.hear(event)

    def hear(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.media = {"GPU": set(), "CPU": set()}
            self.clears += 1
        elif event["type"] == "BlockStored":
            size, hashes = event["block_size"], event["block_hashes"]
            assert len(event["token_ids"]) == size * len(hashes)
            for i, name in enumerate(hashes):
                self.tokens[name] = tuple(event["token_ids"][i * size : (i + 1) * size])
            self.media[event["medium"]].update(hashes)
            self.stored.append(event)
        else:
            assert event["type"] == "BlockRemoved"
            self.media[event["medium"]].difference_update(event["block_hashes"])


def ask_again(context, endpoint: str, first: int) -> list[tuple[int, bytes]]:
    """Batches from a number on, as the ROUTER socket sends them to a REQ socket of vLLM's example subscriber."""
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.connect(endpoint)
    socket.send_multipart((b"", first.to_bytes(8, "big")))
    found = []
    while True:
        assert socket.poll(WAIT_MS), "no answer to a request for a replay"
        empty, topic, number, payload = socket.recv_multipart()
        assert empty == b""
        if int.from_bytes(number, "big", signed=True) == -1:
            assert (topic, payload) == (b"", b"")
            socket.close(linger=0)
            return found
        found.append((int.from_bytes(number, "big"), payload))
