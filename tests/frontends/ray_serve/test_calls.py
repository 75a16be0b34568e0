"""gRPC calls as they come from Serve's proxy, before a real engine."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import pytest
from support.engines import until

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from ray.serve.grpc_util import RayServegRPCContext

from astraea_jax.errors import EngineDead
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.ray_serve.calls import CallFailed, Calls
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.servicer import Servicer
from astraea_jax.frontends.rpc.status import FAULT

KEY = "a-long-random-key"


def context(*metadata):
    """Serve's context of a call, made of what gRPC tells a proxy."""
    nothing = dict.fromkeys(("auth_context", "code", "details", "peer_identities", "peer_identity_key"), lambda: None)
    return RayServegRPCContext(
        SimpleNamespace(
            invocation_metadata=lambda: metadata,
            trailing_metadata=lambda: (),
            peer=lambda: "ipv4:10.0.0.7:50000",
            **nothing,
        )
    )


def decode(**fields):
    return wire.DecodeRequest(**{"text_content": {"text": "abc"}, "max_tokens": 3, "has_bos": True, **fields})


@pytest.fixture
def calls(engine):
    return Calls(Servicer(engine), Keys())


async def test_a_stream_has_its_usage_in_the_context_with_its_last_message(calls):
    about, messages = context(("x-session-id", "s")), []
    async for message in calls.stream("Decode", decode().SerializeToString(), about):
        messages.append((message, dict(about.trailing_metadata())))
    assert sum(len(sample.token_ids) for m, _ in messages for sample in m.stream_content.samples) == 3
    assert messages[-1][1]["x-output-tokens"] == "3"
    assert about.code() is None


async def test_a_session_is_opened_and_ended(calls, engine):
    async for _ in calls.stream("Decode", decode().SerializeToString(), context(("x-session-id", "s"))):
        pass
    assert engine.knows("s", owner="peer:ipv4:10.0.0.7:50000")
    await calls.single("End", wire.EndRequest(session="s").SerializeToString(), context())
    await until(lambda: not engine.knows("s", owner="peer:ipv4:10.0.0.7:50000"))


async def test_a_call_of_one_response(calls):
    answer = await calls.single("HealthCheck", b"", context())
    assert answer.is_live


@pytest.mark.parametrize(
    ("data", "code", "details"),
    [
        (decode(max_tokens=0).SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "well-formed jetstream_proto.DecodeRequest"),
        (decode(lora_adapter_id="l").SerializeToString(), grpc.StatusCode.NOT_FOUND, "adapter"),
    ],
)
async def test_an_error_is_a_status_in_the_context(calls, data, code, details):
    about = context()
    with pytest.raises(CallFailed, match=details):
        [each async for each in calls.stream("Decode", data, about)]
    assert about.code() is code
    assert details in about.details()


async def test_keys_hold(engine):
    calls = Calls(Servicer(engine), Keys([KEY]))
    about = context()
    with pytest.raises(CallFailed):
        await calls.single("Stats", b"", about)
    assert about.code() is grpc.StatusCode.UNAUTHENTICATED
    assert await calls.single("Stats", b"", context(("authorization", f"Bearer {KEY}")))
    assert await calls.single("HealthCheck", b"", context())


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (EngineDead("gone"), grpc.StatusCode.UNAVAILABLE, "gone"),
        (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL, FAULT),
    ],
)
async def test_faults_of_ours_are_not_told(calls, engine, monkeypatch, error, code, details):
    def fail():
        raise error

    monkeypatch.setattr(engine, "counts", fail)
    about = context()
    with pytest.raises(CallFailed):
        await calls.single("Stats", b"", about)
    assert (about.code(), about.details()) == (code, details)
