"""A server publishes what it caches, under the name that a request gives its session."""

from __future__ import annotations

import asyncio
import re
import signal

import grpc
from support.kv_subscriber import Subscriber
from support.sizes import SMALL

from astraea_jax.frontends.rpc import wire

FLAGS = ("--kv_events=tcp://127.0.0.1:0", "--kv_events_replay=tcp://127.0.0.1:0", "--kv_events_topic=kv@pod@m")


async def decoded(address: str, prompt: list[int], **metadata: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        decode = channel.unary_stream(
            "/jetstream_proto.Orchestrator/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )
        request = wire.DecodeRequest(token_content={"token_ids": prompt}, max_tokens=2)
        async for _ in decode(request, metadata=[*metadata.items()]):
            pass


def test_a_server_publishes_what_it_caches(serve):
    prompt = [*range(3 * SMALL.page_size + 1)]
    with serve(*FLAGS) as server:
        [(endpoint, replay)] = re.findall(r"KV events: (\S+), missed ones at (\S+)", server.said)
        with Subscriber(endpoint, replay) as subscriber:
            asyncio.run(decoded(server.address, prompt, session_id="from-ray"))
            for _ in range(100):
                subscriber.read(200)
                subscriber.replay()
                if subscriber.stored:
                    break
            told = [token for event in subscriber.stored for token in event["token_ids"]]
            assert told == prompt[: len(told)]
            assert len(told) == 3 * SMALL.page_size
            assert {event["session_id"] for event in subscriber.stored} == {"from-ray"}
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(300) == 0
