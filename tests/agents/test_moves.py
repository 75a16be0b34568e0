"""Conversations that move to another process: their next prompts are what they would have been."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from support.conversations import ME, MORE, START, calling, conversations, result, say, talk
from support.histories import DROPS, KEEPS

from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.moves import History


def moved(here: Conversations, there: Conversations, name: str) -> History:
    history = here.let_go(ME, name)
    assert history is not None
    there.take_over(history)
    return history


@pytest.mark.parametrize("template", [KEEPS, DROPS])
def test_a_job_goes_on_from_its_true_tokens(template):
    here, there, stays = (conversations(template) for _ in range(3))
    texts = []
    for known in (here, stays):
        first = known.begin(ME, "s", START)
        answer = say(known, first, "", **calling())
        texts.append([*START, answer, result()])
    assert texts[0] == texts[1]
    moved(here, there, "s")
    assert here.programs(ME, "s") == []
    expected, found = stays.begin(ME, "s", texts[0]), there.begin(ME, "s", texts[0])
    assert list(found.prompt) == list(expected.prompt)
    assert (found.report, found.program, found.begins_job) == (expected.report, expected.program, False)
    assert there.owners.size > 0
    assert here.owners.size == 0


def test_long_histories_move_whole_and_may_move_again():
    here, there, back, stays = (conversations(mode="session") for _ in range(4))
    messages = [talk(known, "s", rounds=4) for known in (here, stays)]
    assert messages[0] == messages[1]
    once = moved(here, there, "s")
    again = moved(there, back, "s")
    assert len(once.turns) == len(again.turns) == 4
    assert list(back.begin(ME, "s", [*messages[0], MORE]).prompt) == list(
        stays.begin(ME, "s", [*messages[0], MORE]).prompt
    )
    assert json.dumps(asdict(once), default=bytes.hex), "it is plain data"


def test_a_branch_shares_what_is_known_already():
    here, there = conversations(), conversations()
    messages = talk(here, "s")
    here.fork(ME, "s", "child")
    moved(here, there, "s")
    size, count = there.owners.size, there.owners.get(ME, 0.0).count
    moved(here, there, "child")
    assert there.owners.get(ME, 0.0).count == count + 1
    assert there.owners.size < 2 * size
    child = there.begin(ME, "child", [*messages, MORE])
    assert (child.program, child.report.why) == ("child", "same")
    assert there.begin(ME, "s", [*messages, MORE]).program == "s"


def test_what_has_come_back_already_is_left_alone_and_what_runs_stays():
    here, there = conversations(), conversations()
    messages = talk(here, "s")
    assert here.let_go(ME, "nobody") is None
    assert here.let_go("another owner", "s") is None
    running = here.begin(ME, "s", [*messages, MORE])
    assert here.let_go(ME, "s") is None, "it runs"
    del running
    say(here, here.begin(ME, None, START), "")
    talk(there, "s")
    history = here.let_go(ME, "s")
    assert history is not None
    before = there.owners.size
    there.take_over(history)
    assert there.owners.size == before
