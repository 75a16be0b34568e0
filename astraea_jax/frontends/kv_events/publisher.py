"""Publishes KV events over ZeroMQ, as vLLM's ``ZmqEventPublisher`` does.

A PUB socket sends every batch as three frames: the topic, its number (8 bytes, big-endian, from 0) and the batch.
Whoever misses numbers asks the ROUTER socket for them: an empty frame and the first number. The answer is an empty
frame and the three frames of each batch from that number on that is still there, and ends with the number -1.

Tokens of prompts are in these batches, and whoever reaches the sockets gets them: keep the ports within the cluster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import zmq

from astraea_jax.engine.kv_events import KVEvents
from astraea_jax.errors import StartupError
from astraea_jax.scheduler.kv_log import Record

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
Pack = Callable[[list[Record], float], Iterator[bytes]]
"""Records, and the time in seconds since 1970 -> batches."""

KEPT_BATCHES, KEPT_BYTES = 10_000, 64 * 2**20
"""Batches that can be asked for again, at most; the number is vLLM's."""
UNSENT_BATCHES = 10_000
"""Batches that wait for one listener at most, who misses further ones: a tenth of vLLM's, to bound the memory."""
MAX_REQUEST = 1024
"""Bytes that a listener may send at once, such as the topic that it wants; more ends its connection."""
REPLAYED = 64
"""Batches that are sent again at once, before new ones: sending so many takes less time than a step."""
POLL_S = 0.1
"""Seconds between two looks for such requests; vLLM's."""
STOP_S = 2.0
"""Seconds that the thread gets to end."""
END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Publishes what one replica caches, from a thread of its own.

    Args:
        events: what the replica tells.
        pack: makes batches of it.
        endpoint: of the PUB socket, see :func:`open_socket`.
        replay: endpoint of the ROUTER socket; None: nothing can be asked for again.
        topic: first frame of every batch.

    Raises:
        StartupError: an endpoint cannot be used.
    """

    def __init__(self, events: KVEvents, pack: Pack, endpoint: str, replay: str | None = None, topic: str = ""):
        self._events, self._pack, self._topic = events, pack, topic.encode()
        self._context = zmq.Context()
        self._number = 0
        # Frames that all answers share: who asks for everything and reads nothing costs 2 MB, not 64.
        self._kept: deque[tuple[bytes, zmq.Frame]] = deque()
        self._kept_bytes = 0
        self._replay: Socket | None = None
        self._answer: deque[Sequence[bytes | zmq.Frame]] = deque()  # messages of it that have not been sent
        try:
            self._socket, self.endpoint = open_socket(self._context, zmq.PUB, endpoint, UNSENT_BATCHES)
            if replay is not None:
                self._replay, replay = open_socket(self._context, zmq.ROUTER, replay, KEPT_BATCHES + 1)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.replay = replay
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="astraea-kv-events", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return self.endpoint if self.replay is None else f"{self.endpoint}, missed ones at {self.replay}"

    def close(self) -> None:
        """End the thread and its sockets."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        asked = False
        try:
            while not self._stopping.is_set():
                told = self._events.get(0.0 if asked else POLL_S)
                if told is not None:
                    self._number += told.missed  # the gap tells that something is missing
                    for batch in self._pack(told.records, time.time()):
                        self._publish(batch)
                asked = self._serve_replay()
        except Exception:
            log.exception("KV events are published no more")
        finally:
            self._context.destroy(linger=0)

    def _publish(self, batch: bytes) -> None:
        number = self._number.to_bytes(8, "big")
        self._number += 1
        frame = zmq.Frame(batch, copy=True)
        self._socket.send_multipart((self._topic, number, frame), copy=False)
        self._kept.append((number, frame))
        self._kept_bytes += len(batch)
        while len(self._kept) > KEPT_BATCHES or self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _serve_replay(self) -> bool:
        """Send a part of the answer to a request; returns whether there was anything to do.

        So new batches wait for a part only, however many ask for how much. One request is answered after the other.
        """
        if self._replay is None or not (self._answer or self._replay.poll(0)):
            return False
        if not self._answer:
            self._answer.extend(self._answer_to(*self._replay.recv_multipart()))
        for _ in range(min(REPLAYED, len(self._answer))):
            self._replay.send_multipart(self._answer.popleft(), copy=False)
        return True

    def _answer_to(self, listener: bytes, *frames: bytes) -> Iterator[Sequence[bytes | zmq.Frame]]:
        if len(frames) != 2 or frames[0] or len(frames[1]) != 8:
            return  # as vLLM does; what it is cannot be known
        for number, batch in self._kept:
            if number >= frames[1]:  # big-endian, so they are ordered like numbers
                yield listener, b"", self._topic, number, batch
        yield listener, b"", b"", END, b""


def open_socket(context: zmq.Context[Socket], kind: int, endpoint: str, unsent: int) -> tuple[Socket, str]:
    """Open a socket; returns it with its endpoint, in which a port of 0 has become the one that was free.

    A PUB socket connects to ``tcp://host:port``, where a router listens for all its workers. Endpoints with ``*``,
    ``0.0.0.0`` or ``::`` or of this machine alone are bound, and so are all of other sockets.

    Raises:
        StartupError: the endpoint cannot be used; the message says why.
    """
    socket = context.socket(kind)
    socket.set_hwm(unsent)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)  # listeners that have vanished cost no memory for long
    here = any(part in endpoint for part in ("*", "//0.0.0.0:", "::", "//127.", "//localhost:", "ipc://"))
    try:
        if kind == zmq.PUB and not here:
            socket.connect(endpoint)
            return socket, endpoint
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise StartupError(f"KV events cannot be published at {endpoint} ({error}); choose another endpoint") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)
