"""Our gRPC services in the very server that Serve's proxies run, before a proxy that is played."""

from __future__ import annotations

import grpc
import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray.serve._private.grpc_util import gRPCGenericServer

from astraea_jax.frontends.http.errors import SEND_AGAIN
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.ray_serve import services
from astraea_jax.frontends.ray_serve.proxies import GONE, REQUESTS
from astraea_jax.frontends.ray_serve.services import add_orchestrator, add_sessions
from astraea_jax.frontends.ray_serve.split import Split, Splits
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import read_tenant
from astraea_jax.frontends.rpc.status import FAULT


class Proxy:
    """Answers as Serve's proxy does, with what a replica would return."""

    def __init__(self):
        self.calls = []
        self.failure = None
        self.answers = True

    def handlers(self, service_method, streaming_type):
        async def single(request, context):
            self._note(service_method, request, context)
            return wire.EndResponse().SerializeToString()

        async def stream(request, context):
            self._note(service_method, request, context)
            if self.answers:
                yield wire.DecodeResponse().SerializeToString()

        return stream if streaming_type.value == "unary_stream" else single

    def _note(self, method, request, context):
        self.calls.append((method, request, dict(context.invocation_metadata())))
        if self.failure is not None:
            context.set_code(self.failure[0])
            context.set_details(self.failure[1])


@pytest.fixture
async def proxy():
    proxy = Proxy()
    server = gRPCGenericServer(proxy.handlers)
    add_orchestrator(None, server)
    add_sessions(None, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        proxy.decode = channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )
        proxy.end = channel.unary_unary(
            f"/{wire.SESSIONS}/End",
            request_serializer=wire.EndRequest.SerializeToString,
            response_deserializer=wire.EndResponse.FromString,
        )
        yield proxy
    await server.stop(0)


REQUEST = wire.DecodeRequest(text_content={"text": "x" * 400}, max_tokens=4)


@pytest.mark.parametrize(
    ("metadata", "session", "parent"),
    [
        ((), None, None),
        ((("x-session-id", "a"), ("x-parent-session-id", "p")), "a", "p"),
        ((("session_id", "b"),), "b", None),
        ((("thread-id", "c"),), "c", None),
    ],
)
async def test_a_proxy_finds_the_session_of_a_call(proxy, metadata, session, parent):
    assert len([each async for each in proxy.decode(REQUEST, metadata=metadata)]) == 1
    ((method, request, seen),) = proxy.calls
    assert method == "/jetstream_proto.Orchestrator/Decode"
    assert request == REQUEST.SerializeToString()  # bytes, which nobody has read
    assert seen.get("session_id") == session
    asked = REQUESTS.get(seen["request_id"])
    assert (asked.tokens, asked.parent) == (len(request) // 4, parent)


async def test_a_proxy_finds_whose_call_it_is(proxy):
    key = "a-long-random-key"
    metadata = (("authorization", f"Bearer {key}"), ("x-cache-salt", "mine"))
    assert len([each async for each in proxy.decode(REQUEST, metadata=metadata)]) == 1
    caller = REQUESTS.get(proxy.calls[0][2]["request_id"]).caller
    assert caller.owner(True) == read_tenant(metadata, "", Keys([key])).owner
    assert caller.owner(False) == read_tenant(metadata, "", Keys()).owner


async def test_a_version_takes_its_share(proxy, monkeypatch):
    splits = Splits()
    splits.put("next", Split(1.0, "/next"))
    monkeypatch.setattr(services, "SPLITS", splits)
    await proxy.end(wire.EndRequest(session="s"))
    await proxy.end(wire.EndRequest(session="s"), metadata=(("application", "default"),))
    assert [seen["application"] for _, _, seen in proxy.calls] == ["next", "default"]


async def test_calls_about_a_session_go_where_it_is(proxy):
    await proxy.end(wire.EndRequest(session="s"))
    assert proxy.calls[0][2]["session_id"] == "s"


@pytest.mark.parametrize("streams", [True, False])
async def test_a_replica_that_has_died_is_unavailable_with_a_hint(proxy, streams):
    proxy.failure = grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task."
    call = proxy.decode(REQUEST).read if streams else lambda: proxy.end(wire.EndRequest(session="s"))
    if streams:
        proxy.answers = False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, GONE + SEND_AGAIN)
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


@pytest.mark.parametrize(
    ("code", "details", "hint"),
    [
        (grpc.StatusCode.INTERNAL, FAULT, None),
        (grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is 0", None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "1000"),
        (grpc.StatusCode.UNAVAILABLE, "draining", "1000"),
    ],
)
async def test_what_a_replica_says_itself_stays(proxy, code, details, hint):
    proxy.failure = code, details
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await proxy.end(wire.EndRequest(session="s"))
    assert (caught.value.code(), caught.value.details()) == (code, details)
    assert dict(caught.value.trailing_metadata()).get("grpc-retry-pushback-ms") == hint
