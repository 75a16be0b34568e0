"""Whoever subscribes knows what the engine caches: from the start, late, or after batches were missed."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import zmq
from support.device import complete
from support.disturbed import program
from support.engines import settled, until
from support.kv_subscriber import WAIT_MS, Subscriber, ask_again
from support.sizes import NARROW, PAGE_BYTES
from support.stub import STUB, stub_engine

from astraea_jax.engine import kv_events
from astraea_jax.engine.replicas import Replicas
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.frontends.kv_events import flags as kv_flags
from astraea_jax.frontends.kv_events import publisher
from astraea_jax.frontends.kv_events.flags import of_rank, published
from astraea_jax.frontends.kv_events.publisher import Publisher
from astraea_jax.frontends.kv_events.wire import block_name, pack
from astraea_jax.scheduler.wait import HOST

FREE = "tcp://127.0.0.1:0"
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def caches(engine) -> dict[str, set[int]]:
    """Names of what the engine has, from its own accounts."""
    log = engine._scheduler.kv_log
    on_device = {block_name(h) for h in engine._scheduler._pool._page_of}
    return {"GPU": on_device, "CPU": {block_name(h) for h in log.hashes(HOST)}}


async def agree(subscriber: Subscriber, engine) -> None:
    """Until the subscriber knows what the engine has; whoever connects late asks for what came before."""
    engine.check()

    def same() -> bool:
        subscriber.read(10)
        subscriber.replay()
        return subscriber.media == caches(engine)

    await until(same)


@pytest.fixture
async def telling():
    engine, _ = stub_engine(dataclasses.replace(STUB, kv_events=True))
    await asyncio.to_thread(engine.start)
    yield engine
    engine.shutdown(0)


def open_publisher(engine, **more) -> Publisher:
    packing = partial(pack, page_size=engine.config.page_size, rank=0)
    return Publisher(engine.kv_events, packing, **{"endpoint": FREE, "replay": FREE, **more})


@pytest.fixture
def opened(telling):
    publisher = open_publisher(telling, topic="kv@here@m")
    yield publisher
    publisher.close()
    assert not publisher._thread.is_alive()


async def ask(engine, number: int) -> None:
    prompt = [number % 50] * 5 + [(number + i) % 50 for i in range(9)]
    await engine.generate(prompt, PARAMS, session=f"s{number % 4}" if number % 3 else None).text()


async def test_a_real_engine_with_a_host_tier_is_followed(make_engine, greedy):
    sizes = dataclasses.replace(NARROW, host_kv_bytes=200 * PAGE_BYTES, residency="infercept", kv_events=True)
    engine = make_engine(sizes)
    opened = open_publisher(engine)
    try:
        with Subscriber(opened.endpoint, opened.replay, misses=5) as early:
            await asyncio.gather(*(program(engine, greedy, i, random.Random(i)) for i in range(12)))
            await engine.generate([*range(40)], PARAMS, session="stays", salt="secret").text()
            await agree(early, engine)
            assert early.gaps == 0  # what it missed was there to be asked for
            assert {"GPU", "CPU"} == {event["medium"] for event in early.stored}
            assert early.media["GPU"]
            assert {event.get("session_id") for event in early.stored} >= {"stays"}
            salts = {key for event in early.stored for keys in event["extra_keys"] for key in keys or ()}
            assert salts
            assert not any("secret" in salt for salt in salts)
            with Subscriber(opened.endpoint, opened.replay) as late:
                late.replay()
                await agree(late, engine)
                assert late.tokens == early.tokens
    finally:
        opened.close()
        engine.end_session("stays")
        await settled(engine, programs=True)


async def test_every_batch_has_topic_number_and_rank(telling, opened):
    with Subscriber(opened.endpoint, opened.replay) as subscriber:
        for number in range(6):
            await ask(telling, number)
        await agree(subscriber, telling)
        assert subscriber.gaps == 0
        assert subscriber.topics <= {b"kv@here@m"}
        assert [batch[2] for batch in subscriber.batches] == [0] * len(subscriber.batches)
        assert all(isinstance(batch[0], float) for batch in subscriber.batches)
        assert subscriber.batches[0][1][0] == {"type": "AllBlocksCleared"}  # whatever a worker of that name had before


async def test_what_is_stored_are_the_prompts_tokens(telling, opened):
    prompt = [*range(10, 23)]
    await telling.generate(prompt, PARAMS, session="mine", owner="tenant").text()
    with Subscriber(opened.endpoint, opened.replay) as subscriber:
        subscriber.replay()
        await agree(subscriber, telling)
        first = subscriber.stored[0]
        told = [token for event in subscriber.stored for token in event["token_ids"]]
        assert told == (prompt + complete(prompt, 4))[:16]
        assert (first["parent_block_hash"], first["block_size"], first["session_id"]) == (None, 4, "mine")


async def test_a_lost_device_is_followed(telling, opened):
    with Subscriber(opened.endpoint, opened.replay) as subscriber:
        for number in range(4):
            await ask(telling, number)
        telling._runner.failing.append("read")
        with pytest.raises(Exception, match="try again"):
            await ask(telling, 9)
        await agree(subscriber, telling)
        assert not subscriber.media["GPU"]
        await ask(telling, 10)
        await agree(subscriber, telling)
        assert subscriber.media["GPU"]


async def test_nobody_listens_and_the_loop_does_not_wait(telling, monkeypatch):
    monkeypatch.setattr(kv_events, "MAX_QUEUED", 8)
    for number in range(12):  # before anybody takes what is told
        await ask(telling, number)
    assert telling.kv_events.dropped
    opened = open_publisher(telling)
    try:
        with Subscriber(opened.endpoint, opened.replay) as subscriber:
            await until(lambda: subscriber.read(10) or telling.kv_events._queued == 0)
            await ask(telling, 20)
            subscriber.replay()
            await agree(subscriber, telling)
            assert subscriber.gaps == telling.kv_events.dropped
    finally:
        opened.close()


async def test_what_can_be_asked_for_again_is_bounded(telling, opened, monkeypatch):
    monkeypatch.setattr(publisher, "KEPT_BATCHES", 3)
    for number in range(8):
        await ask(telling, number)
    await until(lambda: len(opened._kept) <= 3 and not telling.kv_events._queued)
    with Subscriber(opened.endpoint, opened.replay) as subscriber:
        found = ask_again(subscriber._context, opened.replay, 0)
        assert len(found) <= 3
        assert [number for number, _ in found] == [*range(found[0][0], opened._number)]
    monkeypatch.setattr(publisher, "KEPT_BYTES", 1)
    await ask(telling, 9)
    await until(lambda: not opened._kept)
    assert opened._kept_bytes == 0


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"", b"short"),
        (b"", b"\0" * 9),
        (b"x", b"\0" * 8),
        (b"\0" * 8,),
        (b"", b"\0" * 8, b""),
        (b"", b"\0" * 2000),
        (b"",) * 50,
    ],
    ids=str,
)
async def test_a_request_that_cannot_be_read_is_left_alone(frames, telling, opened):
    await ask(telling, 1)
    with Subscriber(opened.endpoint, opened.replay) as subscriber:
        odd = subscriber._context.socket(zmq.DEALER)
        odd.connect(opened.replay)
        odd.send_multipart(frames)
        subscriber.replay()
        await agree(subscriber, telling)
        assert not odd.poll(0)


async def test_any_number_may_be_asked_for(telling, opened):
    await ask(telling, 1)
    with Subscriber(opened.endpoint) as subscriber:
        for number in (0, 10**6, 2**64 - 1):
            found = ask_again(subscriber._context, opened.replay, number)
            assert not found or number == 0


async def test_a_req_socket_gets_the_first_answer(telling, opened):
    """So does vLLM's publisher serve one."""
    await ask(telling, 1)
    with Subscriber(opened.endpoint) as subscriber:
        request = subscriber._context.socket(zmq.REQ)
        request.connect(opened.replay)
        request.send((0).to_bytes(8, "big"))
        assert request.poll(WAIT_MS)
        topic, number, _ = request.recv_multipart()
        assert (topic, number) == (b"kv@here@m", bytes(8))


async def test_replicas_have_ports_and_ranks_of_their_own():
    engines = [stub_engine(dataclasses.replace(STUB, kv_events=True))[0] for _ in range(2)]
    replicas = Replicas(engines)
    await asyncio.to_thread(replicas.start)
    try:
        with published(replicas, FREE) as publishers:
            assert len({publisher.endpoint for publisher in publishers}) == 2
            with Subscriber(publishers[1].endpoint) as subscriber:
                await until(lambda: subscriber.read(10) or engines[1].kv_events._queued == 0)
                number = 0
                while not subscriber.batches:
                    await ask(engines[1], number := number + 1)
                    subscriber.read(50)
                    assert number < 1000
                assert subscriber.batches[-1][2] == 1
    finally:
        replicas.shutdown(0)


@pytest.mark.parametrize(
    ("endpoint", "second"),
    [
        ("tcp://*:5557", "tcp://*:5558"),
        ("tcp://[::]:5557", "tcp://[::]:5558"),
        ("tcp://*:0", "tcp://*:0"),
        ("ipc:///tmp/kv", "ipc:///tmp/kv_dp1"),
    ],
)
def test_ports_rise_with_the_rank(endpoint, second):
    assert [of_rank(endpoint, rank) for rank in (0, 1)] == [endpoint, second]


@pytest.mark.parametrize("endpoint", ["tcp://*:65535", "tcp://*:99998", "tcp://*", "http://*:80", "", "inproc://x"])
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(StartupError, match=r"no (port|endpoint)"):
        of_rank(endpoint, 1)


async def test_it_connects_to_a_router_that_listens_for_all_workers(telling):
    context = zmq.Context()
    router = context.socket(zmq.SUB)
    router.subscribe(b"")
    port = router.bind_to_random_port("tcp://0.0.0.0")
    elsewhere = f"tcp://0x7f000001:{port}"  # this machine, so written that nobody sees it
    opened = open_publisher(telling, endpoint=elsewhere, replay=None)
    try:
        assert (opened.endpoint, opened.replay) == (elsewhere, None)
        number = 0
        while not router.poll(50):
            await ask(telling, number := number + 1)
            assert number < 1000
        assert len(router.recv_multipart()) == 3
    finally:
        opened.close()
        context.destroy(linger=0)


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "*"])
async def test_an_address_that_means_all_of_this_machine_is_bound(telling, everywhere):
    """Connected to it, events would go nowhere, and nobody would be told."""
    opened = open_publisher(telling, endpoint=f"tcp://{everywhere}:0", replay=None)
    try:
        port = opened.endpoint.rpartition(":")[2]
        with Subscriber(f"tcp://127.0.0.1:{port}") as subscriber:
            number = 0
            while not subscriber.stored:
                await ask(telling, number := number + 1)
                subscriber.read(50)
                assert number < 1000
    finally:
        opened.close()


async def test_many_who_ask_for_everything_and_read_nothing_keep_nobody_waiting(telling, opened):
    context = zmq.Context()
    askers = [context.socket(zmq.DEALER) for _ in range(50)]
    try:
        for asker in askers:
            asker.set_hwm(1)
            asker.connect(opened.replay)
            for _ in range(5):
                asker.send_multipart((b"", bytes(8)))
        with Subscriber(opened.endpoint, opened.replay) as subscriber:
            for number in range(10):
                await ask(telling, number)
            await settled(telling)
            subscriber.replay()
            await agree(subscriber, telling)
    finally:
        context.destroy(linger=0)


async def test_new_batches_wait_for_a_part_of_an_answer_only(telling, monkeypatch):
    """Each turn of the thread, here turned by hand, publishes what is new, and then sends one part."""
    monkeypatch.setattr(publisher, "REPLAYED", 7)
    monkeypatch.setattr(Publisher, "_run", lambda self: None)
    opened = open_publisher(telling)
    context = zmq.Context()
    try:
        for number in range(20):
            opened._publish(bytes([number]))
        asker = context.socket(zmq.DEALER)
        asker.connect(opened.replay)
        requests = [(0).to_bytes(8, "big"), b"odd", (15).to_bytes(8, "big")]
        for request in requests:
            asker.send_multipart((b"", request))
        found, turns, sent, send = [], 0, [], opened._replay.send_multipart
        monkeypatch.setattr(opened._replay, "send_multipart", lambda *frames, **how: sent.append(send(*frames, **how)))
        while len(found) < 21 + 6:
            before = len(sent)
            turns += opened._serve_replay()
            assert len(sent) - before <= 7
            while asker.poll(50):
                found.append(int.from_bytes(asker.recv_multipart()[2], "big", signed=True))
        assert found == [*range(20), -1, *range(15, 20), -1]
        assert turns == 3 + 1 + 1
        assert not opened._serve_replay()
    finally:
        opened._context.destroy(linger=0)
        context.destroy(linger=0)


@pytest.mark.parametrize("which", ["endpoint", "replay"])
async def test_an_endpoint_that_cannot_be_used_is_told(telling, which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match="another endpoint"):
            open_publisher(telling, **{which: f"tcp://127.0.0.1:{taken.getsockname()[1]}"})


async def test_what_is_closed_leaves_nothing(telling):
    before = threading.active_count()
    opened = open_publisher(telling)
    endpoint = opened.endpoint
    opened.close()
    opened.close()
    assert threading.active_count() <= before
    again = open_publisher(telling, endpoint=endpoint)
    again.close()


def test_the_extra_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.delitem(sys.modules, "astraea_jax.frontends.kv_events.publisher")
    with pytest.raises(StartupError, match=r"pip install 'astraea-jax\[events\]'"), published(stub_engine()[0], FREE):
        pass


def test_what_is_wrong_with_the_flags_is_told_before_a_model_is_loaded(monkeypatch):
    chosen = {"kv_events": None, "kv_events_replay": None}
    monkeypatch.setattr(kv_flags.flags, "FLAGS", SimpleNamespace(**chosen))
    assert kv_flags.wanted() is False
    monkeypatch.setattr(kv_flags.flags, "FLAGS", SimpleNamespace(**{**chosen, "kv_events_replay": FREE}))
    with pytest.raises(StartupError, match="needs --kv_events"):
        kv_flags.wanted()
    monkeypatch.setattr(kv_flags.flags, "FLAGS", SimpleNamespace(**{**chosen, "kv_events": FREE}))
    assert kv_flags.wanted() is True
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(StartupError, match=r"pip install 'astraea-jax\[events\]'"):
        kv_flags.wanted()


def test_an_engine_that_tells_nothing_cannot_be_published():
    engine, _ = stub_engine()
    with pytest.raises(StartupError, match="kv_events=True"), published(engine, FREE):
        pass
