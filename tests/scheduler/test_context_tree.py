"""Contexts that programs share: each token counts once, as long as anybody has it, whoever ends in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.branches import loop_of, serve

from astraea_jax.scheduler.context_tree import ContextTree
from astraea_jax.scheduler.contexts import HALF_LIFE_S
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.transfer import HostTier

SIZE = 4


def blocks(text: str) -> list[bytes]:
    """Hashes of a text whose letters are blocks: each names all before it."""
    return [text[: i + 1].encode() for i in range(len(text))]


class Sharing(RuleBasedStateMachine):
    """Programs whose contexts grow, shrink, part and end; what the tree says is counted again from all texts."""

    def __init__(self):
        super().__init__()
        self.tree, self.now = ContextTree(SIZE), 0.0
        self.programs = [Program(i, 0.0) for i in range(6)]
        self.has: dict[Program, tuple[str, int, bool]] = {}
        self.since: dict[Program, float] = {}

    @rule(
        number=st.integers(0, 5),
        text=st.text("ab", max_size=7),
        more=st.integers(1, SIZE),
        active=st.booleans(),
        later=st.sampled_from([0.0, 1.0, 7.0]),
    )
    def goes_on(self, number, text, more, active, later):
        self.now += later
        program, tokens = self.programs[number], len(text) * SIZE + more
        (self.tree.works if active else self.tree.waits)(program, blocks(text), tokens, self.now)
        self.has[program], self.since[program] = (text, more, active), self.now

    @rule(number=st.integers(0, 5), later=st.sampled_from([0.0, 3.0]))
    def ends(self, number, later):
        self.now += later
        self.tree.forget(self.programs[number], self.now)
        self.has.pop(self.programs[number], None)

    def beginnings(self, program):
        text = self.has[program][0]
        return [text[: i + 1] for i in range(len(text))]

    @invariant()
    def each_token_counts_once(self):
        active = {program for program, (*_, works) in self.has.items() if works}
        self.tree.check(active)
        assert len(self.tree) == len(self.has)
        everything = {text for program in self.has for text in self.beginnings(program)}
        in_use = {text for program in active for text in self.beginnings(program)}
        own = {program: more for program, (_, more, _) in self.has.items()}
        sums = self.tree.sums
        assert sums.active == pytest.approx(len(in_use) * SIZE + sum(own[p] for p in active))
        waiting = [p for p in self.has if p not in active]
        assert sums.waiting == pytest.approx(len(everything - in_use) * SIZE + sum(own[p] for p in waiting), abs=1e-6)
        faded = sums.faded(self.now) - sum(own[p] * 2 ** -((self.now - self.since[p]) / HALF_LIFE_S) for p in waiting)
        assert -1e-6 <= faded <= len(everything - in_use) * SIZE + 1e-6


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_is_shared_fades_from_when_it_was_last_used():
    tree, one, two = ContextTree(SIZE), Program(1, 0.0), Program(2, 0.0)
    tree.waits(one, blocks("aab"), 3 * SIZE + 1, 0.0)
    tree.works(two, blocks("aac"), 3 * SIZE + 1, HALF_LIFE_S)
    assert (tree.sums.active, tree.sums.waiting) == (3 * SIZE + 1, SIZE + 1)
    assert tree.sums.faded(HALF_LIFE_S) == pytest.approx((SIZE + 1) / 2)
    tree.waits(two, blocks("aac"), 3 * SIZE + 1, HALF_LIFE_S)
    assert tree.sums.faded(2 * HALF_LIFE_S) == pytest.approx((3 * SIZE + 1) / 2 + (SIZE + 1) / 4)
    tree.forget(two, 2 * HALF_LIFE_S)
    assert tree.sums.waiting == 3 * SIZE + 1
    assert tree.sums.faded(2 * HALF_LIFE_S) == pytest.approx(2 * SIZE / 2 + (SIZE + 1) / 4)
    tree.forget(one, 1e9)
    assert tree.sums.faded(1e9) == tree.sums.waiting == len(tree) == 0


def test_many_that_begin_alike_and_part_early_leave_no_runs_behind():
    """Else whoever comes and goes would make every later event of the others slower."""
    tree, stem = ContextTree(SIZE), Program(0, 0.0)
    tree.works(stem, blocks("a" * 200), 200 * SIZE + 1, 0.0)
    for i in range(200):
        twig = Program(1 + i, 0.0)
        tree.waits(twig, blocks("a" * i + "b"), i * SIZE + SIZE + 1, 0.0)
        tree.forget(twig, 0.0)
    tree.check({stem})
    assert tree.sums.active == 200 * SIZE + 1


@pytest.mark.parametrize("first", ["ab" * 500, "ab"])
def test_a_long_context_that_has_ended_is_not_kept_for_who_began_like_it(first):
    """Else a session that is compacted, or forked early, holds the hashes of everything that was said before."""
    tree, long, short = ContextTree(SIZE), Program(0, 0.0), Program(1, 0.0)
    hashes = blocks(first)
    tree.works(long, hashes, len(first) * SIZE + 1, 0.0)
    hashes += [b"more"] * 500  # as of a request that goes on
    tree.waits(short, blocks("ab"), 2 * SIZE + 1, 0.0)
    tree.forget(long, 0.0)
    assert [len(run.hashes) for run in tree._root.below.values()] == [2]


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["turn", "fork", "end"]), st.integers(0, 9)),
            st.tuples(st.just("begin"), st.integers(0, 20)),
        ),
        max_size=14,
    )
)
def test_live_tokens_are_those_of_distinct_pages(events):
    """Forks, turns and ends in any order, where memory is ample: the report is what the page tables say."""
    loop, salt = loop_of(pages=400, host=HostTier()), salted("")
    scheduler, texts = loop.scheduler, {}
    for made, (event, number) in enumerate(events):
        new = [made // 50, made % 50, 7, 7]  # nobody says the same by chance
        if event == "begin":
            texts[f"p{made}"] = goes_on(loop, f"p{made}", [*range(number), *new], salt)
        elif texts:
            name = sorted(texts)[number % len(texts)]
            if event == "turn" and len(texts[name]) < 34:
                texts[name] = goes_on(loop, name, [*texts[name], *new], salt)
            elif event == "fork":
                scheduler.branches.fork(name, f"p{made}", loop.now)
                texts[f"p{made}"] = texts[name]
            elif event == "end":
                scheduler.end_program(name, loop.now)
                del texts[name]
        programs = [scheduler._programs.find(name) for name in texts]
        full = {p: (tokens_of(p) - 1) // SIZE for p in programs}
        pages = {page for p, count in full.items() for page in p.pages[:count]}
        assert all(len(p.pages) >= count for p, count in full.items()), "memory was meant to be ample"
        own = sum(tokens_of(p) - count * SIZE for p, count in full.items())
        assert scheduler.report(loop.now).live == len(pages) * SIZE + own
        scheduler.check()


def goes_on(loop, name, prompt, salt):
    """Serve a turn whose context does not end with a page: the next token on that page is this program's alone."""
    prompt = prompt if (len(prompt) + 1) % SIZE else [*prompt, 3]
    return [*prompt, *serve(loop, name, prompt, salt=salt).output]


def tokens_of(program):
    """Tokens of a program's context; a fork has what was computed of its parent's, and goes on with a token more."""
    return program.last.num_tokens if program.last.program is program else program.computed + 1
