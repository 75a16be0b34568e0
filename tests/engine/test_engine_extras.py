"""Requests that need more than plain sampling: the text of a reference that computes each token by itself, whatever
else runs; log-probabilities; and grammars that fail alone."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import numpy as np
import pytest
from support.engines import settled, together
from support.grammars import BROKEN, EVEN, Broken, Only, Spelled
from support.sizes import NARROW, PAGE_BYTES, SMALL

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError, StepFailed

OFFLOADING = dataclasses.replace(NARROW, host_kv_bytes=200 * PAGE_BYTES, residency="infercept")
N = 20
EXTRAS = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.0, "presence_penalty": -0.5},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7, "logit_bias": {5: 3.0, 200: -100.0}},
    {"grammar": EVEN},
    {"grammar": EVEN, "frequency_penalty": 2.0, "logprobs": 3},
    {"logprobs": 0},
    {},
]
PLAIN = SamplingParams(max_tokens=N, ignore_eos=True)


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 50))] for _ in range(count)]


async def tokens(generation) -> list[int]:
    return [t async for delta in generation for t in delta.token_ids]


@pytest.fixture
def reference(dense):
    """``reference(prompt, params)``: the greedy text, each token from the logits of all before it, changed in NumPy."""

    def generate(prompt: list[int], params: SamplingParams) -> list[int]:
        output: list[int] = []
        while len(output) < params.max_tokens:
            logits = dense([*prompt, *output])[-1].astype(np.float64)
            for token, bias in params.logit_bias:
                logits[token] += bias
            if len(output) < params.min_tokens:
                logits[list(params.stop_token_ids)] = -np.inf
            seen = [*{*prompt, *output}]
            logits[seen] = (
                np.where(logits[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty) * (logits[seen])
            )
            counts = np.bincount(output, minlength=len(logits))
            logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            if params.grammar is not None:
                logits[[t for t in range(len(logits)) if t not in params.grammar.tokens]] = -np.inf
            output.append(int(logits.argmax()))
            if output[-1] in params.stop_token_ids:
                break
        return output

    return generate


@pytest.mark.parametrize("config", [SMALL, NARROW, OFFLOADING])
async def test_text_does_not_depend_on_batch_preemption_offload_or_prefixes(config, make_engine, reference, greedy):
    """Programs of two requests, the second after the KV of the first: rows with extras and plain ones in one batch."""
    engine = make_engine(config)
    before = engine.stats()
    expected: dict[int, list[list[int]]] = {}

    async def program(i: int, prompt: list[int]) -> list[list[int]]:
        params = dataclasses.replace(PLAIN, **EXTRAS[i % len(EXTRAS)])
        first = await tokens(engine.generate(prompt, params, session=f"x{i}"))
        longer = [*prompt, *first, 1, 2]
        second = await tokens(engine.generate(longer, params, session=f"x{i}", final=True))
        say = greedy if params.plain else None
        expected[i] = [
            say(text, N, said) if say else reference(text, params) for text, said in ((prompt, first), (longer, second))
        ]
        return [first, second]

    outputs = await together(engine, *[program(i, prompt) for i, prompt in enumerate(prompts(16, seed=2))])
    assert outputs == [expected[i] for i in range(len(outputs))]
    after = engine.stats()
    assert config is SMALL or after.preemptions > before.preemptions, "the pool was meant to be too small"
    assert config is not OFFLOADING or after.offloaded_pages > before.offloaded_pages
    await settled(engine)
    assert engine._loop._live.trackers == 0


async def test_plain_draws_do_not_notice_rows_that_are_drawn_again(engine):
    drawn = dataclasses.replace(PLAIN, temperature=1.0, top_p=0.9, seed=5)
    alone = await tokens(engine.generate([1, 2, 3], drawn))
    crowd = [
        engine.generate(p, dataclasses.replace(PLAIN, temperature=1.0, seed=i, grammar=EVEN, presence_penalty=1))
        for i, p in enumerate(prompts(7, seed=3))
    ]
    among = await tokens(engine.generate([1, 2, 3], drawn))
    assert all(token % 2 == 0 for crowded in await asyncio.gather(*map(tokens, crowd)) for token in crowded)
    assert among == alone


async def test_draws_with_extras_depend_on_the_seed_only(make_engine):
    params = dataclasses.replace(PLAIN, temperature=1.0, seed=9, frequency_penalty=1.0, grammar=EVEN, top_k=50)
    work = prompts(12, seed=4)
    alone = [await tokens(make_engine(SMALL).generate(prompt, params)) for prompt in work]
    engine = make_engine(NARROW)
    assert await asyncio.gather(*[tokens(engine.generate(prompt, params)) for prompt in work]) == alone
    assert len({*map(tuple, alone)}) > 6


async def test_extras_that_change_nothing_change_nothing(engine):
    params = dataclasses.replace(PLAIN, temperature=1.0, seed=4)
    plain = await tokens(engine.generate([9, 8], params))
    for more in (
        {"logit_bias": {3: 0.0}},
        {"grammar": Only(frozenset(range(260)))},
        {"logprobs": 20},
        {"min_tokens": N},
    ):
        assert await tokens(engine.generate([9, 8], dataclasses.replace(params, **more))) == plain


async def test_logprobs_are_those_of_the_models_own_logits(engine, dense):
    """Also where the token was drawn from others."""
    prompt = [3, 1, 4]
    params = dataclasses.replace(PLAIN, temperature=2.0, seed=1, logit_bias={7: 5.0}, presence_penalty=1.0, logprobs=20)
    deltas = [delta async for delta in engine.generate(prompt, params)]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    output = [t for delta in deltas for t in delta.token_ids]
    reported = [one for delta in deltas for one in delta.logprobs]
    logits = dense([*prompt, *output])[len(prompt) - 1 : -1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [one.token_id for one in reported] == output
    assert any(one.token_id != one.top[0][0] for one in reported), "some draws were meant to be improbable"
    for one, row in zip(reported, logp, strict=True):
        np.testing.assert_allclose(one.logprob, row[one.token_id], rtol=1e-3, atol=1e-4)
        ids = [token for token, _ in one.top]
        np.testing.assert_allclose([value for _, value in one.top], np.sort(row)[::-1][:20], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose([value for _, value in one.top], row[ids], rtol=1e-3, atol=1e-4)


async def test_a_request_hears_as_many_logprobs_as_it_asked_for(engine):
    asked = [None, 0, 1, 5]
    params = [dataclasses.replace(PLAIN, logprobs=n) for n in asked]
    for n, generation in zip(asked, [engine.generate([5], p) for p in params], strict=True):
        lengths = {len(one.top) for delta in [d async for d in generation] for one in delta.logprobs}
        assert lengths == (set() if n is None else {n})


async def test_no_token_ends_the_request_before_its_minimum(engine, greedy, reference):
    stop = greedy([7, 8, 9], 12)[2]
    params = SamplingParams(max_tokens=24, min_tokens=9, ignore_eos=True, stop_token_ids=(stop,))
    output = await tokens(engine.generate([7, 8, 9], params))
    assert output == reference([7, 8, 9], params)
    assert stop not in output[:9]
    (eos,) = engine.tokenizer.eos_ids
    eager = SamplingParams(max_tokens=24, logit_bias={eos: 100.0})
    assert len(await tokens(engine.generate([7], eager))) == 1
    assert len(await tokens(engine.generate([7], dataclasses.replace(eager, min_tokens=7)))) == 8


async def test_no_string_ends_the_request_before_its_minimum(engine, greedy):
    text = engine.tokenizer.decode(greedy([7, 8, 9], N))
    params = dataclasses.replace(PLAIN, stop=(text[0], text[2:4]))
    assert await engine.generate([7, 8, 9], params).text() == ""
    assert await engine.generate([7, 8, 9], dataclasses.replace(params, min_tokens=N)).text() == text


@pytest.mark.parametrize("max_tokens", [3, 9])
async def test_a_request_ends_with_its_grammar(max_tokens, engine):
    """In a batch with others, and with its last token, too; a minimum of tokens does not matter then."""
    params = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, grammar=Spelled((72, 105, 33)))
    neighbour = engine.generate([7], PLAIN)
    deltas = [d async for d in engine.generate([1, 2], params)]
    assert [t for d in deltas for t in d.token_ids] == [72, 105, 33]
    assert deltas[-1].finish_reason == "stop"
    assert len(await tokens(neighbour)) == N


async def test_a_grammar_that_is_cut_is_no_stop(engine):
    params = SamplingParams(max_tokens=2, grammar=Spelled((72, 105, 33)))
    assert [d async for d in engine.generate([1, 2], params)][-1].finish_reason == "length"


async def test_a_grammar_may_leave_nothing_but_the_end(engine):
    """Even before the minimum of tokens."""
    (eos,) = engine.tokenizer.eos_ids
    for more in ({}, {"min_tokens": 5}, {"temperature": 1.0}):
        params = SamplingParams(max_tokens=5, grammar=Only(frozenset({eos})), **more)
        deltas = [d async for d in engine.generate([1, 2], params)]
        assert [t for d in deltas for t in d.token_ids] == [eos]
        assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("call", BROKEN)
async def test_a_grammar_that_fails_fails_its_request_alone(call, engine):
    alone = await tokens(engine.generate([4], dataclasses.replace(PLAIN, grammar=EVEN)))
    neighbours = [engine.generate([4], dataclasses.replace(PLAIN, grammar=EVEN)) for _ in range(3)]
    failing = engine.generate([4], dataclasses.replace(PLAIN, grammar=Broken(call)))
    with pytest.raises(StepFailed, match="grammar"):
        await tokens(failing)
    assert [await tokens(neighbour) for neighbour in neighbours] == [alone] * 3
    await settled(engine)
    assert engine.stats().free_pages == engine.layout.num_pages - 1


async def test_tokens_outside_of_the_vocabulary_are_refused_or_mean_nothing(engine):
    with pytest.raises(RequestError, match=r"logit_bias names token 260, outside the vocabulary \[0, 260\)"):
        engine.generate([1], SamplingParams(logit_bias={260: 1.0}))
    params = dataclasses.replace(PLAIN, stop_token_ids=(260, 2**31 - 1), min_tokens=N)
    assert await tokens(engine.generate([1], params)) == await tokens(engine.generate([1], PLAIN))


async def test_more_adjustments_than_one_execution_takes(random_folder, monkeypatch, reference):
    monkeypatch.setattr("astraea_jax.engine.resampling.ENTRIES", 7)
    monkeypatch.setattr("astraea_jax.engine.runner.ENTRIES", 7)
    engine = Engine.from_folder(random_folder, SMALL)
    engine.start()
    try:
        params = dataclasses.replace(PLAIN, repetition_penalty=1.5, presence_penalty=0.5)
        work = prompts(4, seed=6)
        outputs = await asyncio.gather(*[tokens(engine.generate(prompt, params)) for prompt in work])
        assert outputs == [reference(prompt, params) for prompt in work]
    finally:
        await asyncio.to_thread(engine.shutdown, 0)
