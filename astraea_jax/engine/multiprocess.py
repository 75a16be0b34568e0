"""Multi-process serving: one engine whose devices belong to several processes, on one machine or several.

Every process is started with the same model and configuration and joined by ``jax.distributed``. Process 0, the leader,
has the front doors, the scheduler and the accounting of the host tier. Before it dispatches an operation on sharded
arrays it sends the operation to the followers, which run it on their shards: every process dispatches the same
operations in the same order.

An operation is one message of a few kilobytes over a TCP connection per follower (the packed input of a step, or page
ids), and the leader waits for no answer. A broadcast through the devices would queue behind the running step.
"""

from __future__ import annotations

import itertools
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.dispatch import InFlight
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.loading import ModelOnDevices
from astraea_jax.engine.peers import Peer, join, joined
from astraea_jax.engine.resampling import ENTRY
from astraea_jax.engine.runner import Progress, Runner
from astraea_jax.engine.step import COLUMNS, StepShape
from astraea_jax.errors import EngineDead
from astraea_jax.kv_cache.offload import PINNED
from astraea_jax.models.decoder import Decoder

__all__ = ["FollowerRunner", "LeaderRunner", "follow", "join", "make_runner"]

COMPILE_S = 1800.0
"""Seconds that a process that has compiled waits for the others to do so."""
POLL_S = 5e-5
"""Seconds between two looks of the leader whether a step has ended."""
CHECK_S = 0.1
"""Seconds between two looks for followers that have gone while a step runs."""
HEADER = struct.Struct("<ii")
"""Operation and number of a block; int32 values follow."""
READY = b"ready"


class Op(IntEnum):
    """Operations that followers repeat. ``number`` and ``values`` are those of the message."""

    STEP = 0
    """Run the step of shape ``number`` on the packed input ``values``."""
    TABLE = 1
    """Write ``values`` into the page table."""
    GATHER = 2
    """Read the pages ``values`` of group ``number`` into a new block."""
    TO_HOST = 3
    """Copy block ``number`` to host memory, as a new block."""
    TO_DEVICE = 4
    """Copy block ``number`` to the devices, as a new block."""
    SCATTER = 5
    """Write ``number`` blocks to pages: ``values`` are their group of layers, their numbers, and the pages."""
    FORGET = 6
    """Drop the blocks ``values``."""
    END = 7
    ADJUST = 8
    """Adjust logits of the last step by the entries ``values``."""
    REDRAW = 9
    """Draw rows again: ``values`` are ``number`` times the row and, if there are masks, its mask."""
    LOGPROBS = 10
    """Compute the log-probabilities of the last step."""


class SharedBlock:
    """A block of KV pages of which every process has its shards.

    Args:
        array: as this process sees it.
        number: what messages call it; blocks are numbered in the order in which operations make them.
    """

    def __init__(self, array: jax.Array, number: int):
        self.array, self.number = array, number
        self.is_ready = array.is_ready  # type: ignore[attr-defined]
        self.block_until_ready = array.block_until_ready

    def __len__(self) -> int:
        return len(self.array)


class LeaderRunner(Runner):
    """The leader's runner: after :meth:`compile` it sends each operation to the followers before it dispatches it."""

    _followers: tuple[Peer, ...] = ()
    _step_timeout_s = EngineConfig.step_timeout_s

    @classmethod
    def of(cls, decoder: Decoder, config: EngineConfig, layout: Layout, mesh: Mesh) -> Self:
        """Make the runner as :meth:`Runner.of` does, with the configured limit on a step's time."""
        runner = super().of(decoder, config, layout, mesh)
        runner._step_timeout_s = config.step_timeout_s
        return runner

    def compile(self, progress: Progress = lambda done, total: None) -> None:
        """Compile, which the followers do by themselves, then take the lead: blocks are numbered from 0 again."""
        self._numbers, self._dropped = itertools.count(), deque[int]()
        super().compile(progress)
        self._numbers, self._dropped = itertools.count(), deque[int]()
        self._followers = tuple(joined())

    def _meet(self) -> None:
        for peer in joined():
            peer.receive(COMPILE_S)
        for peer in joined():
            peer.send(READY)

    def launch(self, shape: StepShape, packed: np.ndarray) -> jax.Array:
        self._send(Op.STEP, self.shapes.index(shape), packed)
        return super().launch(shape, packed)

    def adjust(self, entries: np.ndarray) -> None:
        self._send(Op.ADJUST, 0, entries)
        super().adjust(entries)

    def redraw(self, rows: np.ndarray, masks: np.ndarray | None = None) -> jax.Array:
        self._send(Op.REDRAW, len(rows), rows if masks is None else np.concatenate((rows, masks), axis=1))
        return super().redraw(rows, masks)

    def logprobs(self) -> jax.Array:
        self._send(Op.LOGPROBS)
        return super().logprobs()

    def write_table(self, updates: np.ndarray) -> None:
        self._send(Op.TABLE, 0, updates)
        super().write_table(updates)

    def gather(self, pages: Sequence[int], group: int) -> SharedBlock:
        self._send(Op.GATHER, group, np.asarray(pages, np.int32))
        return self._shared(super().gather(pages, group))

    def put(self, block: SharedBlock, sharding: jax.sharding.Sharding) -> SharedBlock:
        self._send(Op.TO_HOST if sharding.memory_kind == PINNED else Op.TO_DEVICE, block.number)
        return self._shared(super().put(block.array, sharding))

    def scatter(self, blocks: Sequence[SharedBlock], pages: np.ndarray, group: int) -> None:
        numbers = np.array([group, *(block.number for block in blocks)], np.int32)
        self._send(Op.SCATTER, len(blocks), np.concatenate((numbers, pages)))
        super().scatter([block.array for block in blocks], pages, group)

    def read(self, step: InFlight) -> list[int]:
        """Read as :meth:`Runner.read` does, but poll: collectives block for ever if a process dies or hangs.

        Raises:
            EngineDead: a follower has gone, or the step takes too long.
        """
        began = checked = time.monotonic()
        while not step.done:
            time.sleep(POLL_S)
            now = time.monotonic()
            if now - began > self._step_timeout_s:
                raise EngineDead(
                    f"a step has not ended within {self._step_timeout_s:g} s; one of the processes or its devices "
                    "hangs, their logs may say why; start all processes again"
                )
            if now - checked > CHECK_S:
                self._check()
                checked = now
        try:
            return super().read(step)
        except Exception:
            self._check()  # a follower that has gone explains what the devices report
            raise

    def reset(self) -> None:
        """Refuse: the followers may have got further than this process.

        Raises:
            EngineDead: always.
        """
        raise EngineDead("a step failed on one of several processes; start all of them again")

    def close(self) -> None:
        self._send(Op.END)
        self._followers = ()

    def _check(self) -> None:
        for peer in self._followers:
            peer.check()

    def _send(self, op: Op, number: int = 0, values: np.ndarray | None = None) -> None:
        if self._dropped and self._followers:
            dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
            self._send(Op.FORGET, 0, np.array(dropped, np.int32))
        message = HEADER.pack(op, number) + (b"" if values is None else values.astype("<i4", copy=False).tobytes())
        for peer in self._followers:
            peer.send(message)

    def _shared(self, array: jax.Array) -> SharedBlock:
        block = SharedBlock(array, next(self._numbers))
        weakref.finalize(block, self._dropped.append, block.number)
        return block


class FollowerRunner(Runner):
    """The runner of every other process."""

    def _meet(self) -> None:
        (leader,) = joined()
        leader.send(READY)
        leader.receive(COMPILE_S)

    def follow(self) -> None:
        """Repeat the leader's operations until it ends; it may be idle for any time.

        Raises:
            EngineDead: the leader has gone.
        """
        (leader,) = joined()
        blocks: dict[int, jax.Array] = {}
        made = itertools.count()
        device = self.block_sharding
        while True:
            message = leader.receive(None)
            op, number = HEADER.unpack_from(message)
            values = np.frombuffer(message, "<i4", offset=HEADER.size)
            match op:
                case Op.GATHER:
                    blocks[next(made)] = self.gather(values.tolist(), number)
                case Op.TO_HOST:
                    blocks[next(made)] = self.put(blocks[number], device.with_memory_kind(PINNED))
                case Op.TO_DEVICE:
                    blocks[next(made)] = self.put(blocks[number], device)
                case Op.SCATTER:
                    group, named, pages = int(values[0]), values[1 : number + 1].tolist(), values[number + 1 :]
                    self.scatter([blocks[each] for each in named], pages, group)
                case Op.FORGET:
                    for dropped in values.tolist():
                        del blocks[dropped]
                case Op.END:
                    return
                case _:
                    self._compute(op, number, values)

    def _compute(self, op: int, number: int, values: np.ndarray) -> None:
        """Repeat one of the operations that have nothing to do with blocks."""
        match op:
            case Op.STEP:
                self.launch(self.shapes[number], values)
            case Op.ADJUST:
                self.adjust(values.reshape(-1, ENTRY))
            case Op.REDRAW:
                rows, masks = np.split(values.reshape(number, -1), [COLUMNS], axis=1)
                self.redraw(rows, masks if masks.size else None)
            case Op.LOGPROBS:
                self.logprobs()
            case Op.TABLE:
                self.write_table(values)


def make_runner(decoder: Decoder, config: EngineConfig, layout: Layout, mesh: Mesh) -> Runner:
    """The runner of an engine in this process: the only one, or the leader of several."""
    return (Runner if jax.process_count() == 1 else LeaderRunner).of(decoder, config, layout, mesh)


def follow(
    model: ModelOnDevices,
    config: EngineConfig,
    progress: Progress = lambda done, total: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Be a follower: compile, call ``ready``, and repeat what the leader dispatches until it ends.

    Raises:
        EngineDead: the leader has gone.
        StartupError: the configuration does not fit the model or this machine.
    """
    (mesh,) = model.meshes
    layout = Layout.plan(config, model.decoder.config, mesh)
    runner = FollowerRunner.of(model.decoder, config, layout, mesh)
    runner.compile(progress)
    ready()
    runner.follow()
