"""Whatever comes in at the front door, it gets one clear status, leaves nothing behind and hurts nobody else."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.engines import held, settled, until
from support.sizes import SMALL

from astraea_jax.frontends.identity import FINAL, KEYS
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import (
    BIAS,
    CONSTRAINTS,
    NUMBERS_AND_FLAGS,
    SALT,
    STOPS,
)

DECODE = f"{wire.ORCHESTRATOR}/Decode"
METHODS = {
    DECODE: wire.DecodeRequest,
    f"{wire.ORCHESTRATOR}/HealthCheck": wire.HealthCheckRequest,
    f"{wire.SESSIONS}/End": wire.EndRequest,
    f"{wire.SESSIONS}/ToolCalled": wire.ToolCalledRequest,
    f"{wire.SESSIONS}/Stats": wire.StatsRequest,
    "grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest,
    "grpc.health.v1.Health/List": health_pb2.HealthListRequest,
}
ANSWERS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
INT32 = st.integers(-(2**31), 2**31 - 1)

texts = st.builds(wire.DecodeRequest.TextContent, text=st.text(max_size=300))
tokens = st.builds(
    wire.DecodeRequest.TokenContent, token_ids=st.lists(st.integers(0, 259) | st.integers(-2, 300) | INT32, max_size=30)
)
ordinary = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 8)}, optional={"has_bos": st.booleans(), "num_samples": st.integers(0, 1)}
)
odd = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": INT32,
        "num_samples": INT32,
        "lora_adapter_id": st.text(max_size=10),
        "metadata": st.builds(wire.DecodeRequest.Metadata, start_time=st.floats(width=32)),
    },
)
contents = st.builds(dict, text_content=texts) | st.builds(dict, token_content=tokens) | st.just({})
decodes = st.builds(
    lambda *fields: wire.DecodeRequest(**{k: v for some in fields for k, v in some.items()}),
    contents,
    ordinary,
    st.just({}) | odd,
)
names = st.text(max_size=300) | st.sampled_from(["#1", "#2", "s", "peer:", "salt:"])
messages = {
    wire.DecodeRequest: decodes,
    wire.EndRequest: st.builds(wire.EndRequest, session=names),
    health_pb2.HealthCheckRequest: st.builds(health_pb2.HealthCheckRequest, service=st.text(max_size=80)),
    wire.ToolCalledRequest: st.builds(wire.ToolCalledRequest, session=names, tool=names),
}


@st.composite
def calls(draw) -> tuple[str, bytes]:
    """A method, and a request for it: well-formed, with bytes changed, or anything."""
    method = draw(st.just(DECODE) | st.sampled_from(sorted(METHODS)))
    data = draw(messages.get(METHODS[method], st.just(METHODS[method]()))).SerializeToString()
    match draw(st.integers(0, 5)):
        case 0:
            data = draw(st.binary(max_size=100))
        case 1 if data:
            at = draw(st.integers(0, len(data) - 1))
            data = data[:at] + draw(st.binary(max_size=3)) + data[at + 1 :]
    return method, data


ascii_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300)
odd_values = st.sampled_from(["", "-1", "1e999", "nan", "9" * 5000, "None", " 1 ", "1.5", "1_0"]) | ascii_text
SOURCES = ['{"type": "integer"}', '{"$ref": "#"}', "[ab]+", "(", 'start: "a" | "b"', "start: start"]
FLAGS = sorted({*FINAL, "x-ignore-eos"})
metadata = st.lists(
    st.tuples(st.sampled_from([*sorted(KEYS - {*FINAL}), SALT, STOPS[0], "x-unknown"]), ascii_text)
    | st.tuples(st.sampled_from(sorted(NUMBERS_AND_FLAGS)), st.sampled_from(["0", "1", "0.5"]))
    | st.tuples(st.sampled_from(FLAGS), st.sampled_from(["true", "false", "True"]))
    | st.tuples(st.sampled_from(sorted({*NUMBERS_AND_FLAGS, *FLAGS})), odd_values)
    | st.tuples(st.just(BIAS), st.sampled_from(["1:-100,2:5", "1:1,1:2", "1", ":", "0:nan", "-1:1"]) | ascii_text)
    | st.tuples(st.sampled_from(sorted(CONSTRAINTS)), st.sampled_from(SOURCES) | ascii_text)
    | st.tuples(st.just(STOPS[1]), st.binary(max_size=300) | st.text(max_size=80).map(str.encode)),
    max_size=3,
)


@pytest.fixture
def engine(make_engine):
    """An engine of its own, since sessions are left behind."""
    return make_engine(dataclasses.replace(SMALL, max_queued=8))


async def send(channel: grpc.aio.Channel, method: str, data: bytes, metadata: Any = ()) -> str:
    """Name of the status that a call ends with."""
    try:
        if method == DECODE:
            [_ async for _ in channel.unary_stream(f"/{method}")(data, metadata=metadata)]
        else:
            await channel.unary_unary(f"/{method}")(data, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(), metadata=metadata)
async def test_anything_gets_one_clear_status(engine, endpoint, caplog, call, metadata):
    good = wire.DecodeRequest(max_tokens=2, text_content={"text": "hello"}).SerializeToString()
    async with grpc.aio.insecure_channel(endpoint) as channel:
        status = await send(channel, *call, metadata)  # type: ignore[call-arg]
        event(f"{call[0].rpartition('/')[2]}: {status}")
        assert status in ANSWERS
        assert await send(channel, DECODE, good) == "OK"
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert engine.live
    await settled(engine)
    assert engine.in_progress == 0


PHASES = ["opened", "half sent", "sent", "queued", "running", "read"]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_client_that_vanishes_in_any_phase_leaves_nothing_behind(engine, endpoint, phase):
    good = wire.DecodeRequest(max_tokens=2, text_content={"text": "hello"}).SerializeToString()
    long = wire.DecodeRequest(max_tokens=200, text_content={"text": "hello"}).SerializeToString()
    async with grpc.aio.insecure_channel(endpoint) as other:
        for by in ("cancel", "closed connection"):
            channel = grpc.aio.insecure_channel(endpoint, [("grpc.use_local_subchannel_pool", 1)])
            call = channel.stream_stream(f"/{DECODE}")(metadata=(("x-ignore-eos", "true"),))
            await call.wait_for_connection()
            await vanish_at(phase, call, engine, long)
            if by == "cancel":
                call.cancel()
            await channel.close()
            assert await send(other, DECODE, good) == "OK"
    await settled(engine)
    assert engine.in_progress == 0


async def vanish_at(phase: str, call: grpc.aio.StreamStreamCall, engine: Any, request: bytes) -> None:
    """Bring a call to a phase."""
    if phase == "opened":
        return
    if phase == "half sent":  # the message has come, and the client does not say that there is no other
        await call.write(request)
        return
    with held(engine, 1):  # or else it might have ended before anybody looks
        await call.write(request)
        await call.done_writing()
        if phase == "queued":
            await until(lambda: engine.in_progress)
        if phase == "running":
            await until(lambda: engine.stats().running)
    if phase == "read":
        assert await call.read() is not grpc.aio.EOF
