"""Long sessions of a thinking agent through every API: what is served from the cache, with a scripted model."""

from __future__ import annotations

from statistics import mean

import pytest

from astraea_jax.lab.agent_sessions import JOB, TEMPLATES, TOOLS, Author, Ticket, make_tokenizer
from astraea_jax.lab.continuity_load import APIS, TEXT, measure

TURNS = JOB + 3
"""A job and the beginning of another one."""


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("mode", ["job", "session"])
async def test_within_a_job_everything_is_reused(template, mode):
    found = await measure(template, mode, TURNS, sessions=2)
    assert [*found] == [*APIS, TEXT]
    for measured in found.values():
        assert len(measured.in_job) == 2 * (TURNS - 2)
        assert measured.reused >= 0.99 * measured.reusable


async def test_a_new_job_computes_what_the_template_changes():
    by_template = {template: await measure(template, "job", TURNS, sessions=1) for template in TEMPLATES}
    kept = await measure("drops thoughts", "session", TURNS, sessions=1)
    for api in APIS:
        drops, keeps = (mean(by_template[template][api].new_job) for template in TEMPLATES)
        assert drops > 10 * keeps
        assert mean(kept[api].new_job) == keeps


async def test_without_continuity_a_volatile_header_changes_everything():
    found = await measure("keeps thoughts", "off", JOB, sessions=1)
    for api in ("chat completions", "responses"):
        assert found[api].reused < 0.05 * found[api].reusable


def test_turns_follow_from_their_tickets():
    tokenizer = make_tokenizer("keeps thoughts")
    author = Author(tokenizer, odd=1.0)
    chat = [{"role": "user", "content": f"A later ticket counts: {Ticket(1, 2)} {Ticket(3, 4)}"}]
    written = author(tokenizer.encode_chat(chat, TOOLS))
    assert tokenizer.decode(written) == Ticket(3, 4).written()
    assert written[-1] in tokenizer.eos_ids
    assert "<tool_call>" not in Ticket(3, JOB - 1).written()
    with pytest.raises(RuntimeError, match="without a ticket"):
        author(tokenizer.encode("nothing"))
