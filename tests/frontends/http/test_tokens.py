"""Texts of tokens: few are found at once, many in a thread; the answer is the same."""

import threading

import pytest
from support.engines import settled
from support.http_server import serving

from astraea_jax.frontends.http import logprobs, tokens

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = [
    ("/tokenize", {"prompt": "Hello, world", "return_token_strs": True}),
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 20, "n": 2}),
    ("/v1/completions", {"prompt": "Hello", "logprobs": 20, "n": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 20, "stream": True}),
    ("/v1/completions", {"prompt": "Hello", "logprobs": 20, "stream": True}),
]
SAMPLING = {"max_tokens": 4, "ignore_eos": True, "temperature": 0}


def texts(answer):
    """What is told about tokens, without what differs from answer to answer."""
    if answer.headers["content-type"] != "application/json":
        return [part for part in answer.text.split('"logprobs":') if "top_logprobs" in part]
    data = answer.json()
    if "choices" not in data:
        return data
    told = [choice["logprobs"] for choice in data["choices"]]  # whose last digits depend on the batch
    return [one.get("tokens") or [entry["token"] for entry in one["content"]] for one in told]


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_many_texts_are_found_off_the_event_loop(chatty, monkeypatch, path, body):
    threads, find = set(), logprobs.token_text

    def found(*arguments):
        threads.add(threading.current_thread())
        return find(*arguments)

    for module in (logprobs, tokens):
        monkeypatch.setattr(module, "token_text", found)
    async with serving(chatty) as server:
        at_once = await server.client.post(path, json={**body, **SAMPLING})
        assert threads == {threading.current_thread()}
        threads.clear()
        monkeypatch.setattr(logprobs, "MANY_TOKENS", 1)
        in_thread = await server.client.post(path, json={**body, **SAMPLING})
        assert threads
        assert threading.current_thread() not in threads
    assert at_once.status_code == in_thread.status_code == 200
    assert texts(at_once)
    if not body.get("stream"):  # which comes in as many pieces as it happens to
        assert texts(at_once) == texts(in_thread)
    await settled(chatty)


async def test_long_lists_of_tokens_become_text_in_a_thread(chatty, monkeypatch):
    async with serving(chatty) as server:
        threads, decode = [], chatty.tokenizer.decode
        monkeypatch.setattr(
            chatty.tokenizer, "decode", lambda ids: threads.append(threading.current_thread()) or decode(ids)
        )
        answer = await server.client.post("/detokenize", json={"tokens": [70] * 10_000})
        assert len(answer.json()["prompt"]) == 10_000
        assert threading.current_thread() not in threads
        wrong = await server.client.post("/detokenize", json={"tokens": [70] * 10_000 + [10**9]})
        assert (wrong.status_code, "vocabulary" in wrong.text) == (400, True)
        assert (await server.client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
