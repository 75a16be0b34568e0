"""A server in this process, and clients of it."""

from __future__ import annotations

import grpc
import pytest

from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server


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
