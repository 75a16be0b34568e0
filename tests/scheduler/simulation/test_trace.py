"""Trace files: what is read, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from astraea_jax.scheduler.simulation.experiment import RECORDED
from astraea_jax.scheduler.simulation.trace import TraceError, TraceProgram, TraceRequest, everyone, load_trace
from astraea_jax.scheduler.wait import Wait


def record(**changes):
    requests = [
        {"cached_prompt_tokens": 0, "new_prompt_tokens": 10, "output_tokens": 5, "tool": {"name": "t", "seconds": 1.5}},
        {"cached_prompt_tokens": 15, "new_prompt_tokens": 3, "output_tokens": 2, "tool": None},
    ]
    return {"program": "p", "arrival_s": None, "segments": requests, **changes}


TOGETHER = {**record()["segments"][1], "cached_prompt_tokens": 0}


def written(tmp_path, *records):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_the_shipped_trace_has_the_statistics_of_its_readme():
    programs = load_trace(RECORDED["claude-code"])
    requests = [s for p in programs for s in p.requests]
    assert (len(programs), len(requests)) == (43, 782)
    assert max(p.longest for p in programs) == 112_647
    assert sum(p.tool_s for p in programs) / 43 == pytest.approx(74.8, abs=0.1)


def test_what_is_written_is_read(tmp_path):
    first, second = load_trace(written(tmp_path, record(), "", record(program="q", arrival_s=2.0)))
    assert first == TraceProgram("p", (TraceRequest(0, 10, 5, "t", 1.5), TraceRequest(15, 3, 2)))
    assert [request.wait for request in first.requests] == [Wait(("t",)), Wait()]
    assert (second.id, second.arrival_s) == ("q", 2.0)


def test_a_human_is_told_from_a_tool(tmp_path):
    segments = record()["segments"]
    segments[0] = {**segments[0], "tool": {"name": "human", "seconds": 60.0, "human": True}}
    [program] = load_trace(written(tmp_path, record(segments=segments)))
    assert program.requests[0] == TraceRequest(0, 10, 5, "human", 60.0, human=True)
    assert program.requests[0].wait == Wait()
    assert program.scaled(1.0, 0.5).requests[0].human


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "holds no programs"),
        (["{"], "line 1"),
        (["[1]"], "line 1"),
        ([record(segments=[])], "no requests"),
        ([record(arrival_s=-1)], "arrives at -1"),
        ([record(arrival_s=float("nan"))], "arrives at nan"),
        ([record(arrival_s=1e10)], "arrives at 10000000000"),
        (["[" * 100_000], "line 1: RecursionError"),
        ([record(segments=[{**record()["segments"][1], "new_prompt_tokens": float("inf")}])], "line 1: OverflowError"),
        ([record(segments=[{**TOGETHER, "new_prompt_tokens": 2**31 - 2}])], "a context of 2147483648 tokens"),
        ([record(arrival_s=2), record(program="q", arrival_s=1)], "run backwards"),
        ([record(), record()], "same name"),
        ([record(segments=[{**record()["segments"][0], "tool": None}, record()["segments"][1]])], "all but the last"),
        ([record(segments=[{**record()["segments"][1], "cached_prompt_tokens": 1}])], "only 0 exist"),
        ([record(segments=[{**record()["segments"][1], "cached_prompt_tokens": 0, "output_tokens": 0}])], "at least 1"),
    ],
)
def test_faults_are_named(tmp_path, records, words):
    with pytest.raises(TraceError, match=words):
        load_trace(written(tmp_path, *records))


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match=r"trace.jsonl: 'utf-8' codec"):
        load_trace(path)


def test_only_newlines_end_a_line(tmp_path):
    name = "a\u2028b\x85c\x0bd"
    path = written(tmp_path, json.dumps(record(program=name), ensure_ascii=False))
    assert [program.id for program in load_trace(path)] == [name]


@pytest.mark.parametrize("seconds", [-1.0, 1e10, float("inf"), float("nan")])
def test_tools_take_finite_time(seconds):
    with pytest.raises(TraceError, match="its tool takes"):
        TraceProgram("p", (TraceRequest(0, 1, 1, "t", seconds), TraceRequest(2, 1, 1)))


def test_scaled_programs_are_still_programs():
    for program in load_trace(RECORDED["claude-code"]):
        small = program.scaled(0.01, 0.5)
        assert len(small.requests) == len(program.requests)
        assert small.longest <= 0.01 * program.longest + 3 * len(program.requests)
        assert small.tool_s == pytest.approx(program.tool_s / 2)
        for one in (program, small):
            continues = [s.cached == before.context for before, s in pairwise(one.requests)]
            assert continues == [s.cached == before.context for before, s in pairwise(program.requests)]


def family_member(children=(), **changes):
    requests = (TraceRequest(8, 4, 3, "agent", 0.0, children=children), TraceRequest(15, 2, 1))
    return TraceProgram("p", requests, **{"lineage": ((0, "product"), (8, "p")), **changes})


def fork_of(parent):
    at = parent.requests[0].context
    return TraceProgram("c", (TraceRequest(at, 5, 2),), lineage=(*parent.lineage, (at, "c")))


def test_what_a_program_shares_may_be_cached_at_its_first_request():
    program = family_member()
    assert program.shared == 8
    parent = family_member(children=(fork_of(program),))
    assert parent.longest == fork_of(program).longest == 22
    assert [p.id for p in everyone([parent, program])] == ["p", "c", "p"]


@pytest.mark.parametrize(
    ("lineage", "words"),
    [
        ((), "8 tokens cached, but only 0 exist"),
        (((0, "product"), (7, "p")), "8 tokens cached, but only 7 exist"),
        (((1, "product"), (8, "p")), "ascend from 0"),
        (((0, "product"), (9, "x"), (8, "p")), "ascend from 0"),
    ],
)
def test_lineages_are_checked(lineage, words):
    with pytest.raises(TraceError, match=words):
        family_member(lineage=lineage)


def test_who_shares_a_beginning_replaces_nothing_later():
    with pytest.raises(TraceError, match="may not replace"):
        TraceProgram("p", (TraceRequest(0, 9, 9, "t"), TraceRequest(5, 9, 9)), lineage=((0, "p"),))


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0])
def test_scaled_forks_go_on_from_their_parents(factor):
    parent = family_member(children=(fork_of(family_member()),)).scaled(factor)
    (child,) = parent.requests[0].children
    assert child.shared == child.requests[0].cached == parent.requests[0].context
    assert child.lineage[:2] == parent.lineage
    assert parent.requests[1].cached == parent.requests[0].context
