"""Calls that do nothing are bounded and end; they shut out nobody, least of all whoever asks for the health."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from support.engines import settled, until
from support.logged import written

from astraea_jax.errors import Overloaded
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.limits import CallLimits, Room, Writes
from astraea_jax.frontends.rpc.server import Server

DECODE = f"/{wire.ORCHESTRATOR}/Decode"
GOOD = wire.DecodeRequest(max_tokens=2, text_content={"text": "hello"}).SerializeToString()
OWN = [("grpc.use_local_subchannel_pool", 1)]
METHODS = [
    DECODE,
    f"/{wire.ORCHESTRATOR}/HealthCheck",
    f"/{wire.SESSIONS}/End",
    f"/{wire.SESSIONS}/Stats",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


@pytest.fixture
async def serve_with(engine):
    """``await serve_with(limits)`` gives the address of a server, and the server."""
    servers = []

    async def start(limits: CallLimits) -> tuple[str, Server]:
        servers.append(Server(engine, limits=limits))
        return f"127.0.0.1:{await servers[-1].start()}", servers[-1]

    yield start
    for server in servers:
        await server.stop(0)


def silent_on(channel: grpc.aio.Channel, method: str = DECODE) -> grpc.aio.StreamStreamCall:
    return channel.stream_stream(method)()


async def status_of(call: grpc.aio.StreamStreamCall) -> str:
    return str((await call.code()).name)


async def answered(channel: grpc.aio.Channel) -> bool:
    return bool([_ async for _ in channel.unary_stream(DECODE)(GOOD)])


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_says_nothing_is_ended(serve_with, engine, method):
    address, server = await serve_with(CallLimits(silent_s=0.05))
    async with grpc.aio.insecure_channel(address, OWN) as channel:
        calls = [silent_on(channel, method) for _ in range(5)]
        assert {await status_of(call) for call in calls} == {"DEADLINE_EXCEEDED"}
        assert "no message" in await calls[0].details()
        server._gate._limits = CallLimits()  # or else a slow machine might not send the next one's message in time
        assert await answered(channel)
    await until(lambda: not server._gate._silent._count)
    await settled(engine)


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_ends_without_a_message_is_a_bad_request(serve_with, method):
    address, _ = await serve_with(CallLimits())
    async with grpc.aio.insecure_channel(address) as channel:
        call = silent_on(channel, method)
        await call.done_writing()
        assert await status_of(call) == "INVALID_ARGUMENT"


async def test_thousands_of_silent_calls_shut_out_nobody(serve_with, engine):
    """Not even on the connection that they come over, though it has most of them."""
    address, server = await serve_with(CallLimits(silent=200, silent_s=600))
    async with grpc.aio.insecure_channel(address, OWN) as crowd, grpc.aio.insecure_channel(address, OWN) as other:
        calls = [silent_on(crowd) for _ in range(2200)]
        await until(lambda: server._gate._silent._count == 200)
        polite = silent_on(other)  # slow, but not one of the crowd
        for _ in range(3):
            assert await answered(other)
            health = health_pb2_grpc.HealthStub(other)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            assert await answered(crowd)
        await polite.write(GOOD)
        assert await polite.read() is not grpc.aio.EOF
        assert await status_of(calls[0]) == "RESOURCE_EXHAUSTED"
        for call in calls:
            call.cancel()
    await until(lambda: not server._gate._silent._count)
    await settled(engine)


@pytest.mark.parametrize("what", ["watch", "reflection"])
async def test_calls_that_last_are_bounded_and_the_oldest_gives_way(serve_with, what):
    address, server = await serve_with(CallLimits(lasting=3))
    async with grpc.aio.insecure_channel(address) as channel:
        if what == "watch":
            stub = health_pb2_grpc.HealthStub(channel)
            begin = lambda: stub.Watch(health_pb2.HealthCheckRequest())  # noqa: E731
        else:
            info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            begin = info
        calls = []
        for i in range(4):
            calls.append(begin())
            if what == "reflection":
                await calls[-1].write(_list_services())
            assert await calls[-1].read() is not grpc.aio.EOF
            assert server._gate._lasting._count == min(i + 1, 3)
        assert await status_of(calls[0]) == "RESOURCE_EXHAUSTED"
        assert not any(call.done() for call in calls[1:])
        for call in calls:
            call.cancel()
    await until(lambda: not server._gate._lasting._count)


def _list_services():
    from grpc_reflection.v1alpha import reflection_pb2

    return reflection_pb2.ServerReflectionRequest(list_services="")


async def test_malformed_messages_of_every_service_are_bad_requests(endpoint, caplog):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        for method in METHODS:
            call = silent_on(channel, method)
            await call.write(b"\x0a\xff\xff\xff\xff")
            await call.done_writing()
            expected = {"INVALID_ARGUMENT"} if "Stats" not in method else {"INVALID_ARGUMENT", "OK"}
            assert await status_of(call) in expected
    assert not caplog.records


async def test_the_connection_with_most_calls_gives_way():
    room, began, entered = Room(4), asyncio.Event(), []

    async def stay(name: str, number: int) -> None:
        with room.place(name):
            entered.append((name, number))
            await began.wait()

    async def come(name: str, number: int) -> asyncio.Task[None]:
        task = asyncio.create_task(stay(name, number))
        await until(lambda: (name, number) in entered)
        return task

    first = await come("few", 0)
    many = [await come("many", i) for i in range(3)]
    other = await come("other", 0)
    with pytest.raises(Overloaded, match="stand idle"):
        await many[0]
    many[1].cancel()  # a client that hangs up is no one who has given way
    with pytest.raises(asyncio.CancelledError):
        await many[1]
    last = await come("few", 1)
    began.set()
    await asyncio.gather(first, many[2], other, last)
    assert (room._count, room._calls, room._sent_away) == (0, {}, set())


async def test_a_client_that_stops_reading_is_given_up(engine):
    """Its request ends, the others do not, and when it reads again it finds why."""
    server = Server(engine, limits=CallLimits(write_s=0.2))
    address = f"127.0.0.1:{await server.start()}"
    narrow = [*OWN, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
    wordy = (("x-logprobs", "20"), ("x-ignore-eos", "true"))
    long = wire.DecodeRequest(max_tokens=240, token_content={"token_ids": [5]}).SerializeToString()
    async with grpc.aio.insecure_channel(address, narrow) as slow, grpc.aio.insecure_channel(address, OWN) as other:
        calls = [slow.unary_stream(DECODE)(long, metadata=wordy) for _ in range(3)]
        for call in calls:
            assert await call.read() is not grpc.aio.EOF
        await until(lambda: not (server._servicer.decoding or server._gate._writes._began))
        await settled(engine)
        server._gate._writes._longest_s = 600  # or else a slow machine might not take what others are written in time
        assert await answered(other)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="taken nothing"):
                _ = [await call.read() for _ in range(300)]
        assert {await status_of(call) for call in calls} == {"DEADLINE_EXCEEDED"}
    await server.stop(0)


class Stuck:
    """A context whose client takes so many messages and no more."""

    def __init__(self, takes: int):
        self.taken, self._takes = 0, takes

    async def write(self, _: object) -> None:
        if self.taken == self._takes:
            await asyncio.Event().wait()
        self.taken += 1


async def test_only_calls_whose_clients_take_nothing_are_ended():
    writes = Writes(0.05)

    async def responses(pause_s: float, count: int):
        for _ in range(count):
            await asyncio.sleep(pause_s)
            yield b""

    slow, stuck, patient = Stuck(10), Stuck(2), Stuck(1)
    calls = [
        asyncio.create_task(writes.all(responses(*how), context))
        for how, context in [((0.03, 10), slow), ((0, 10), stuck), ((0.2, 1), patient)]
    ]
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error).__name__ for error in done] == ["NoneType", "TooSlow", "NoneType"]
    assert (slow.taken, stuck.taken, patient.taken) == (10, 2, 1)
    writes._longest_s = 600  # or else a slow machine might end it before the client hangs up
    hung = asyncio.create_task(writes.all(responses(0, 1), Stuck(0)))
    await until(lambda: writes._began)
    hung.cancel()
    with pytest.raises(asyncio.CancelledError):  # the client has hung up
        await hung
    assert not writes._began
    assert not writes._stopped


async def test_the_address_with_most_calls_gives_way_first():
    room, left = Room(5), []

    async def stay(name: str) -> None:
        try:
            with room.place(name):
                await asyncio.Event().wait()
        except Overloaded:
            left.append(name)

    names = ["ipv4:10.0.0.1:1", "ipv4:10.0.0.1:2", "ipv4:10.0.0.2:1", "ipv4:10.0.0.2:1", "ipv4:10.0.0.1:3"]
    tasks = []
    for name in [*names, "ipv4:10.0.0.3:1", "ipv6:[::1]:9"]:
        tasks.append(asyncio.create_task(stay(name)))
        await asyncio.sleep(0)
    await until(lambda: len(left) == 2)
    assert left == ["ipv4:10.0.0.1:1", "ipv4:10.0.0.2:1"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (room._count, room._calls, room._of_address) == (0, {}, {})


async def test_calls_are_logged_without_what_they_hold(endpoint):
    with written(as_json=True, access=True) as text:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            named = (("x-request-id", "mine"), ("x-session-id", "secret"))
            assert [_ async for _ in channel.unary_stream(DECODE)(GOOD, metadata=named)]
            bad = channel.unary_stream(DECODE)(b"", metadata=(("x-request-id", "no id, secret"),))
            assert await bad.code() == grpc.StatusCode.INVALID_ARGUMENT
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        await until(lambda: len(text.getvalue().splitlines()) == 2)
    good, bad = (json.loads(line) for line in text.getvalue().splitlines())
    assert (good["door"], good["path"], good["status"], good["request_id"]) == ("grpc", DECODE, "OK", "mine")
    assert (good["output_tokens"], good["prompt_tokens"] > 0, good["client"]) == (2, True, "ipv4:127.0.0.1")
    assert {"queue_s", "prefill_s", "decode_s", "seconds"} <= good.keys()
    assert (bad["status"], bad["request_id"]) == ("INVALID_ARGUMENT", "-")
    assert "secret" not in text.getvalue()
