"""The endpoint over a real socket and a real engine: JetStream's semantics, clear statuses, nothing leaked."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.engines import break_loop, held, posted, settled, until
from support.sizes import SMALL
from support.stub import STUB, stub_engine

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server
from astraea_jax.models.tokenizer import Tokenizer as Tokens

SIXTEEN = dataclasses.replace(SMALL, max_queued=8)
"""Eight run, eight wait."""
HUNDRED = SamplingParams(max_tokens=100, ignore_eos=True)
THIRTY = SamplingParams(max_tokens=30, ignore_eos=True)


NO_EOS = (("x-ignore-eos", "true"),)


async def deserted(server: Server) -> None:
    """Until it knows that no caller is left."""
    while server._servicer.decoding:
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


@pytest.mark.parametrize(
    "key", ["x-session-id", "x-dynamo-session-id", "x-claude-code-session-id", "session_id", "x_session_id"]
)
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
        ({}, (("x-session-id", "a"), ("x-session-id", "b")), "INVALID_ARGUMENT", "x-session-id is given twice"),
        ({}, (("x-session-id", "a"), ("x_session_id", "b")), "INVALID_ARGUMENT", "x-session-id is given twice"),
        ({}, (("x-session-final", "yes"),), "INVALID_ARGUMENT", "x-session-final"),
        ({}, (("x-session-final", ""),), "INVALID_ARGUMENT", "x-session-final"),
        ({}, (("x-cache-salt", "a"), ("x-cache-salt", "b")), "INVALID_ARGUMENT", "x-cache-salt is given twice"),
        ({}, (("x-cache-salt", "s" * 252),), "INVALID_ARGUMENT", "252 characters"),
        ({}, (("x-temperature", "0"), ("x-temperature", "1")), "INVALID_ARGUMENT", "x-temperature is given twice"),
        ({}, (("x-stop-bin", b"\xff"),), "INVALID_ARGUMENT", "not UTF-8"),
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


async def all_run(engine, engine_held) -> None:
    """Let steps pass until all slots are taken, once the engine knows of as many requests: none ends before."""
    await until(lambda: engine.in_progress >= SMALL.max_seqs)
    while engine.stats().running < SMALL.max_seqs:
        if engine_held.stands_still:
            engine_held.more(1)
        await asyncio.sleep(0.002)


async def test_a_deadline_is_honoured_in_the_queue(engine):
    server = Server(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        method = channel.unary_stream(f"/{wire.ORCHESTRATOR}/Decode")
        request = wire.DecodeRequest(token_content={"token_ids": [1]}, max_tokens=250).SerializeToString()
        computed = engine.times.tokens
        with held(engine, 2) as engine_held:
            running = [method(request, metadata=NO_EOS) for _ in range(8)]
            await all_run(engine, engine_held)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [_ async for _ in method(request, metadata=NO_EOS, timeout=0.5)]
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            for call in running:
                call.cancel()
            await deserted(server)
        await settled(engine)
    assert engine.times.tokens - computed < 200  # of those that ran a few, of the one that waited none
    await server.stop(0)


async def test_a_session_ended_from_outside_is_no_whole_answer(decode, client, engine):
    metadata = (*NO_EOS, ("x-session-id", "ended"), ("x-cache-salt", "tenant"))
    with held(engine, 2) as engine_held:
        call = asyncio.create_task(decode(token_content={"token_ids": [1]}, max_tokens=250, metadata=metadata))
        await engine_held.still()
        client.end_session("ended", salt="tenant")
        await posted(engine)
    with pytest.raises(grpc.aio.AioRpcError, match="session was ended"):
        await call


async def test_overload_and_a_dead_engine_are_told_apart(make_engine, random_folder):
    engine = make_engine(SIXTEEN)
    server = Server(engine)
    async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
        with held(engine, 2) as engine_held:
            one = lambda i: asyncio.create_task(tokens_of(client.generate([1], HUNDRED, salt=f"tenant-{i}")))  # noqa: E731
            busy = [one(i) for i in range(8)]
            await all_run(engine, engine_held)
            busy += [one(i) for i in range(8)]  # one client alone could not fill the queue
            while engine.in_progress < 16:
                await asyncio.sleep(0.005)
            with pytest.raises(Overloaded) as caught:
                await tokens_of(client.generate([1], SamplingParams(max_tokens=1)))
        assert ("grpc-retry-pushback-ms", "1000") in tuple(caught.value.__cause__.trailing_metadata())
        for task in busy:
            task.cancel()
        await asyncio.wait(busy)
    await settled(engine)
    await server.stop(0)
    cold = Engine.from_folder(random_folder, SMALL)
    server = Server(cold)
    async with Client(f"127.0.0.1:{await server.start()}", cold.tokenizer) as client:
        assert not await client.is_live()
        with pytest.raises(EngineDead, match="not been started"):
            [delta async for delta in client.generate([1], SamplingParams(max_tokens=1))]
    await server.stop(0)


async def test_what_the_grace_cuts_off_is_told(engine):
    """To the caller with a status of its own, to whoever stops the server as a number; the engine may hang."""
    server = Server(engine)
    async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
        with held(engine, 3):
            reading = aiter(client.generate([1, 2], HUNDRED))
            await anext(reading)
            waiting = asyncio.create_task(tokens_of(client.generate([1, 2], HUNDRED)))
            await until(lambda: len(server._servicer.decoding) == 2)
            assert await server.stop(0.01) == 2
            for cut in (waiting, tokens_of(reading)):
                with pytest.raises(EngineDead, match="shut down before the request had ended"):
                    await cut
    await settled(engine)


async def test_what_dies_within_the_grace_is_cut_off_too():
    engine, runner = stub_engine()
    engine.start()
    runner.go.clear()
    server = Server(engine)
    async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
        running = asyncio.create_task(tokens_of(client.generate([1, 2], THIRTY)))
        await until(lambda: engine.in_progress)
        stopping = asyncio.create_task(server.stop(3600))
        await until(lambda: server._servicer.draining)
        with pytest.raises(EngineDead, match="shutting down"):  # refused, which cuts nothing
            await tokens_of(client.generate([1], SamplingParams(max_tokens=1)))
        break_loop(engine, ZeroDivisionError("a secret"))
        runner.go.set()
        with pytest.raises(EngineDead, match=r"ZeroDivisionError$"):
            await running
        assert await stopping == 1


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
        assert await stopping == 0  # the watching stream does not hold it up
        assert await watch.read() == grpc.aio.EOF
        assert await watch.code() == grpc.StatusCode.OK


async def test_a_taken_port_is_an_error(engine):
    server = Server(engine)
    port = await server.start()
    with pytest.raises(OSError, match="another --port"):
        await Server(engine, port=port).start()
    await server.stop(0)


async def tokens_of(generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


async def test_a_tool_with_an_endless_name_is_refused(client, endpoint):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call = channel.unary_unary(
            f"/{wire.SESSIONS}/ToolCalled", request_serializer=wire.ToolCalledRequest.SerializeToString
        )
        with pytest.raises(grpc.aio.AioRpcError, match="the tool's name has 300 characters"):
            await call(wire.ToolCalledRequest(session="s", tool="x" * 300))


@pytest.mark.parametrize(
    ("key", "source", "matches"),
    [
        ("x-json-schema", '{"enum": ["yes", "no"]}', r'"(yes|no)"'),
        ("x-regex", "[ab]{3}", "[ab]{3}"),
        ("x-grammar", 'start: "left" | "right"', "left|right"),
        ("x-grammar-bin", 'start: "é" "è"'.encode(), "éè"),
    ],
)
async def test_text_is_constrained_as_metadata_says(key, source, matches, decode):
    samples, trailing = await decode(text_content={"text": "hello"}, max_tokens=30, metadata=((key, source),))
    assert re.fullmatch(matches, "".join(text for text, _ in samples))
    assert trailing["x-finish-reason"] == "stop"


@pytest.mark.parametrize(
    ("key", "source"),
    [("x-json-schema", '{"type": "no such type"}'), ("x-json-schema", "{"), ("x-regex", "(("), ("x-grammar", "start")],
)
async def test_what_cannot_constrain_is_a_bad_request(key, source, decode):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode(text_content={"text": "hello"}, max_tokens=3, metadata=((key, source),))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_go_on_while_a_text_of_megabytes_is_tokenised(random_folder):
    """Counted in messages that come meanwhile. The text could fit by its length, and does not by its tokens."""
    engine, _ = stub_engine(dataclasses.replace(STUB, max_context=44))
    engine.start()
    engine.tokenizer = Tokens.from_folder(random_folder)
    engine.tokenizer.longest_token = None  # as with a tokenizer that may drop text
    server = Server(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        method = channel.unary_stream(f"/{wire.ORCHESTRATOR}/Decode")
        long = wire.DecodeRequest(max_tokens=1, text_content={"text": "a b " * 1_000_000}).SerializeToString()
        short = wire.DecodeRequest(max_tokens=1, token_content={"token_ids": [1]}).SerializeToString()
        refused = asyncio.ensure_future(_all(method(long)))
        answers = 0
        while not refused.done():
            await _all(method(short))
            answers += 1
        with pytest.raises(grpc.aio.AioRpcError, match="leave no room in the context of 44"):
            await refused
        assert answers > 20
    await server.stop(0)
    engine.shutdown(0)


async def _all(call) -> list[bytes]:
    return [response async for response in call]
