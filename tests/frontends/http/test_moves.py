"""Sessions that move to another server: their turns go on from the tokens that were generated elsewhere."""

from __future__ import annotations

from dataclasses import replace

from support.engines import end_all_sessions, settled
from support.http_server import MODEL, serving
from support.sizes import SMALL

CHAT = "/v1/chat/completions"


async def test_a_chat_goes_on_elsewhere_from_its_true_tokens(make_engine):
    engines = [make_engine(), make_engine(replace(SMALL, max_queued=SMALL.max_queued + 1))]
    for engine in engines:
        end_all_sessions(engine)
    body = {"model": MODEL, "max_tokens": 12, "temperature": 0, "session_id": "s"}
    messages = [{"role": "user", "content": "Hello there"}]
    async with serving(engines[0]) as here, serving(engines[1]) as there:
        for session in ("stays", "s"):
            said = (await here.client.post(CHAT, json={**body, "messages": messages[:1], "session_id": session})).json()
        messages += [said["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        expected = (await here.client.post(CHAT, json={**body, "messages": messages, "session_id": "stays"})).json()
        moving = next(one for one in await here.door.programs.hand_over() if one.history and one.history.program == "s")
        assert await here.door.programs.hand_over() == []
        assert moving.history is not None
        await there.door.programs.take_over(moving)
        await settled(engines[1])
        answer = (await there.client.post(CHAT, json={**body, "messages": messages})).json()
        assert there.door.programs.continued == {"same": 1}
        known = len(moving.program.tokens)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == known - 1
        assert answer["choices"] == expected["choices"], "bytes that are no text are in its history: only they say so"
