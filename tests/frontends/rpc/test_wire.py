"""The bytes are JetStream's: fixed here as what its own stubs produce."""

from __future__ import annotations

import pytest

from astraea_jax.frontends.rpc import wire

GOLDEN = [
    (
        lambda: wire.DecodeRequest(
            max_tokens=7,
            text_content={"text": "hé"},
            metadata={"start_time": 1.5},
            num_samples=2,
            lora_adapter_id="a",
            has_bos=True,
        ),
        "20072a050a0368c3a93a050d0000c03f40024a01615001",
    ),
    (lambda: wire.DecodeRequest(token_content={"token_ids": [1, 300, 0]}), "32060a0401ac0200"),
    (lambda: wire.DecodeResponse(initial_content={}), "1200"),
    (
        lambda: wire.DecodeResponse(
            stream_content={"samples": [{"text": "ab", "token_ids": [5, 6]}, {"text": "", "token_ids": []}]}
        ),
        "1a0c0a080a02616212020506" + "0a00",
    ),
    (lambda: wire.HealthCheckRequest(), ""),
    (lambda: wire.HealthCheckResponse(is_live=True), "0801"),
]


@pytest.mark.parametrize(("make", "golden"), GOLDEN)
def test_golden_bytes_both_ways(make, golden):
    message = make()
    assert message.SerializeToString().hex() == golden
    assert type(message).FromString(bytes.fromhex(golden)) == message


def test_content_is_one_of_two():
    request = wire.DecodeRequest(text_content={"text": "a"})
    request.token_content.token_ids.append(1)
    assert request.WhichOneof("content") == "token_content"


def test_retired_fields_of_old_clients_are_ignored():
    """Clients before July 2024 set session_cache = 1 and priority = 3."""
    old = bytes.fromhex("0a0173" + "1805" + "2007" + "2a050a0368c3a9")
    request = wire.DecodeRequest.FromString(old)
    assert (request.max_tokens, request.text_content.text) == (7, "hé")


def test_coexists_with_the_same_package_in_the_default_pool():
    """JetStream's own stubs, imported in the same process, declare the same names."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    file = descriptor_pb2.FileDescriptorProto(name="jetstream/core/proto/jetstream.proto", package="jetstream_proto")
    file.message_type.add(name="DecodeRequest")
    descriptor_pool.Default().Add(file)
    assert wire.DecodeRequest(max_tokens=1).max_tokens == 1
