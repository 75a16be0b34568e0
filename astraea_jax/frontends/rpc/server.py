"""Serves an engine over gRPC: JetStream's ``Orchestrator``, standard health and reflection, and ``astraea.Sessions``.

The last has what JetStream lacks: what sessions wait for, their forks and ends, and the engine's counts.

A Decode answers as JetStream does: one sample per message, text only to a request in text, the end-of-sequence token
among the tokens, an empty sample after a stop by length, and a beginning-of-sequence token unless ``has_bos`` is set
or the prompt begins with one. Where JetStream truncates, ignores or dies, the request gets one clear status:

    INVALID_ARGUMENT     no or malformed content, ``max_tokens`` below 1, more than one sample, a prompt beyond the
                         context or the vocabulary, sampling or a name that cannot be; the message says which
    UNAUTHENTICATED      the server has keys, and the call brings none of them; health needs none
    DEADLINE_EXCEEDED    the call has sent no message in time, or taken none
    NOT_FOUND            an adapter, as none are served
    RESOURCE_EXHAUSTED   too many requests; ``grpc-retry-pushback-ms`` says when to try again
    ABORTED              a step of the engine has failed; the request may be sent again
    UNAVAILABLE          compiling, shutting down, or failed
    CANCELLED            the session was ended while the request ran
    INTERNAL             a fault of ours; the server's log says which

A session belongs to the tenant that opens it: to the key of its requests, or else to the cache salt that they carry,
or without one to the connection. Nobody else can resume it, end it or say what it waits for; the same name means
another session to them. A client that comes back over another connection, without key or salt, begins anew; its tokens
are still found by their prefix. Sessions of a connection that has closed expire like all that are not resumed.
"""

from __future__ import annotations

import asyncio
import time

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.programs import Programs
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.gate import Gate
from astraea_jax.frontends.rpc.limits import CallLimits
from astraea_jax.frontends.rpc.servicer import Servicer, handlers
from astraea_jax.frontends.tls import Tls

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_metadata_size", 2**16),  # what SamplingParams allows in stop strings has room
    ("grpc.absolute_max_metadata_size", 2**16),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
    ("grpc.keepalive_time_ms", 60_000),  # a client that has vanished from the network is found, its requests cancelled
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients may ping while they wait in the queue
    ("grpc.server_handshake_timeout_ms", 10_000),
    (
        "grpc.server.max_pending_requests",
        2**16,
    ),  # from 1,000 on gRPC drops calls of anybody at random; the gate does not
    ("grpc.server.max_pending_requests_hard_limit", 2**17),
]
HANG_UP_S = 0.5
"""Seconds that clients get to hang up when the server stops; their connections are cut then."""


class Server:
    """Serves an engine. :meth:`start` and :meth:`stop` run in the event loop that answers.

    Args:
        engine: serves the requests; until it has started they get ``UNAVAILABLE``.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        keys: of those who may call; everybody by default. A key's tenant owns its sessions.
        tls: certificate and key; no encryption by default.
        limits: on calls that do nothing, and on how long they wait for their clients.
        grammars: compiles what requests constrain their text by; one of its own by default.
        programs: names the programs of requests in text and continues them; shared with other doors of the engine.
    """

    def __init__(
        self,
        engine: Serving,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        keys: Keys | None = None,
        tls: Tls | None = None,
        limits: CallLimits | None = None,
        grammars: GrammarCompiler | None = None,
        programs: Programs | None = None,
    ):
        self._address = f"{host}:{port}"
        self._tls = tls
        self._servicer = Servicer(engine, grammars, programs)
        self._gate = Gate(keys or Keys(), limits or CallLimits())
        c = engine.config
        streams = 2 * c.data_parallel * (c.max_queued + c.max_seqs)  # the queue refuses before, and says why
        idle_ms = min(2**31 - 1, round(1000 * c.session_ttl_s))  # a connection's sessions have expired by then
        options = [("grpc.max_concurrent_streams", streams), ("grpc.max_connection_idle_ms", idle_ms)]
        self._server = grpc.aio.server(interceptors=(self._gate,), options=OPTIONS + options)
        for service, methods in handlers(self._servicer).items():
            self._server.add_registered_method_handlers(service, methods)  # each waits in a queue of its own
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer.health, self._server)
        names = (wire.ORCHESTRATOR, wire.SESSIONS, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=wire.POOL)

    async def start(self) -> int:
        """Listen, and let health follow the engine from now on; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        try:
            port = (
                self._server.add_insecure_port(self._address)
                if self._tls is None
                else self._server.add_secure_port(self._address, self._tls.grpc_credentials())
            )
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(
                f"cannot listen on {self._address}: the port is taken or the host is not this machine; "
                "choose another --port or --host"
            ) from error
        self._servicer.health.start()
        await self._server.start()
        return int(port)

    async def stop(self, grace_s: float = 30.0) -> int:
        """Report not serving, refuse new requests, let running ones finish for ``grace_s`` seconds, then hang up.

        The port stays open meanwhile, so that balancers see the state; streams that watch it do not delay the end.
        Returns how many requests were cut off; they get ``UNAVAILABLE``, even if the engine hangs.
        """
        servicer = self._servicer
        servicer.draining = True
        servicer.finishing = frozenset(servicer.decoding)
        servicer.health.drain()
        deadline = time.monotonic() + grace_s
        while servicer.decoding and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._gate.cutting = True
        cut = [task for task in servicer.decoding.values() if task is not None]
        for task in cut:
            task.cancel()
        servicer.health.close()
        await self._server.stop(HANG_UP_S)
        return servicer.cut + len(cut)
