"""The synchronous front door on a random model."""

from __future__ import annotations

import pytest
from support.sizes import SMALL

from astraea_jax import LLM, RequestError, SamplingParams


def test_generate_and_chat(random_folder, greedy):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(random_folder, SMALL) as llm:
        encode = llm.engine.tokenizer.encode
        completions = llm.generate(["hello", "x" * 30, "you"], params)
        assert [list(c.token_ids) for c in completions] == [greedy(encode(p), 8) for p in ("hello", "x" * 30, "you")]
        assert completions[0].text == llm.engine.tokenizer.decode(completions[0].token_ids)
        [alone] = llm.generate("hello", params)
        assert alone.token_ids == completions[0].token_ids
        message = {"role": "user", "content": "hi"}
        [one] = llm.chat([message], params=params)
        two = llm.chat([[message], [message]], params=params)
        assert {one.text} == {program.text for program in two}
        with pytest.raises(RequestError, match="context"):
            llm.generate("y" * 300)
        assert llm.generate("hello", params)[0].token_ids == alone.token_ids
        assert llm.engine.stats().programs == 0
