"""Who may call: API keys, and certificates of both sides."""

from __future__ import annotations

import dataclasses

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.engines import until
from support.sizes import SMALL

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError, StartupError, Unauthorized
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.frontends.rpc.server import Server
from astraea_jax.frontends.tls import Tls

KEYS = Keys(api=["key-of-alice", "key-of-bob"], admin=["key-of-the-operator"])
TWO = SamplingParams(max_tokens=2)


@pytest.fixture
async def guarded(engine):
    server = Server(engine, keys=KEYS)
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(0)


async def tokens(client: Client, prompt=(1, 2, 3), **more) -> list[int]:
    return [token async for delta in client.generate(list(prompt), TWO, **more) for token in delta.token_ids]


@pytest.mark.parametrize("key", ["key-of-alice", "key-of-bob", "key-of-the-operator"])
async def test_whoever_has_a_key_is_served(guarded, engine, key):
    async with Client(guarded, engine.tokenizer, key=key) as client:
        assert len(await tokens(client)) == 2
        assert (await client.counts())["replicas"] == 1


@pytest.mark.parametrize("key", [None, "", "key-of-alic", "key-of-alice ", "Bearer key-of-alice"])
async def test_others_are_not(guarded, engine, key):
    async with Client(guarded, engine.tokenizer, key=key) as client:
        if key == "key-of-alice ":
            assert await tokens(client)  # spaces around a key say nothing
            return
        with pytest.raises(Unauthorized, match="API key is"):
            await tokens(client)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.counts()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert await client.is_live()  # health needs no key


async def test_what_is_open_and_what_is_not(guarded):
    async with grpc.aio.insecure_channel(guarded) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status == 1
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [_ async for _ in reflection.ServerReflectionInfo(iter(asked))]
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for header in (("x-api-key", "key-of-bob"), ("authorization", "bearer key-of-bob")):
            assert [_ async for _ in reflection.ServerReflectionInfo(iter(asked), metadata=(header,))]


async def test_a_session_belongs_to_its_key_whatever_the_connection(guarded, engine):
    async def cached(key: str, salt: str = "") -> int:
        async with Client(guarded, engine.tokenizer, key=key, salt=salt) as client:
            generation = client.generate([*range(1, 41)], TWO, session="s")
            [_ async for _ in generation]
            return generation.usage.cached_tokens

    assert await cached("key-of-alice") == 0
    assert await cached("key-of-bob") == 0  # not even the prefix is shared
    assert await cached("key-of-alice") > 0
    for key in ("key-of-alice", "key-of-bob"):
        async with Client(guarded, engine.tokenizer, key=key) as client:
            client.end_session("s")
    await until(lambda: not engine.stats().programs)


async def test_two_keys_in_one_call_are_refused(guarded):
    async with grpc.aio.insecure_channel(guarded) as channel:
        call = channel.unary_unary(f"/{wire.SESSIONS}/Stats")
        twice = (("x-api-key", "key-of-alice"), ("x-api-key", "key-of-bob"))
        with pytest.raises(grpc.aio.AioRpcError, match="x-api-key is given twice"):
            await call(b"", metadata=twice)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority, tmp_path):
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path


async def encrypted(engine, tls: Tls, credentials: grpc.ChannelCredentials | None) -> list[int]:
    """Tokens that a client gets over TLS; it trusts what its credentials say."""
    server = Server(engine, "localhost", tls=tls)
    try:
        async with Client(f"localhost:{await server.start()}", engine.tokenizer, credentials=credentials) as client:
            return await tokens(client)
    finally:
        await server.stop(0)


async def test_the_connection_is_encrypted(engine, files, authority):
    tls = Tls(files / "cert.pem", files / "key.pem")
    assert len(await encrypted(engine, tls, grpc.ssl_channel_credentials(authority.cert_pem.bytes()))) == 2
    for stranger in (None, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())):
        with pytest.raises(Exception, match=r"(?i)unavailable|connect|handshake|ssl|socket|closed|reset|ping"):
            await encrypted(engine, tls, stranger)


async def test_clients_show_certificates_of_their_own(engine, files, authority):
    tls = Tls(files / "cert.pem", files / "key.pem", files / "ca.pem")
    ca, own = authority.cert_pem.bytes(), authority.issue_cert("client.example")
    chain = b"".join(blob.bytes() for blob in own.cert_chain_pems)
    known = grpc.ssl_channel_credentials(ca, own.private_key_pem.bytes(), chain)
    assert len(await encrypted(engine, tls, known)) == 2
    with pytest.raises(Exception, match=r"(?i)unavailable|connect|handshake|ssl|socket|closed|reset|ping"):
        await encrypted(engine, tls, grpc.ssl_channel_credentials(ca))


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem", "ca.pem", "other key", "absent"])
def test_files_that_cannot_serve_are_refused(files, broken):
    tls = Tls(files / "cert.pem", files / "key.pem", files / "ca.pem")
    match broken:
        case "other key":
            trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(files / "key.pem")
        case "absent":
            (files / "cert.pem").unlink()
        case name:
            (files / name).write_text("no certificate")
    with pytest.raises(StartupError, match="TLS cannot be served with"):
        dataclasses.replace(tls)


async def test_all_of_sampling_travels(make_engine, greedy):
    """What is sent as metadata has the effect that it has in this process."""
    engine = make_engine(SMALL)
    server = Server(engine)
    plain = greedy([1, 2, 3], 6)
    for params in (
        SamplingParams(max_tokens=6, ignore_eos=True, presence_penalty=1.5, frequency_penalty=-0.5),
        SamplingParams(max_tokens=6, ignore_eos=True, repetition_penalty=1.8, min_tokens=3),
        SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={plain[0]: -100.0, 7: 3.5}),
        SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3),
    ):
        here = [delta async for delta in engine.generate([1, 2, 3], params)]
        async with Client(f"127.0.0.1:{await server.start()}", engine.tokenizer) as client:
            there = [delta async for delta in client.generate([1, 2, 3], params)]
        await server.stop(0)
        server = Server(engine)
        assert ids_of(there) == ids_of(here)
        logprobs = [[entry for delta in deltas for entry in delta.logprobs] for deltas in (here, there)]
        assert len(logprobs[0]) == (6 if params.logprobs is not None else 0)
        for one, other in zip(*logprobs, strict=True):
            assert (one.token_id, [token for token, _ in one.top]) == (
                other.token_id,
                [token for token, _ in other.top],
            )
            assert other.logprob == pytest.approx(one.logprob, rel=1e-6)


def ids_of(deltas) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def test_a_compiled_grammar_is_not_sent_in_silence(guarded, engine):
    class Anything:
        def matcher(self): ...

    async with Client(guarded, engine.tokenizer) as client:
        with pytest.raises(RequestError, match="cannot be sent"):
            client.generate([1], SamplingParams(grammar=Anything()))
