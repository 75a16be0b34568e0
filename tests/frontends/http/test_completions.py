"""OpenAI's completions, and vLLM's tokens, with OpenAI's own client."""

import openai
import pytest
from support.engines import settled

ASKED = {"model": "tiny", "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}


async def test_every_form_of_a_prompt(client, server, chatty):
    ids = chatty.tokenizer.encode("lamp", add_bos=True)
    other = chatty.tokenizer.encode("chair", add_bos=True)
    texts = []
    for prompt in ("lamp", ids, ["lamp", "chair"], [ids, other]):
        whole = await client.completions.create(prompt=prompt, **ASKED)
        texts.append([choice.text for choice in whole.choices])
        assert all(choice.finish_reason == "length" for choice in whole.choices)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[2][0] == texts[0][0]
    assert whole.usage.prompt_tokens == len(ids) + len(other)
    assert whole.usage.completion_tokens == 8
    await settled(chatty)


async def test_streams_say_the_same(client):
    asked = {**ASKED, "prompt": ["lamp", "chair"], "n": 2, "echo": True, "temperature": 1, "seed": 3}
    whole = await client.completions.create(**asked)
    assert [choice.text.startswith("lamp") for choice in whole.choices] == [True, True, False, False]
    texts = [""] * 4
    async for chunk in await client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert chunk.usage == whole.usage
    assert texts == [choice.text for choice in whole.choices]


async def test_logprobs_in_the_old_shape(client):
    whole = await client.completions.create(prompt="lamp", logprobs=2, **ASKED)
    found = whole.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 4
    assert found.text_offset[0] == 0
    assert max(found.top_logprobs[0].values()) == found.token_logprobs[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99_999]}, "vocabulary"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 64}, "more than"),
        ({"suffix": "b"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_served(client, chatty, change, named):
    with pytest.raises(openai.BadRequestError, match=named):
        await client.completions.create(**{**ASKED, "prompt": "a", **change})
    await settled(chatty)


async def test_models_and_tokens(client, server):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("another/model")
    http = server.client
    text = "14 lamps, 日本 <|im_end|>"
    found = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()
    assert back["prompt"] == text.removesuffix("<|im_end|>")
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    counted = (await http.post("/tokenize", json=chat)).json()["count"]
    usage = (await http.post("/v1/chat/completions", json={**chat, "max_tokens": 1})).json()["usage"]
    assert counted == usage["prompt_tokens"]
    assert (await http.post("/tokenize", json={**chat, "prompt": "a"})).status_code == 400
    assert (await http.post("/detokenize", json={"tokens": [99_999]})).status_code == 400
