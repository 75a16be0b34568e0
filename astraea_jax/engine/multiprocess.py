"""One engine over several processes, of one machine or of several: they dispatch the same steps in the same order.

The first process has the front doors, the scheduler and the host tier's books. Before it dispatches anything that
touches the arrays that all of them share, it says so to the others, and they do the same with their parts: they follow.
What is said is the array of a step that the host makes anyway, or the pages of a transfer, over one TCP connection to
each follower. That costs the first process the writing of a few kilobytes and no waiting. (A broadcast through the
devices would queue behind the step that runs.)

Every process is started with the same model and the same configuration, joined by ``jax.distributed``.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.loading import ModelOnDevices
from astraea_jax.engine.runner import InFlight, Progress, Runner
from astraea_jax.engine.step import Sizes, StepShape
from astraea_jax.errors import EngineDead, StartupError
from astraea_jax.kv_cache.offload import PINNED
from astraea_jax.models.decoder import Decoder

JOIN_S = 120.0
"""How long the first process waits for the others, and they for it."""
POLL_S = 5e-5
"""How often the first process asks whether a step has ended."""
CHECK_S = 0.1
"""How often it looks whether the others are there while a step takes long."""
STRANGER_S = 5.0
"""How long it listens to somebody who does not say who they are."""
TOKEN_BYTES = 16
HEADER = struct.Struct("<iiii")
"""What to do, two numbers, and how many int32 come after it."""
PROCESS = struct.Struct("<i")
READY = b"r"


class Act(IntEnum):
    """What a follower is told to do."""

    STEP = 0
    """Run a step: index of its shape; then its batch."""
    GATHER = 1
    """Read pages into a block: number of the block; then the pages."""
    TO_HOST = 2
    """Copy a block: its number, and that of the copy."""
    TO_DEVICE = 3
    SCATTER = 4
    """Write a block: its number; then the pages."""
    FORGET = 5
    """Drop blocks: then their numbers."""
    TABLE = 6
    """Put new entries into the page table: they follow."""
    END = 7


class Line:
    """One end of the connection between the first process and a follower."""

    def __init__(self, connection: socket.socket, other: int):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._other = connection, other

    def say(self, message: bytes) -> None:
        """Send a message; it waits only when the other is megabytes behind.

        Raises:
            EngineDead: the other process is gone.
        """
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise self._gone() from error

    def hear(self, size: int) -> bytes:
        """Wait for so many bytes.

        Raises:
            EngineDead: the other process is gone.
        """
        heard = bytearray()
        while len(heard) < size:
            try:
                part = self._socket.recv(size - len(heard))
            except OSError as error:
                raise self._gone() from error
            if not part:
                raise self._gone()
            heard += part
        return bytes(heard)

    def check(self) -> None:
        """Raise EngineDead if the other process, which never says anything, has hung up."""
        self._socket.setblocking(False)
        try:
            if not self._socket.recv(1):
                raise self._gone()
        except BlockingIOError:
            return
        except OSError as error:
            raise self._gone() from error
        finally:
            self._socket.setblocking(True)

    def close(self) -> None:
        self._socket.close()

    def _gone(self) -> EngineDead:
        return EngineDead(f"process {self._other} has gone, its own log says why; start all processes again")


class LeadingRunner(Runner):
    """The runner of the first process: it says to the followers what it dispatches, once :meth:`compile` is done."""

    _lines: tuple[Line, ...] = ()

    def _meet(self) -> None:
        for line in _the_lines():
            line.hear(len(READY))
        for line in _the_lines():
            line.say(READY)

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        super().compile(progress)  # nothing is said: the followers compile and try out the same by themselves
        self._numbers: dict[int, int] = {}  # id of an array -> what the followers call it
        self._count = 0
        self._dropped: deque[int] = deque()
        self._lines = tuple(_the_lines())

    def gather(self, pages: Sequence[int]) -> jax.Array:
        if not self._lines:
            return super().gather(pages)
        number = self._new_number()
        self._say(Act.GATHER, number, payload=np.asarray(pages, np.int32))
        return self._numbered(super().gather(pages), number)

    def scatter(self, block: jax.Array, pages: np.ndarray) -> None:
        if self._lines:
            self._say(Act.SCATTER, self._numbers[id(block)], payload=pages)
        super().scatter(block, pages)

    def put(self, block: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        if not self._lines:
            return super().put(block, sharding)
        number = self._new_number()
        act = Act.TO_HOST if sharding.memory_kind == PINNED else Act.TO_DEVICE
        self._say(act, self._numbers[id(block)], number)
        return self._numbered(super().put(block, sharding), number)

    def launch(self, shape: StepShape, batch: np.ndarray) -> jax.Array:
        if self._lines:
            self._say(Act.STEP, self.shapes.index(shape), payload=batch)
        return super().launch(shape, batch)

    def write_table(self, changes: np.ndarray) -> None:
        if self._lines:
            self._say(Act.TABLE, payload=changes)
        super().write_table(changes)

    def read(self, step: InFlight) -> list[int]:
        """As :meth:`Runner.read`. Devices wait for ever for those of a process that has gone, so this looks for it.

        Raises:
            EngineDead: a follower is gone.
        """
        checked = time.monotonic()
        while not step.done:
            time.sleep(POLL_S)
            if time.monotonic() - checked > CHECK_S:
                self._check()
                checked = time.monotonic()
        try:
            return super().read(step)
        except Exception:
            self._check()  # who is gone, rather than what the devices say of it
            raise

    def _check(self) -> None:
        for line in self._lines:
            line.check()

    def reset(self) -> None:
        """Refuse: the followers may have got further than this process.

        Raises:
            EngineDead: always.
        """
        raise EngineDead("a step failed on one of several processes; start all of them again")

    def close(self) -> None:
        lines, self._lines = self._lines, ()
        for line in lines:
            line.say(HEADER.pack(Act.END, 0, 0, 0))

    def _say(self, act: Act, first: int = 0, second: int = 0, payload: np.ndarray | None = None) -> None:
        message = b""
        if self._dropped:
            dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
            message = HEADER.pack(Act.FORGET, 0, 0, len(dropped)) + np.array(dropped, np.int32).tobytes()
        size, content = (0, b"") if payload is None else (len(payload), payload.astype("<i4", copy=False).tobytes())
        message += HEADER.pack(act, first, second, size) + content
        for line in self._lines:
            line.say(message)

    def _new_number(self) -> int:
        self._count += 1
        return self._count

    def _numbered(self, block: jax.Array, number: int) -> jax.Array:
        self._numbers[id(block)] = number
        weakref.finalize(block, self._drop, id(block))
        return block

    def _drop(self, key: int) -> None:
        self._dropped.append(self._numbers.pop(key))


class FollowingRunner(Runner):
    """The runner of every other process."""

    def _meet(self) -> None:
        (line,) = _the_lines()
        line.say(READY)
        line.hear(len(READY))

    def obey(self) -> None:
        """Do what the first process says until it ends.

        Raises:
            EngineDead: the first process is gone.
        """
        (line,) = _the_lines()
        blocks: dict[int, jax.Array] = {}
        device = self.block_sharding
        while True:
            act, first, second, size = HEADER.unpack(line.hear(HEADER.size))
            numbers = np.frombuffer(line.hear(4 * size), "<i4")
            match act:
                case Act.STEP:
                    self.launch(self.shapes[first], numbers)
                case Act.GATHER:
                    blocks[first] = self.gather(numbers.tolist())
                case Act.TO_HOST:
                    blocks[second] = self.put(blocks[first], device.with_memory_kind(PINNED))
                case Act.TO_DEVICE:
                    blocks[second] = self.put(blocks[first], device)
                case Act.SCATTER:
                    self.scatter(blocks[first], numbers)
                case Act.FORGET:
                    for number in numbers.tolist():
                        del blocks[number]
                case Act.TABLE:
                    self.write_table(numbers)
                case Act.END:
                    return


def make_runner(decoder: Decoder, config: EngineConfig, layout: Layout, mesh: Mesh) -> Runner:
    """That of the only process, or of the first of several. It stacks the decoder's layers if that is configured."""
    return _runner(Runner if jax.process_count() == 1 else LeadingRunner, decoder, config, layout, mesh)


def follow(
    model: ModelOnDevices,
    config: EngineConfig,
    progress: Progress = lambda done, total: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Be one of the other processes: compile, call ``ready``, and do what the first process says until it ends.

    Raises:
        EngineDead: the first process is gone.
        StartupError: as an engine's.
    """
    (mesh,) = model.meshes
    layout = Layout.plan(config, model.decoder.config, mesh)
    runner = _runner(FollowingRunner, model.decoder, config, layout, mesh)
    runner.compile(progress)
    ready()
    runner.obey()


_R = TypeVar("_R", bound=Runner)


def _runner(kind: type[_R], decoder: Decoder, config: EngineConfig, layout: Layout, mesh: Mesh) -> _R:
    if config.stacks():
        decoder.stack()
    sizes = Sizes(
        num_pages=layout.num_pages,
        page_size=config.page_size,
        max_seqs=config.max_seqs,
        max_step_tokens=config.max_step_tokens,
        max_pages_per_seq=layout.pages_per_seq,
        kv_dtype=layout.kv_dtype,
    )
    return kind(decoder, layout.backend, sizes, mesh=mesh, staging=layout.host.staging)


_lines: list[Line] = []
"""Of this process, to the others; like ``jax.distributed``, one set for the whole process."""


def join(coordinator: str, processes: int, process: int) -> None:
    """Make this process one of several, before any array is made.

    Args:
        coordinator: ``host:port`` of the first process.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        StartupError: they do not find each other.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(JOIN_S))
    except (RuntimeError, ValueError) as error:
        raise StartupError(
            f"process {process} of {processes} does not find the others at {coordinator} within {JOIN_S:.0f} s; "
            f"is every one started, with the same address? ({error})"
        ) from None
    host = coordinator.rpartition(":")[0]
    _lines.extend(_accept(host) if process == 0 else [_connect(host)])


def _the_lines() -> list[Line]:
    if not _lines:
        raise StartupError(
            "this is one of several processes; they must meet by hosts.join, not by jax.distributed alone"
        )
    return _lines


def _accept(host: str) -> list[Line]:
    """Wait for every follower; who does not know the token that the devices have carried is turned away."""
    with socket.create_server((host, 0), backlog=jax.process_count()) as server:
        port, token = _announce(server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES))
        lines: dict[int, Line] = {}
        server.settimeout(JOIN_S)
        while len(lines) < jax.process_count() - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = jax.process_count() - 1 - len(lines)
                raise StartupError(
                    f"{missing} of {jax.process_count()} processes do not reach {host}:{port} within {JOIN_S:.0f} s; "
                    "is the port closed to them?"
                ) from None
            if (other := _introduced(connection, token)) is not None:
                lines[other] = Line(connection, other)
    return [lines[other] for other in sorted(lines)]


def _introduced(connection: socket.socket, token: bytes) -> int | None:
    """Which process it is; None: a stranger, who is sent away."""
    connection.settimeout(STRANGER_S)
    line = Line(connection, -1)
    try:
        if secrets.compare_digest(line.hear(TOKEN_BYTES), token):
            (other,) = PROCESS.unpack(line.hear(PROCESS.size))
            connection.settimeout(None)
            return int(other)
    except EngineDead:
        pass
    line.close()
    return None


def _connect(host: str) -> Line:
    port, token = _announce(0, bytes(TOKEN_BYTES))
    connection = socket.create_connection((host, port), timeout=JOIN_S)
    connection.settimeout(None)
    line = Line(connection, 0)
    line.say(token + PROCESS.pack(jax.process_index()))
    return line


def _announce(port: int, token: bytes) -> tuple[int, bytes]:
    """From the first process to all, through the devices."""
    said = np.frombuffer(PROCESS.pack(port) + token, np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(said)).astype(np.uint8).tobytes()
    (port,) = PROCESS.unpack(heard[: PROCESS.size])
    return port, heard[PROCESS.size :]
