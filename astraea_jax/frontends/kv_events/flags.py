"""Flags of KV events, and the publishers of an engine's replicas."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from absl import flags

from astraea_jax.engine.interface import Serving
from astraea_jax.errors import StartupError

if TYPE_CHECKING:
    from astraea_jax.frontends.kv_events.publisher import Publisher

NEEDED = "--kv_events needs pyzmq and msgpack: pip install 'astraea-jax[events]'"
ENDPOINT = re.compile(r"tcp://[^\s/]+:\d{1,5}|ipc://\S{1,100}")
FORM = "tcp://HOST:PORT or ipc://PATH"


def wanted() -> bool:
    """Whether the flags ask for KV events; what keeps them from being published is told before a model is loaded.

    Raises:
        StartupError: pyzmq or msgpack is missing, or only a part of the flags is given.
    """
    chosen = flags.FLAGS
    if chosen.kv_events is None:
        if chosen.kv_events_replay is not None:
            raise StartupError("--kv_events_replay needs --kv_events, the endpoint where batches can be missed")
        return False
    if not all(map(find_spec, ("zmq", "msgpack"))):
        raise StartupError(NEEDED)
    return True


def kv_event_flags() -> Callable[[Serving], AbstractContextManager[list[Publisher]]]:
    """Define the flags; return a context manager that publishes an engine's events as they say.

    It yields the publishers, one for each replica.
    """
    flags.DEFINE_string(
        "kv_events",
        None,
        "Publish which prompts are cached, as vLLM's KV events, at this ZeroMQ endpoint: tcp://*:5557, or a router's "
        "own tcp://host:port. Replica i adds i to the port. Events hold the tokens of prompts: keep them inside.",
    )
    flags.DEFINE_string("kv_events_replay", None, "Endpoint where missed KV events are asked for, as tcp://*:6557.")
    flags.DEFINE_string("kv_events_topic", "", "Topic of KV events; llm-d reads kv@ADDRESS:PORT@MODEL.")
    for name in ("kv_events", "kv_events_replay"):
        flags.register_validator(
            name,
            lambda endpoint: endpoint is None or ENDPOINT.fullmatch(endpoint) is not None,
            f"it must be {FORM}",
        )
    for name in ("kv_events", "kv_events_replay", "kv_events_topic"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    @contextmanager
    def publishing(engine: Serving) -> Iterator[list[Publisher]]:
        chosen = flags.FLAGS
        if chosen.kv_events is None:
            yield []
            return
        with published(engine, chosen.kv_events, chosen.kv_events_replay, chosen.kv_events_topic) as found:
            yield found

    return publishing


@contextmanager
def published(engine: Serving, endpoint: str, replay: str | None = None, topic: str = "") -> Iterator[list[Publisher]]:
    """Publish the events of every replica while the context lasts; yields the publishers.

    Args:
        engine: its configuration has ``kv_events``.
        endpoint: of the first replica; that of the i-th one has a port higher by i.
        replay: endpoint where missed batches are asked for, counted in the same way.
        topic: of all batches.

    Raises:
        StartupError: pyzmq is missing, or an endpoint cannot be used.
    """
    try:
        from astraea_jax.frontends.kv_events.publisher import Publisher
        from astraea_jax.frontends.kv_events.wire import pack
    except ImportError:
        raise StartupError(NEEDED) from None
    if not engine.config.kv_events:
        raise StartupError("this engine tells nothing of what it caches; EngineConfig(kv_events=True) does")
    with ExitStack() as stack:
        publishers = []
        for rank, replica in enumerate(engine.replicas):
            packing = partial(pack, page_size=engine.config.page_size, rank=rank)
            own = [None if e is None else of_rank(e, rank) for e in (endpoint, replay)]
            publisher = Publisher(replica.kv_events, packing, own[0] or endpoint, own[1], topic)
            stack.callback(publisher.close)
            publishers.append(publisher)
        yield publishers


def of_rank(endpoint: str, rank: int) -> str:
    """Return the endpoint of a replica, as vLLM has it: a port is higher by its rank, unless it is any free one.

    Raises:
        StartupError: it is no endpoint, or there is no such port.
    """
    if ENDPOINT.fullmatch(endpoint) is None:
        raise StartupError(f"KV events: {endpoint} is no endpoint; it must be {FORM}")
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{rank}" if rank else endpoint
    base, _, port = endpoint.rpartition(":")
    number = int(port) + (rank if int(port) else 0)
    if number >= 2**16:  # ZeroMQ would take another port
        raise StartupError(f"KV events: there is no port {number}; choose a lower one")
    return f"{base}:{number}"
