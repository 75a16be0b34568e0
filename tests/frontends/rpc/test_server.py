"""The endpoint over a real socket and a real engine: JetStream's semantics, clear statuses, nothing leaked."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.engines import held, posted, settled
from support.sizes import SMALL

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server

NINE = dataclasses.replace(SMALL, max_queued=1)
"""Eight run, one waits."""


@pytest.fixture
async def serving(engine):
    server = Server(engine)
    yield server, f"127.0.0.1:{await server.start()}"
    await server.stop(0)


@pytest.fixture
async def endpoint(serving):
    return serving[1]


@pytest.fixture
async def client(endpoint, engine):
    async with Client(endpoint, engine.tokenizer) as client:
        yield client


@pytest.fixture
async def decode(endpoint):
    """A stock client: JetStream's request in, ``([(text, ids)], trailing metadata)`` out."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        method = channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )

        async def call(metadata=(), limit_s=None, **fields):
            stream = method(wire.DecodeRequest(**fields), metadata=metadata, timeout=limit_s)
            samples = []
            async for response in stream:
                assert len(response.stream_content.samples) == 1
                sample = response.stream_content.samples[0]
                samples.append((sample.text, list(sample.token_ids)))
            return samples, dict(await stream.trailing_metadata())

        yield call


NO_EOS = (("x-ignore-eos", "true"),)


async def deserted(server: Server) -> None:
    """Until it knows that no caller is left."""
    while server._decoding:
        await asyncio.sleep(0.002)


async def test_text_request_gets_text_and_tokens_and_an_empty_last_sample(decode, engine, greedy):
    samples, trailing = await decode(text_content={"text": "hello"}, max_tokens=6, metadata=NO_EOS)
    expected = greedy(engine.tokenizer.encode("hello"), 6)
    assert [token for _, ids in samples for token in ids] == expected
    assert "".join(text for text, _ in samples) == engine.tokenizer.decode(expected)
    assert samples[-1] == ("", [])
    assert trailing["x-finish-reason"] == "length"
    assert trailing["x-output-tokens"] == "6"


async def test_token_request_gets_tokens_only(decode, greedy):
    samples, _ = await decode(token_content={"token_ids": [1, 2, 3]}, max_tokens=5, metadata=NO_EOS)
    assert [token for _, ids in samples for token in ids] == greedy([1, 2, 3], 5)
    assert {text for text, _ in samples} == {""}


async def test_sampling_by_metadata(decode):
    async def draw(seed):
        metadata = (*NO_EOS, ("x-temperature", "1.0"), ("x-top-p", "0.9"), ("x-seed", seed))
        samples, _ = await decode(token_content={"token_ids": [1]}, max_tokens=12, metadata=metadata)
        return [token for _, ids in samples for token in ids]

    assert await draw("1") == await draw("1") != await draw("2")


async def test_stop_by_metadata(decode, engine, greedy):
    text = engine.tokenizer.decode(greedy([7, 8, 9], 24))
    metadata = (*NO_EOS, ("x-stop-bin", text[4:6].encode()))
    samples, trailing = await decode(
        text_content={"text": engine.tokenizer.decode([7, 8, 9])}, max_tokens=24, metadata=metadata
    )
    assert "".join(piece for piece, _ in samples) == text[: text.find(text[4:6])]
    assert trailing["x-finish-reason"] == "stop"


@pytest.mark.parametrize("key", ["x-session-id", "x-dynamo-session-id", "x-claude-code-session-id"])
async def test_a_session_keeps_its_cache(decode, engine, key):
    session = (*NO_EOS, (key, f"by-{key}"))
    await decode(token_content={"token_ids": list(range(1, 31))}, max_tokens=3, metadata=session)
    final = (*session, ("x-session-final", "true"))
    _, trailing = await decode(token_content={"token_ids": list(range(1, 41))}, max_tokens=3, metadata=final)
    assert int(trailing["x-cached-tokens"]) == 30
    await settled(engine)
    assert engine.stats().retained_pages == 0


@pytest.mark.parametrize(
    ("fields", "metadata", "status", "words"),
    [
        ({}, (), "INVALID_ARGUMENT", "text_content or token_content"),
        ({"text_content": {"text": ""}}, (), "INVALID_ARGUMENT", "empty"),
        ({"max_tokens": 0}, (), "INVALID_ARGUMENT", "max_tokens is 0"),
        ({"max_tokens": -5}, (), "INVALID_ARGUMENT", "max_tokens is -5"),
        ({"max_tokens": 2**31 - 1}, (), "INVALID_ARGUMENT", "context of 256"),
        ({"token_content": {"token_ids": [1] * 300}}, (), "INVALID_ARGUMENT", "300 tokens"),
        ({"token_content": {"token_ids": [9999]}}, (), "INVALID_ARGUMENT", "vocabulary"),
        ({"num_samples": 3}, (), "INVALID_ARGUMENT", "num_samples is 3"),
        ({"num_samples": -1}, (), "INVALID_ARGUMENT", "num_samples is -1"),
        ({"lora_adapter_id": "x"}, (), "NOT_FOUND", "'x'"),
        ({}, (("x-temperature", "nan"),), "INVALID_ARGUMENT", "temperature is nan"),
        ({}, (("x-temperature", "hot"),), "INVALID_ARGUMENT", "x-temperature"),
        ({}, (("x-top-p", "inf"),), "INVALID_ARGUMENT", "top_p is inf"),
        ({}, (("x-top-k", "1.5"),), "INVALID_ARGUMENT", "x-top-k"),
        ({}, (("x-ignore-eos", "maybe"),), "INVALID_ARGUMENT", "x-ignore-eos"),
        ({}, (("x-session-id", "s" * 300),), "INVALID_ARGUMENT", "300 characters"),
    ],
)
async def test_bad_requests_get_one_clear_status(fields, metadata, status, words, decode, engine):
    good = {"text_content": {"text": "a"}, "max_tokens": 4}
    request = {**good, **fields}
    if "token_content" in fields or (not fields and not metadata):
        del request["text_content"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode(metadata=metadata, **request)
    assert caught.value.code().name == status
    assert words in caught.value.details()
    samples, _ = await decode(**good)  # and the server goes on
    assert samples


@pytest.mark.parametrize("method", ["jetstream_proto.Orchestrator/Decode", "astraea.Sessions/End"])
async def test_malformed_bytes_are_a_bad_request(method, endpoint, caplog):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [_ async for _ in channel.unary_stream(f"/{method}")(b"\x0a\xff\xff\xff\xff")]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not a well-formed" in caught.value.details()
    assert not caplog.records


async def test_no_input_is_a_fault_of_ours(endpoint, engine, caplog):
    """Requests with bytes changed at random, and metadata from a bag of odd values."""
    rng = random.Random(0)
    keys = ("x-temperature", "x-top-p", "x-top-k", "x-min-p", "x-seed", "x-stop", "x-ignore-eos", "x-session-id")
    values = ("", "1", "-1", "0.5", "1e999", "nan", "9" * 400, "true", "None", "0x10", " 1 ", "s" * 300)
    whole = wire.DecodeRequest(max_tokens=3, text_content={"text": "hello"}, has_bos=True).SerializeToString()
    seen = set()
    async with grpc.aio.insecure_channel(endpoint) as channel:
        method = channel.unary_stream(f"/{wire.ORCHESTRATOR}/Decode")

        async def one():
            data = bytearray(whole)
            for _ in range(rng.choice((0, 0, 1, 3))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            metadata = [(rng.choice(keys), rng.choice(values)) for _ in range(rng.randrange(3))]
            try:
                [_ async for _ in method(bytes(data), metadata=metadata)]
                seen.add("OK")
            except grpc.aio.AioRpcError as error:
                seen.add(error.code().name)

        for _ in range(300):
            await one()
    assert seen <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert "OK" in seen
    assert not caplog.records
    for session in values:
        engine.end_session(session)
    await settled(engine, programs=True)


async def test_the_longest_stop_strings_fit(decode):
    stops = [("x-stop-bin", ("長" * 255 + chr(0x4E00 + i)).encode()) for i in range(16)]
    _, trailing = await decode(token_content={"token_ids": [1]}, max_tokens=2, metadata=(*NO_EOS, *stops))
    assert trailing["x-finish-reason"] == "length"


async def test_a_fault_of_ours_is_told_to_the_log_only(decode, engine, monkeypatch, caplog):
    def broken(*_, **__):
        raise KeyError("a secret")

    monkeypatch.setattr(engine, "generate", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode(token_content={"token_ids": [1]}, max_tokens=2)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "a secret" in caplog.text


async def test_cancel_and_deadline_free_the_pages(decode, client, engine, serving):
    computed = engine.times.tokens
    generation = client.generate([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
    iterator = aiter(generation)
    with held(engine, 2):
        await anext(iterator)
        generation.cancel()
        await deserted(serving[0])
    assert [delta.finish_reason async for delta in iterator][-1] == "cancelled"  # as with an engine in this process
    await settled(engine)
    with held(engine, 2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decode(token_content={"token_ids": [1]}, max_tokens=250, limit_s=0.5, metadata=NO_EOS)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await deserted(serving[0])
    await settled(engine)
    assert engine.times.tokens - computed < 20  # of the 450 that were asked for
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_a_deadline_is_honoured_in_the_queue(make_engine):
    engine = make_engine(NINE)
    server = Server(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        method = channel.unary_stream(f"/{wire.ORCHESTRATOR}/Decode")
        request = wire.DecodeRequest(token_content={"token_ids": [1]}, max_tokens=250).SerializeToString()
        computed = engine.times.tokens
        with held(engine, 2) as engine_held:
            running = [method(request, metadata=NO_EOS) for _ in range(8)]
            while engine._admitted < 8:
                await asyncio.sleep(0.002)
            engine_held.more(2)  # by now all eight run
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [_ async for _ in method(request, metadata=NO_EOS, timeout=0.5)]
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            for call in running:
                call.cancel()
            await deserted(server)
        await settled(engine)
    assert engine.times.tokens - computed < 100  # of those that ran a few, of the one that waited none
    await server.stop(0)


async def test_a_cancelled_task_stays_cancelled(client, engine):
    async def consume():
        async for _ in client.generate([1, 2], SamplingParams(max_tokens=200, ignore_eos=True)):
            pass

    with held(engine, 2):
        task = asyncio.create_task(consume())
        while not engine.stats().running:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await settled(engine)


async def test_a_session_ended_from_outside_is_no_whole_answer(decode, client, engine):
    metadata = (*NO_EOS, ("x-session-id", "ended"))
    with held(engine, 2) as engine_held:
        call = asyncio.create_task(decode(token_content={"token_ids": [1]}, max_tokens=250, metadata=metadata))
        await engine_held.still()
        client.end_session("ended")
        await posted(engine)
    with pytest.raises(grpc.aio.AioRpcError, match="session was ended"):
        await call


async def test_our_client_sees_text_usage_and_errors(client, engine, greedy):
    generation = client.generate([7, 8, 9], SamplingParams(max_tokens=10, ignore_eos=True), session="c")
    deltas = [delta async for delta in generation]
    assert [t for d in deltas for t in d.token_ids] == greedy([7, 8, 9], 10)
    assert "".join(d.text for d in deltas) == engine.tokenizer.decode(greedy([7, 8, 9], 10))
    assert deltas[-1].finish_reason == "length"
    assert generation.usage.output_tokens == 10
    client.end_session("c")
    with pytest.raises(RequestError, match="vocabulary"):
        [delta async for delta in client.generate([10**6], SamplingParams(max_tokens=1))]
    with pytest.raises(RequestError, match="stop_token_ids"):
        client.generate([1], SamplingParams(stop_token_ids=(1,)))
    await settled(engine, programs=True)


async def test_health_reflection_and_liveness(endpoint, client):
    assert await client.is_live()
    async with grpc.aio.insecure_channel(endpoint) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", wire.ORCHESTRATOR):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=wire.ORCHESTRATOR),
        ]
        replies = [reply async for reply in reflection.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in replies[0].list_services_response.service}
    assert {wire.ORCHESTRATOR, wire.SESSIONS, "grpc.health.v1.Health"} <= names
    assert b"DecodeRequest" in replies[1].file_descriptor_response.file_descriptor_proto[0]


async def test_overload_and_a_dead_engine_are_told_apart(make_engine, random_folder):
    engine = make_engine(NINE)
    server = Server(engine)
    async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
        with held(engine, 2):
            busy = [client.generate([1], SamplingParams(max_tokens=100, ignore_eos=True)) for _ in range(9)]
            while engine._admitted < 9:
                await asyncio.sleep(0.005)
            with pytest.raises(Overloaded) as caught:
                [delta async for delta in client.generate([1], SamplingParams(max_tokens=1))]
        assert ("grpc-retry-pushback-ms", "1000") in tuple(caught.value.__cause__.trailing_metadata())
        for generation in busy:
            generation.cancel()
    await server.stop(0)
    cold = Engine.from_folder(random_folder, SMALL)
    server = Server(cold)
    async with Client(f"127.0.0.1:{await server.start()}", cold.tokenizer) as client:
        assert not await client.is_live()
        with pytest.raises(EngineDead, match="not been started"):
            [delta async for delta in client.generate([1], SamplingParams(max_tokens=1))]
    await server.stop(0)


async def test_stopping_lets_running_requests_finish_and_refuses_new_ones(engine):
    server = Server(engine)
    address = f"127.0.0.1:{await server.start()}"
    async with Client(address, engine.tokenizer) as client, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with held(engine, 2):
            iterator = aiter(client.generate([1, 2], SamplingParams(max_tokens=240, ignore_eos=True)))
            tokens = [*(await anext(iterator)).token_ids]
            stopping = asyncio.create_task(server.stop(3600))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not await client.is_live()
            with pytest.raises(EngineDead, match="shutting down"):
                [delta async for delta in client.generate([1], SamplingParams(max_tokens=1))]
        tokens += [token async for delta in iterator for token in delta.token_ids]
        assert len(tokens) == 240
        await stopping  # the watching stream does not hold it up


async def test_a_taken_port_is_an_error(engine):
    server = Server(engine)
    port = await server.start()
    with pytest.raises(OSError, match="another --port"):
        await Server(engine, port=port).start()
    await server.stop(0)


async def tokens_of(generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


async def test_counts_and_tools_travel(client, engine):
    await tokens_of(client.generate([1, 2, 3], SamplingParams(max_tokens=2), session="tooled"))
    client.tool_called("tooled", "price")
    while engine.stats().in_tool_wait == 0 or client._telling:
        await asyncio.sleep(0.005)
    counts = await client.counts()
    assert counts["in_tool_wait"] >= 1
    assert counts["offloaded_bytes"] == counts["failed_transfers"] == 0
    assert any(name.startswith("kv keep: ") for name in counts)
    client.end_session("tooled")


async def test_a_tool_with_an_endless_name_is_refused(client, endpoint):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call = channel.unary_unary(
            f"/{wire.SESSIONS}/ToolCalled", request_serializer=wire.ToolCalledRequest.SerializeToString
        )
        with pytest.raises(grpc.aio.AioRpcError, match="the tool's name has 300 characters"):
            await call(wire.ToolCalledRequest(session="s", tool="x" * 300))


async def test_equal_beginnings_are_shared_under_one_salt_only(client):
    prompt = [*range(100, 120), 7]
    usages = []
    for salt in ("here", "here", "there"):
        generation = client.generate(prompt, SamplingParams(max_tokens=2), salt=salt)
        await tokens_of(generation)
        usages.append(generation.usage.cached_tokens)
    assert usages == [0, 20, 0]
