"""Both health services follow the engine at once, whatever happens to it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.engines import break_loop
from support.stub import stub_engine

from astraea_jax.engine.replicas import Replicas
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


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


async def test_every_state_of_an_engine_shows():
    engine, _ = stub_engine()
    server = Server(engine)
    address = f"127.0.0.1:{await server.start()}"
    async with Client(address, engine.tokenizer) as client, grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        assert not await client.is_live()
        await asyncio.to_thread(engine.start)
        assert (await watch.read()).status == SERVING
        assert await client.is_live()
        break_loop(engine, SystemExit("the loop is broken"))
        assert (await watch.read()).status == NOT_SERVING
        assert not await client.is_live()
    await server.stop(0)
    engine.shutdown(0)


async def test_a_replica_that_dies_shows_while_the_others_serve():
    engines = [stub_engine()[0] for _ in range(2)]
    replicas = Replicas(engines)
    server = Server(replicas)
    address = f"127.0.0.1:{await server.start()}"
    await asyncio.to_thread(replicas.start)
    async with Client(address, replicas.tokenizer) as client, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        watch = health.Watch(health_pb2.HealthCheckRequest(service="replica-1"))
        assert (await watch.read()).status == SERVING
        break_loop(engines[1], RuntimeError("it is broken"))
        assert (await watch.read()).status == NOT_SERVING
        assert [await status(service) for service in ("", "replica-0", "replica-1")] == [SERVING, SERVING, NOT_SERVING]
        assert await client.is_live()
        listed = (await health.List(health_pb2.HealthListRequest())).statuses
        assert {name for name in listed if listed[name].status == NOT_SERVING} == {"replica-1"}
        assert (await client.counts())["live_replicas"] == 1
        break_loop(engines[0], RuntimeError("so is this one"))
        while await status("") == SERVING:
            await asyncio.sleep(0.005)
        assert not await client.is_live()
    await server.stop(0)
    replicas.shutdown(0)


async def test_a_service_that_is_not_there(endpoint):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="no service of this name") as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await watch.read()).status == UNKNOWN
        watch.cancel()
