"""Connections between the processes of one engine: found through ``jax.distributed``, authenticated, never blocking.

They are connections of the standard library that carry bytes only: nothing received is unpickled.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import jax
import numpy as np
from jax.experimental import multihost_utils

from astraea_jax.errors import EngineDead, StartupError

JOIN_S = 120.0
"""Seconds that processes wait for each other when they start."""
STALL_S = 10
"""Seconds that a read or write may stall in the middle of a message or of the handshake."""
KEY_BYTES = 32


class Peer:
    """The connection to another process.

    Args:
        connection: from :func:`_connection`.
        process: the other process's number.
    """

    def __init__(self, connection: Connection, process: int):
        self._connection, self._process = connection, process

    def send(self, message: bytes) -> None:
        """Send a message; blocks only while the other process is megabytes behind.

        Raises:
            EngineDead: the other process has gone, or takes nothing for ``STALL_S`` seconds.
        """
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, timeout_s: float | None) -> bytes:
        """Wait for a message; None waits until one comes or the other process has gone.

        Raises:
            EngineDead: the other process has gone, or sends nothing in time.
        """
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv_bytes()
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        raise EngineDead(f"process {self._process} hangs: it has sent nothing for {timeout_s} s")

    def check(self) -> None:
        """Raise EngineDead if the other process, which sends nothing while it serves, has hung up."""
        if self._connection.poll():
            raise self._lost()

    def _lost(self, error: Exception | None = None) -> EngineDead:
        if isinstance(error, BlockingIOError):
            return EngineDead(f"process {self._process} hangs: no byte has moved for {STALL_S} s")
        return EngineDead(f"process {self._process} has gone, its own log says why; start all processes again")


_peers: list[Peer] = []
"""The connections of this process: to every follower, or to the leader. Process-wide, like ``jax.distributed``."""


def join(coordinator: str, processes: int, process: int) -> None:
    """Make this process one of several, before any array is made.

    Args:
        coordinator: ``host:port`` of the leader.
        processes: how many there are.
        process: number of this one, from 0.

    Raises:
        StartupError: the processes do not find each other.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(JOIN_S))
    except (RuntimeError, ValueError) as error:
        raise StartupError(
            f"process {process} of {processes} does not find the others at {coordinator} within {JOIN_S:.0f} s; "
            f"is every one started, with the same address? ({error})"
        ) from None
    host = coordinator.rpartition(":")[0]
    _peers.extend(_accept(host) if process == 0 else [_connect(host)])


def joined() -> list[Peer]:
    """The connections that :func:`join` made.

    Raises:
        StartupError: it has not been called.
    """
    if not _peers:
        raise StartupError(
            "this is one of several processes: call multiprocess.join, which calls jax.distributed.initialize"
        )
    return _peers


def _accept(host: str) -> list[Peer]:
    """Wait for every follower; connections without the key, which only the devices have carried, are refused."""
    with socket.create_server((host, 0), backlog=jax.process_count()) as server:
        port, key = _announce(server.getsockname()[1], secrets.token_bytes(KEY_BYTES))
        deadline = time.monotonic() + JOIN_S
        followers: dict[int, Peer] = {}
        while missing := jax.process_count() - 1 - len(followers):
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection = _connection(server.accept()[0])
            except TimeoutError:
                raise StartupError(
                    f"{missing} of {jax.process_count()} processes do not reach {host}:{port} within {JOIN_S:.0f} s; "
                    "is the port closed to them?"
                ) from None
            if (process := _introduced(connection, key)) is not None:
                followers[process] = Peer(connection, process)
    return [followers[process] for process in sorted(followers)]


def _introduced(connection: Connection, key: bytes) -> int | None:
    """The process at the other end, or None if it does not know the key."""
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        return int.from_bytes(connection.recv_bytes(4), "little")
    except Exception:  # a stranger may send anything
        connection.close()
        return None


def _connect(host: str) -> Peer:
    port, key = _announce(0, bytes(KEY_BYTES))
    try:
        connection = _connection(socket.create_connection((host, port), timeout=JOIN_S))
        _greet(connection, key, jax.process_index())
    except Exception as error:
        raise StartupError(f"the leader at {host}:{port} cannot be reached: {error!r}") from error
    return Peer(connection, 0)


def _greet(connection: Connection, key: bytes, process: int) -> None:
    """Show the leader that this process knows the key, see that it does, and say which process this is."""
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    connection.send_bytes(process.to_bytes(4, "little"))


def _connection(connected: socket.socket) -> Connection:
    """The connection over a TCP socket; the kernel limits how long a read or a write stalls."""
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices a machine that has vanished
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_S, 0))
    return Connection(connected.detach())


def _announce(port: int, key: bytes) -> tuple[int, bytes]:
    """Broadcast the leader's port and key to all processes, through the devices."""
    sent = np.frombuffer(port.to_bytes(4, "little") + key, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes()
    return int.from_bytes(received[:4], "little"), received[4:]
