"""The whole loop on a random model: right tokens whatever the batch, nothing lost, faults kept apart."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading

import jax
import jax.numpy as jnp
import pytest
from support.engines import WAIT_S, break_loop, gathering, held, settled, until
from support.sizes import NARROW, PAGE_BYTES, SMALL

from astraea_jax.engine import runner, step
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StartupError
from astraea_jax.models.checkpoint import load_hf
from astraea_jax.models.tokenizer import Tokenizer


async def tokens(generation) -> list[int]:
    return [t async for delta in generation for t in delta.token_ids]


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def no_eos(n: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True, **more)


@pytest.mark.serves("native", "tested", "the engine's tokens, against dense attention")
@pytest.mark.serves("reference", "tested", "the engine's tokens, against dense attention")
@pytest.mark.parametrize(
    "config",
    [SMALL, NARROW, dataclasses.replace(NARROW, max_step_tokens=8, page_size=1, attention="reference")],
)
async def test_greedy_tokens_do_not_depend_on_batch_chunks_or_preemption(config, make_engine, greedy):
    engine = make_engine(config)
    before = engine.stats().preemptions
    work = prompts(24)
    with gathering(engine):
        asked = [engine.generate(p, no_eos(24)) for p in work]
    outputs = await asyncio.gather(*map(tokens, asked))
    for prompt, output in zip(work, outputs, strict=True):
        assert output == greedy(prompt, 24, output)
    assert config is SMALL or engine.stats().preemptions > before, "the pool was meant to be too small"
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_a_step_may_have_more_rows_than_tokens(random_folder, greedy, monkeypatch):
    """As on accelerators: few tokens of prefill are no step of twice as many tokens as there may be rows."""
    monkeypatch.setattr(step, "FEWEST_ROWS", {})
    monkeypatch.setattr(step, "FEWEST_TOKENS", 4)
    engine = Engine.from_folder(random_folder, SMALL)
    engine.start()
    try:
        work = prompts(12, seed=5)
        outputs = await asyncio.gather(*[tokens(engine.generate(p, no_eos(12))) for p in work])
        assert outputs == [greedy(prompt, 12) for prompt in work]
    finally:
        await asyncio.to_thread(engine.shutdown, 0)


async def test_a_page_table_that_changes_much_is_written_in_parts(random_folder, greedy, monkeypatch):
    """Eight changes go with a step, five at a time ahead of it: a prompt of 30 pages takes both."""
    monkeypatch.setattr(runner, "TABLE_UPDATES", 5)
    sizes = dataclasses.replace(NARROW, max_step_tokens=8, page_size=1)
    engine = Engine.from_folder(random_folder, sizes)
    engine.start()
    try:
        for prompt in prompts(3, longest=30):
            assert await tokens(engine.generate(prompt, no_eos(8))) == greedy(prompt, 8)
    finally:
        await asyncio.to_thread(engine.shutdown, 0)


async def test_draws_depend_on_the_seed_only(engine):
    prompt = [1, 2, 3]
    params = no_eos(16, temperature=1.0, top_p=0.9, seed=5)
    alone = await tokens(engine.generate(prompt, params))
    crowd = [engine.generate(p, no_eos(16, temperature=1.5, seed=i)) for i, p in enumerate(prompts(10))]
    among = await tokens(engine.generate(prompt, params))
    await asyncio.gather(*map(tokens, crowd))
    other = await tokens(engine.generate(prompt, dataclasses.replace(params, seed=6)))
    assert alone == among != other


async def test_stop_token_ends_the_request_and_is_reported(engine, greedy):
    full = greedy([7, 8, 9], 12)
    stop = full[5]
    deltas = [d async for d in engine.generate([7, 8, 9], no_eos(12, stop_token_ids=(stop,)))]
    ids = [t for d in deltas for t in d.token_ids]
    assert ids == full[: full.index(stop) + 1]
    assert deltas[-1].finish_reason == "stop"
    assert all(d.finish_reason is None for d in deltas[:-1])


async def test_stop_string_cuts_the_text(engine, greedy):
    text = engine.tokenizer.decode(greedy([7, 8, 9], 24))
    assert len(text) > 8
    stop = text[4:6]
    generation = engine.generate([7, 8, 9], no_eos(24, stop=(stop,)))
    deltas = [d async for d in generation]
    assert "".join(d.text for d in deltas) == text[: text.find(stop)]
    assert deltas[-1].finish_reason == "stop"


async def test_streamed_text_is_the_decoded_tokens(engine):
    generation = engine.generate([65, 66], no_eos(40, temperature=3.0, seed=1))
    deltas = [d async for d in generation]
    ids = [t for d in deltas for t in d.token_ids]
    assert "".join(d.text for d in deltas) == engine.tokenizer.decode(ids)
    assert deltas[-1].finish_reason == "length"
    assert len(ids) == 40
    usage = generation.usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (2, 40, 0)
    assert min(usage.queue_s, usage.prefill_s, usage.decode_s) >= 0


async def test_a_session_reuses_what_it_computed(engine, greedy):
    prompt = prompts(1, seed=3, longest=40)[0]
    first = await tokens(engine.generate(prompt, no_eos(10), session="s"))
    longer = prompt + first + [1, 2, 3]
    second = engine.generate(longer, no_eos(10), session="s")
    assert await tokens(second) == greedy(longer, 10)
    assert second.usage.cached_tokens == len(prompt) + len(first) - 1  # the last token was never fed back
    changed = [*longer[:5], 99, *longer[6:]]
    third = engine.generate(changed, no_eos(10), session="s", final=True)
    assert await tokens(third) == greedy(changed, 10)
    assert third.usage.cached_tokens == 5
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_waiting_programs_give_their_pages_up_under_pressure(make_engine, greedy):
    engine = make_engine(NARROW)
    work = prompts(12, seed=4, longest=40)
    for i, prompt in enumerate(work):
        await tokens(engine.generate(prompt, no_eos(8), session=f"p{i}"))
    outputs = await asyncio.gather(
        *[tokens(engine.generate(p, no_eos(16), session=f"p{i}", final=True)) for i, p in enumerate(work)]
    )
    assert outputs == [greedy(p, 16, output) for p, output in zip(work, outputs, strict=True)]
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_a_session_serves_one_request_at_a_time(engine):
    with held(engine, 2) as engine_held:
        first = engine.generate([1, 2], no_eos(50), session="busy")
        await anext(aiter(first))
        second = engine.generate([1, 2, 3], no_eos(5), session="busy")
        engine_held.more(2)  # it hears of the second before the last of these, and tells after it
        with pytest.raises(Overloaded, match="has a request in progress"):
            await tokens(second)
    assert len(await tokens(first)) == 49
    engine.end_session("busy")


async def test_cancel_frees_everything(engine):
    with held(engine, 2):
        running = [engine.generate(p, no_eos(150)) for p in prompts(16, longest=3)]
        await until(lambda: engine.stats().running)
        for generation in running:
            generation.cancel()
            generation.cancel()
    ends = [[d async for d in g][-1] for g in running]
    assert {d.finish_reason for d in ends} == {"cancelled"}
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_a_closed_event_loop_is_a_cancel(engine):
    kept = []  # or else it would be cancelled because nobody holds it

    def abandon() -> None:
        async def start() -> None:
            kept.append(engine.generate([1, 2, 3], no_eos(200)))

        asyncio.run(start())

    thread = threading.Thread(target=abandon)
    thread.start()
    await asyncio.to_thread(thread.join)
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], SamplingParams(), "empty"),
        ([1] * 256, SamplingParams(max_tokens=1), "256 tokens.*context of 256"),
        ([1], SamplingParams(max_tokens=2**31 - 1), "max_tokens 2147483647"),
        ([1, 260], SamplingParams(max_tokens=1), r"vocabulary \[0, 260\)"),
        ([-1], SamplingParams(max_tokens=1), "vocabulary"),
    ],
)
async def test_bad_requests_are_refused_at_once(prompt, params, words, engine):
    with pytest.raises(RequestError, match=words):
        engine.generate(prompt, params)


async def test_overload_is_refused_and_passes(make_engine):
    engine = make_engine(dataclasses.replace(SMALL, max_queued=4))
    with held(engine, 2) as still:
        with gathering(engine):
            running = [engine.generate([1], no_eos(60)) for _ in range(4)]
        await still.still()  # these run, and do not wait any more
        running += [engine.generate([1], no_eos(60)) for _ in range(4)]
        with pytest.raises(Overloaded, match="4 requests"):
            engine.generate([1], no_eos(1))
    await asyncio.gather(*map(tokens, running))
    assert len(await tokens(engine.generate([1], no_eos(1)))) == 1


async def test_long_requests_of_one_owner_do_not_hold_two_tokens_of_another(make_engine):
    """The last of them would have been served when hardly any of the others was left."""
    engine = make_engine(dataclasses.replace(SMALL, max_queued=600))
    with held(engine, 0) as steps:
        flood = [engine.generate([i % 256] * 20, no_eos(200), owner="flood") for i in range(400)]
        await steps.still()
        for _ in range(3):
            small = engine.generate([1, 2], no_eos(2), owner="small")
            steps.more(20)
            assert len(await asyncio.wait_for(tokens(small), WAIT_S)) == 2
    for generation in flood:
        generation.cancel()
    await settled(engine)


async def test_a_failing_loop_tells_everybody_and_stays_dead(random_folder):
    engine = Engine.from_folder(random_folder, SMALL)
    with pytest.raises(EngineDead, match="not been started"):
        engine.generate([1], no_eos(1))
    engine.start()
    with gathering(engine):
        waiting = engine.generate([1], no_eos(200))
        break_loop(engine, ZeroDivisionError("division by zero"))
    with pytest.raises(EngineDead, match="division by zero"):
        await tokens(waiting)
    assert not engine.live
    with pytest.raises(EngineDead, match="division by zero"):
        engine.generate([1], no_eos(1))
    engine.shutdown()


async def test_a_compilation_after_start_is_an_error(random_folder):
    engine = Engine.from_folder(random_folder, SMALL)
    engine.start()
    assert len(await tokens(engine.generate([1], no_eos(20)))) == 20
    observe = engine._scheduler.observe
    engine._scheduler.observe = lambda *step: observe(*step, *jax.jit(lambda x: x[:0])(jnp.ones(3)))
    waiting = engine.generate([1], no_eos(200))
    with pytest.raises(EngineDead, match="compiled after start-up"):
        await tokens(waiting)


async def test_scores_that_are_not_finite_fail_the_request_only(random_folder):
    decoder = load_hf(random_folder, jnp.float32)
    # The output projection is another matrix, so only requests that contain token 13 are poisoned.
    decoder.embed.weight[...] = decoder.embed.weight[...].at[13].set(jnp.nan)
    engine = Engine(decoder, Tokenizer.from_folder(random_folder), SMALL)
    engine.start()
    alone = await tokens(engine.generate([1, 2], no_eos(30, stop_token_ids=(13,))))
    neighbour = engine.generate([1, 2], no_eos(30, stop_token_ids=(13,)))
    with pytest.raises(RuntimeError, match="not finite"):
        await tokens(engine.generate([5, 13, 6], no_eos(30)))
    assert await tokens(neighbour) == alone
    assert await tokens(engine.generate([1, 2], no_eos(30, stop_token_ids=(13,)))) == alone
    engine.shutdown(grace_s=0)


async def test_shutdown_lets_running_requests_finish(random_folder):
    engine = Engine.from_folder(random_folder, SMALL)
    engine.start()
    running = engine.generate([1], no_eos(30))
    closing = asyncio.create_task(asyncio.to_thread(engine.shutdown, 30))
    assert len(await tokens(running)) == 30
    await closing
    with pytest.raises(EngineDead, match="shut"):
        engine.generate([1], no_eos(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_bytes": 100}, "fewer than two pages"),
        ({"max_context": 10_000}, "exceeds the model's 256"),
        ({"kv_bytes": 10 * PAGE_BYTES, "max_context": 64}, "36 tokens that the KV pages hold"),
    ],
)
def test_sizes_that_do_not_fit_the_model_fail_at_start(changes, words, random_folder):
    with pytest.raises(StartupError, match=words):
        Engine.from_folder(random_folder, dataclasses.replace(SMALL, **changes))
