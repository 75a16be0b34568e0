"""Connections between processes: bytes only, strangers refused, and no wait without an end."""

from __future__ import annotations

import ast
import inspect
import pickletools
import socket
import threading

import pytest

from astraea_jax.engine import peers
from astraea_jax.engine.peers import Peer, _connection, _introduced
from astraea_jax.errors import EngineDead

KEY = bytes(range(32))


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(peers, "STALL_S", 1)


@pytest.fixture
def pair():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with client, accepted:
        yield client, accepted


def test_messages_arrive_whole_and_in_order(pair):
    one, other = (Peer(_connection(end), i) for i, end in enumerate(pair))
    sent = [b"", b"step", bytes(300_000)]
    sender = threading.Thread(target=lambda: [one.send(message) for message in sent])
    sender.start()
    assert [other.receive(30) for _ in sent] == sent
    sender.join()


def test_what_arrives_is_never_unpickled(pair):
    one, other = (Peer(_connection(end), i) for i, end in enumerate(pair))
    opcodes = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
    bomb = opcodes["GLOBAL"] + b"builtins\nexit\n" + opcodes["EMPTY_TUPLE"] + opcodes["REDUCE"] + opcodes["STOP"]
    one.send(bomb)
    assert other.receive(30) == bomb


def test_only_bytes_are_sent_and_received():
    """``send`` and ``recv`` of a standard connection pickle."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(peers)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("connection")
    }
    assert used == {"send_bytes", "recv_bytes", "poll", "close"}


def test_a_peer_that_has_gone_is_named(pair):
    client, accepted = pair
    peer = Peer(_connection(client), 3)
    accepted.close()
    for use in (peer.check, lambda: peer.receive(None), lambda: [peer.send(b"step") for _ in range(100)]):
        with pytest.raises(EngineDead, match="process 3 has gone, its own log says why"):
            use()


@pytest.mark.usefixtures("soon")
def test_a_peer_that_hangs_is_named(pair):
    client, accepted = pair
    peer = Peer(_connection(client), 3)
    peer.check()
    with pytest.raises(EngineDead, match=r"process 3 hangs: it has sent nothing for 0\.01 s"):
        peer.receive(0.01)
    accepted.sendall(b"\0\0\0\x64half")  # a hundred bytes were to come
    with pytest.raises(EngineDead, match="process 3 hangs: no byte has moved for 1 s"):
        peer.receive(30)
    with pytest.raises(EngineDead, match="process 3 hangs: no byte has moved for 1 s"):
        peer.send(bytes(2**26))  # nobody reads it


@pytest.mark.parametrize(
    "says", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4welc", b"\0\0\0\x10" + bytes(16), b"\xff" * 64]
)
@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.usefixtures("soon")
def test_a_stranger_is_refused(pair, says, stays):
    client, accepted = pair
    client.sendall(says)
    if not stays:
        client.shutdown(socket.SHUT_WR)
    assert _introduced(_connection(accepted), KEY) is None


@pytest.mark.parametrize(("key", "process"), [(KEY, 5), (bytes(32), None)])
def test_whoever_knows_the_key_is_let_in(pair, key, process):
    client, accepted = pair
    follower = threading.Thread(target=_introduce, args=(client, key))
    follower.start()
    assert _introduced(_connection(accepted), KEY) == process
    follower.join()


def _introduce(client: socket.socket, key: bytes) -> None:
    try:
        peers._greet(_connection(client), key, 5)
    except Exception:
        assert key != KEY
