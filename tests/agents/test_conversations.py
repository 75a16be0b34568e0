"""Whose next request a history is, and what its prompt goes on from."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any

import pytest
from support.conversations import ME, MORE, START, SYSTEM, TOOLS, calling, conversations, result, say, talk
from support.histories import DATED, DROPS, KEEPS, Template, tokenizer

from astraea_jax.agents.conversations import Conversations
from astraea_jax.engine.events import MAX_NAME
from astraea_jax.errors import RequestError


@pytest.mark.parametrize("session", ["s", None])
def test_a_history_goes_on_with_its_own_tokens(session):
    known = conversations()
    first = known.begin(ME, session, START)
    assert (first.report.why, first.report.kept, first.report.message, first.begins_job) == ("new", 0, None, True)
    answer = say(known, first, "", **calling())
    second = known.begin(ME, session, [*START, answer, result()])
    assert (second.program, second.parent, second.begins_job) == (first.program, None, False)
    assert second.report.why == "same"
    messages = [*START, answer, result(), say(known, second, "It is 14."), MORE]
    third = known.begin(ME, session, messages)
    assert third.prompt[: len(second.prompt)] == second.prompt
    assert (third.program, third.begins_job, third.report.why) == (first.program, True, "same")
    assert third.report.kept == len(second.prompt) + len("It is 14.") + 1


def test_a_job_goes_on_after_results_whatever_follows_them():
    known = conversations()
    answer = say(known, known.begin(ME, None, START), "", **calling())
    reminder = [SYSTEM, {"role": "user", "content": "Remember the list."}]
    assert not known.begin(ME, None, [*START, answer, result(), *reminder]).begins_job
    assert known.begin(ME, None, [*START, answer, MORE]).begins_job


def test_names_of_programs():
    known = conversations()
    messages = talk(known, "s")
    title = known.begin(ME, "s", [SYSTEM, {"role": "user", "content": "A title, please."}])
    assert (title.program, title.parent) == ("s/2", None)
    running = known.begin(ME, "s", messages)
    at_once = known.begin(ME, "s", messages)
    assert [(one.program, one.parent) for one in (running, at_once)] == [("s", None), ("s/3", "s")]
    assert at_once.prompt == running.prompt
    other = known.begin(ME, "t", messages)
    assert (other.program, other.parent) == ("t", "s")
    assert known.begin(ME, "s/2", START).program == "s/2/2"  # the client's own name, which is taken
    unnamed = [known.begin(ME, None, START) for _ in range(3)]
    assert len({opened.program for opened in unnamed}) == 3
    long = [known.begin(ME, "s" * MAX_NAME, START) for _ in range(3)]
    assert [len(opened.program) <= MAX_NAME for opened in long] == [True] * 3
    assert len({opened.program for opened in long}) == 3


def test_a_history_that_goes_back_in_time_branches():
    known = conversations()
    messages = talk(known, "s", rounds=3)
    back = known.begin(ME, "s", [*messages[:3], {"role": "user", "content": "Or else?"}])
    assert (back.program, back.parent) == ("s/2", "s")
    assert (back.report.why, back.report.message) == ("messages", 3)
    first = known.begin(ME, "s", messages[:2])  # the same question again
    assert (first.program, first.report.why, first.report.kept) == ("s/3", "new", 0)
    on = known.begin(ME, "s", messages)
    assert (on.program, on.report.why) == ("s", "same")


def test_a_changed_message_is_named():
    known = conversations()
    messages = talk(known, "s", rounds=3)
    messages[2] = {"role": "assistant", "content": "It was 15."}
    changed = known.begin(ME, "s", messages)
    assert (changed.program, changed.report.why, changed.report.message) == ("s/2", "messages", 2)
    unnamed = known.begin(ME, None, messages)
    assert unnamed.report.why == "new"


def test_thoughts_that_are_not_ours_are_another_history():
    known = conversations()
    messages = talk(known, "s", reasoning="Hm.")
    for field in ("reasoning", "reasoning_content", "thinking"):
        same = [{**m, field: "Hm. "} if m["role"] == "assistant" else m for m in _without_reasoning(messages)]
        opened = known.begin(ME, "s", same)
        assert (opened.program, opened.report.why) == ("s", "same")
        opened.ended()
    messages[4] = {**messages[4], "reasoning": "No."}
    opened = known.begin(ME, "s", messages)
    assert (opened.program, opened.parent, opened.report.message) == ("s/2", "s", 4)


def _without_reasoning(messages):
    return [{key: value for key, value in m.items() if key != "reasoning"} for m in messages]


def test_owners_never_meet():
    known = conversations()
    messages = talk(known, "s")
    other = known.begin("you", "s", messages)
    assert (other.program, other.parent, other.report.why, other.report.kept) == ("s", None, "new", 0)
    with pytest.raises(RequestError, match="not known, or has expired"):
        known.fork("they", "s", "child")
    known.forget("you", "s")
    assert known.begin(ME, "s", messages).report.why == "same"


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_what_has_not_ended_well_is_as_if_it_had_not_been(reason):
    known = conversations()
    say(known, known.begin(ME, "s", START), "half an ans", reason)
    again = known.begin(ME, "s", START)
    assert (again.program, again.parent, again.report.why) == ("s", None, "new")
    del again  # nobody says how it has ended: its client may have gone while it was tokenised
    gc.collect()
    assert known.begin(ME, "s", START).program == "s"


def test_only_the_first_end_counts():
    known = conversations()
    opened = known.begin(ME, "s", START)
    opened.ended()
    say(known, opened)
    assert known.begin(ME, "s", START).program == "s"


def test_twins_stay_apart():
    """Agents that begin alike, and are answered alike, are programs of their own."""
    known = conversations()
    running = [known.begin(ME, None, START) for _ in range(3)]
    messages = [*START, *[say(known, opened) for opened in running][:1], MORE]
    later = [known.begin(ME, None, messages) for _ in range(3)]
    assert {opened.program for opened in later} == {opened.program for opened in running}
    assert all(opened.report.kept == len(running[0].prompt) + len("It is 14.") + 1 for opened in later)


@pytest.mark.parametrize(
    ("tools", "arguments", "why", "message"),
    [(TOOLS, {}, "tools", 0), (None, {"date": "2 May"}, "text", 0), (None, {"unread": 1}, "same", None)],
)
def test_what_is_rendered_otherwise_is_tokenised_anew(tools, arguments, why, message):
    known = conversations(DATED)
    messages = [*START]
    opened = known.begin(ME, "s", messages)
    opened.ended(known._tokenizer.encode("It is 14.<|eot|>"), {"role": "assistant", "content": "It is 14."}, "stop")
    messages += [{"role": "assistant", "content": "It is 14."}, MORE]
    opened = known.begin(ME, "s", messages, tools, arguments)
    assert (opened.program, opened.report.why, opened.report.message) == ("s", why, message)
    assert opened.prompt == known._tokenizer.encode_chat(messages, tools, **arguments)


def test_a_turn_that_did_not_reach_its_client_whole_is_tokenised_anew():
    known = conversations()
    encode = known._tokenizer.encode
    known.begin(ME, "s", START).ended(
        encode("It is 14. Observe"), {"role": "assistant", "content": "It is 14."}, "stop", whole=False
    )
    messages = [*START, {"role": "assistant", "content": "It is 14."}, MORE]
    opened = known.begin(ME, "s", messages)
    assert (opened.report.why, opened.report.message) == ("cut", 2)
    assert opened.prompt == known._tokenizer.encode_chat(messages)
    answer = say(known, opened)
    assert known.begin(ME, "s", [*messages, answer, MORE]).report.why == "same"


def test_a_stop_token_that_the_template_would_not_write():
    known = conversations(DATED)
    ids = known._tokenizer.encode("It is 14.<|im_end|>")  # one of the model's, but the template writes <|eot|>
    known.begin(ME, "s", START).ended(ids, {"role": "assistant", "content": "It is 14."}, "stop")
    messages = [*START, {"role": "assistant", "content": "It is 14."}, MORE]
    opened = known.begin(ME, "s", messages)
    assert opened.report.why == "template"
    assert opened.prompt == known._tokenizer.encode_chat(messages)


def test_a_template_that_does_not_end_turns():
    """The first stop text would be that of the user's message, which must not be lost."""
    text = KEEPS.text.replace("{{ '<|im_end|>\n' }}", "{{ '\n' }}", 1)
    assert text != KEEPS.text
    known = Conversations(tokenizer("across", Template("open", text, KEEPS.stop, KEEPS.turn)))
    messages = talk(known, "s")
    opened = known.begin(ME, "s", messages)
    assert opened.report.why == "template"
    assert opened.prompt == known._tokenizer.encode_chat(messages)


@pytest.mark.parametrize(("mode", "why"), [("job", "template"), ("session", "same")])
def test_thoughts_of_earlier_jobs(mode, why):
    """The template leaves them out when a new job begins; in a job they stay, and in the mode ``session`` always."""
    known = conversations(DROPS, mode)
    thinking = say(known, known.begin(ME, "s", START), "", reasoning="Hm.", **calling())
    messages = [*START, thinking, result()]
    in_job = known.begin(ME, "s", messages)
    assert in_job.report.why == "same"
    messages += [say(known, in_job, reasoning="So."), MORE]
    next_job = known.begin(ME, "s", messages)
    assert next_job.report.why == why
    assert next_job.report.message == (2 if mode == "job" else None)
    if mode == "job":
        assert next_job.prompt == known._tokenizer.encode_chat(messages)
        assert 0 < next_job.report.kept < len(in_job.prompt)
    else:
        assert next_job.prompt[: len(in_job.prompt)] == in_job.prompt
    messages += [say(known, next_job), MORE]  # without thoughts: nothing that was computed is left out any more
    last = known.begin(ME, "s", messages)
    assert last.prompt[: len(next_job.prompt)] == next_job.prompt


def test_off_is_what_the_template_makes_of_what_was_sent():
    known = conversations(mode="off")
    header = {"role": "system", "content": "x-anthropic-billing-header: cch=1;\nHelp."}
    messages = [header, START[1]]
    for _ in range(3):
        opened = known.begin(ME, None, messages)
        assert (opened.report.why, opened.report.kept) == ("off", 0)
        assert opened.prompt == known._tokenizer.encode_chat(messages)
        say(known, opened, " It is 14. ", reasoning="Hm.")
        messages += [{"role": "assistant", "content": "It is 14."}, MORE]  # its client has dropped the thought
    assert opened.parent is None


@pytest.mark.parametrize("normalise", [True, False])
def test_volatile_headers(normalise):
    known = conversations(normalise=normalise)
    messages = talk(known, None)

    def sent(cch: int) -> list[Any]:
        header = {"type": "text", "text": f"x-anthropic-billing-header: cch={cch};"}
        marker = {"role": "system", "content": f"<total_tokens>{cch} tokens left</total_tokens>"}
        return [{"role": "system", "content": [header, {"type": "text", "text": "Help."}]}, marker, *messages[1:]]

    opened = known.begin(ME, None, sent(1))
    assert (opened.report.why == "same") is normalise
    answer = say(known, opened)
    changed = known.begin(ME, None, [*sent(2), answer, MORE])
    assert (changed.program == opened.program) is normalise
    assert (changed.report.why == "same") is normalise


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "How much?",
        [{"content": "no role"}],
        [{"role": "user", "content": "half a pair \ud800"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]}, MORE],
        [
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 400 + "1" + "}" * 400}}],
            },
            MORE,
        ],
        [{"role": "user", "tool_calls": 3, "content": "x"}, MORE],
    ],
    ids=range(9),
)
def test_whatever_is_sent_ends_its_own_request_only(messages):
    known = conversations()
    before = talk(known, "s")
    with contextlib.suppress(TypeError, ValueError):
        known.begin(ME, "s", messages).ended()
    assert known.begin(ME, "s", before).program == "s"
    assert len(known.owners.get(ME, 0.0).programs) == 1


def test_ten_thousand_messages():
    known = conversations()
    messages = [*START]
    for i in range(5000):
        messages += [{"role": "assistant", "content": f"It is {i}."}, MORE]
    opened = known.begin(ME, "s", messages)
    answer = say(known, opened)
    later = known.begin(ME, "s", [*messages, answer, MORE])
    assert (later.program, later.report.why) == ("s", "same")
    assert later.report.kept > len(opened.prompt)


def test_a_long_session_is_known_turn_by_turn():
    known = conversations(max_turns=50)
    messages = talk(known, "s", rounds=200)
    assert known.begin(ME, "s", messages).report.why == "same"


def test_threads():
    known = conversations(max_bytes=2**20)
    failures = []

    def work(name: int) -> None:
        try:
            for session in ("s", None):
                messages = [*START[:1], {"role": "user", "content": f"I am {name % 2}"}]
                for _ in range(12):
                    opened = known.begin(f"owner {name % 2}", session, messages)
                    text = known._tokenizer.decode(opened.prompt)
                    assert f"I am {name % 2}" in text
                    assert f"I am {1 - name % 2}" not in text
                    messages = [*messages, say(known, opened, f"Fine {name % 3}."), MORE]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[name]) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
