"""What is written to a connection in one turn of the event loop is sent together, in order, and before it is closed."""

import asyncio
import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import MODEL, serving

from astraea_jax.frontends.http.connections import MOST_GATHERED, GatheringTransport


async def connected():
    """A transport that gathers, and the socket of whoever receives."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    return GatheringTransport(transport, loop), theirs


def arrived(receiver: socket.socket) -> bytes | None:
    """What can be received; None: nothing yet."""
    try:
        return receiver.recv(2**20)
    except BlockingIOError:
        return None


@given(st.lists(st.lists(st.binary(max_size=20), max_size=5), max_size=5))
def test_each_turns_pieces_come_together_and_in_order(turns):
    async def run():
        transport, receiver = await connected()
        with receiver:
            for pieces in turns:
                for piece in pieces:
                    transport.write(piece)
                assert arrived(receiver) is None
                await asyncio.sleep(0)
                assert arrived(receiver) == (b"".join(pieces) or None)
            transport.close()

    asyncio.run(run())


async def test_much_is_sent_at_once():
    transport, receiver = await connected()
    with receiver:
        transport.write(b"a")
        transport.write(b"b" * MOST_GATHERED)
        assert arrived(receiver) == b"a" + b"b" * MOST_GATHERED
        transport.close()


async def test_closing_sends_what_is_left():
    transport, receiver = await connected()
    with receiver:
        transport.write(b"the last")
        transport.close()
        await asyncio.sleep(0)
        assert arrived(receiver) == b"the last"
        await asyncio.sleep(0)
        assert arrived(receiver) == b""


async def test_what_is_written_after_the_end_goes_nowhere():
    transport, receiver = await connected()
    with receiver:
        transport.close()
        transport.write(b"too late")
        for _ in range(3):
            await asyncio.sleep(0)
        assert arrived(receiver) == b""


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere"])
async def test_head_and_body_of_an_answer_come_together(chatty, path):
    async with serving(chatty) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        head, _, body = (await reader.read(2**16)).partition(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        assert len(body) == int(length.split()[1]) > 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 4}),
        ("/v1/messages", {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
        ("/v1/responses", {"model": MODEL, "input": "Hello", "max_output_tokens": 4}),
    ],
)
async def test_the_last_events_of_a_stream_come_with_its_end(chatty, path, body):
    async with serving(chatty) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        content = json.dumps({**body, "stream": True}).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode())
        writer.write(b"content-length: %d\r\n\r\n" % len(content) + content)
        pieces = [b""]
        while not pieces[-1].endswith(b"\r\n0\r\n\r\n"):
            pieces.append(await reader.read(2**16))
            assert pieces[-1]
        assert b"data: " in pieces[-1]
        writer.close()
        await writer.wait_closed()
