"""The messages on the wire: JetStream's ``Orchestrator`` service, and a small one of our own.

JetStream's names and numbers are an interface, written down here as data; none of its code is used. The messages live
in a descriptor pool of their own, so that a process may import JetStream's stubs as well. JetStream (archived in 2026)
is Apache-2.0, AI-Hypercomputer/JetStream; fields 1 to 3 of its request and 1 of its response are retired and stay free.
One field is ours: a sample's ``logprobs``, which JetStream's clients skip, and which requests get that ask for it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

_Field = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "bool": _Field.TYPE_BOOL,
}

ORCHESTRATOR = "jetstream_proto.Orchestrator"
SESSIONS = "astraea.Sessions"
SESSION_METHODS = ("End", "ToolCalled", "Waits", "Fork", "ReplaceTail", "Stats")

# Message -> fields: (number, type, name), "repeated" in front of the type, "in ONEOF" behind the name.
_JETSTREAM: dict[str, list[tuple[int, str, str]]] = {
    "DecodeRequest": [
        (4, "int32", "max_tokens"),
        (5, "DecodeRequest.TextContent", "text_content in content"),
        (6, "DecodeRequest.TokenContent", "token_content in content"),
        (7, "DecodeRequest.Metadata", "metadata in metadata_optional"),
        (8, "int32", "num_samples"),
        (9, "string", "lora_adapter_id"),
        (10, "bool", "has_bos"),
    ],
    "DecodeRequest.TextContent": [(1, "string", "text")],
    "DecodeRequest.TokenContent": [(1, "repeated int32", "token_ids")],
    "DecodeRequest.Metadata": [(1, "float", "start_time")],
    "DecodeResponse": [
        (2, "DecodeResponse.InitialContent", "initial_content in content"),
        (3, "DecodeResponse.StreamContent", "stream_content in content"),
    ],
    "DecodeResponse.InitialContent": [],
    "DecodeResponse.StreamContent": [(1, "repeated DecodeResponse.StreamContent.Sample", "samples")],
    "DecodeResponse.StreamContent.Sample": [
        (1, "string", "text"),
        (2, "repeated int32", "token_ids"),
        (1001, "repeated DecodeResponse.StreamContent.Sample.TokenLogprob", "logprobs"),  # ours; only if asked for
    ],
    "DecodeResponse.StreamContent.Sample.TokenLogprob": [
        (1, "int32", "token_id"),
        (2, "float", "logprob"),
        (3, "repeated DecodeResponse.StreamContent.Sample.TokenLogprob", "top"),
    ],
    "HealthCheckRequest": [],
    "HealthCheckResponse": [(1, "bool", "is_live")],
}
_ASTRAEA: dict[str, list[tuple[int, str, str]]] = {
    "EndRequest": [(1, "string", "session")],
    "EndResponse": [],
    "ToolCalledRequest": [(1, "string", "session"), (2, "string", "tool")],
    "ToolCalledResponse": [],
    "WaitsRequest": [
        (1, "string", "session"),
        (2, "repeated string", "tools"),
        (3, "float", "expected_s"),
        (4, "float", "keep_s"),
    ],
    "WaitsResponse": [],
    "ForkRequest": [(1, "string", "session"), (2, "string", "child")],
    "ForkResponse": [],
    "ReplaceTailRequest": [(1, "string", "session"), (2, "repeated int32", "token_ids")],
    "ReplaceTailResponse": [(1, "bool", "computed")],
    "StatsRequest": [],
    "StatsResponse": [
        (1, "repeated StatsResponse.Count", "counts"),
        (2, "repeated StatsResponse.Figure", "report"),  # of its load, for routers
    ],
    "StatsResponse.Count": [(1, "string", "name"), (2, "int64", "value")],
    "StatsResponse.Figure": [(1, "string", "name"), (2, "double", "value")],
}


def _file(
    name: str,
    package: str,
    messages: dict[str, list[tuple[int, str, str]]],
    service: str,
    methods: list[tuple[str, str, str, bool]],
) -> descriptor_pb2.FileDescriptorProto:
    """A proto3 file; ``methods`` are (name, request, response, whether the response streams)."""
    file = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3")
    made: dict[str, Any] = {}
    for path, fields in messages.items():  # outer messages come before inner ones
        outer, _, inner = path.rpartition(".")
        message = made[path] = made[outer].nested_type.add() if outer else file.message_type.add()
        message.name = inner
        for number, kind, label in fields:
            _add_field(message, package, number, kind, label)
    entry = file.service.add(name=service)
    for method, request, response, streams in methods:
        entry.method.add(
            name=method,
            input_type=f".{package}.{request}",
            output_type=f".{package}.{response}",
            server_streaming=streams,
        )
    return file


def _add_field(message: Any, package: str, number: int, kind: str, label: str) -> None:
    name, _, oneof = label.partition(" in ")
    repeated = kind.startswith("repeated ")
    kind = kind.removeprefix("repeated ")
    field = message.field.add(name=name, number=number)
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind in _KINDS:
        field.type = _KINDS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind}"
    if oneof:
        names = [entry.name for entry in message.oneof_decl]
        if oneof not in names:
            message.oneof_decl.add(name=oneof)
            names.append(oneof)
        field.oneof_index = names.index(oneof)


POOL = descriptor_pool.DescriptorPool()
"""Everything that the server reflects: these messages, and the standard health and reflection services."""

for _module in (health_pb2, reflection_pb2):
    _copy = descriptor_pb2.FileDescriptorProto()
    _module.DESCRIPTOR.CopyToProto(_copy)
    POOL.Add(_copy)
POOL.Add(
    _file(
        "astraea_jax/orchestrator.proto",
        "jetstream_proto",
        _JETSTREAM,
        "Orchestrator",
        [
            ("Decode", "DecodeRequest", "DecodeResponse", True),
            ("HealthCheck", "HealthCheckRequest", "HealthCheckResponse", False),
        ],
    )
)
POOL.Add(
    _file(
        "astraea_jax/sessions.proto",
        "astraea",
        _ASTRAEA,
        "Sessions",
        [(name, f"{name}Request", f"{name}Response", False) for name in SESSION_METHODS],
    )
)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


DecodeRequest = _message("jetstream_proto.DecodeRequest")
DecodeResponse = _message("jetstream_proto.DecodeResponse")
HealthCheckRequest = _message("jetstream_proto.HealthCheckRequest")
HealthCheckResponse = _message("jetstream_proto.HealthCheckResponse")
EndRequest = _message("astraea.EndRequest")
EndResponse = _message("astraea.EndResponse")
ToolCalledRequest = _message("astraea.ToolCalledRequest")
ToolCalledResponse = _message("astraea.ToolCalledResponse")
WaitsRequest = _message("astraea.WaitsRequest")
WaitsResponse = _message("astraea.WaitsResponse")
ForkRequest = _message("astraea.ForkRequest")
ForkResponse = _message("astraea.ForkResponse")
ReplaceTailRequest = _message("astraea.ReplaceTailRequest")
ReplaceTailResponse = _message("astraea.ReplaceTailResponse")
StatsRequest = _message("astraea.StatsRequest")
StatsResponse = _message("astraea.StatsResponse")
