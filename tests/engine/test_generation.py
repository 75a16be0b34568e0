"""Stop strings: the text out is the whole text up to the first stop, however it arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.generation import Output
from astraea_jax.engine.sampling import SamplingParams


class Letters:
    """A text stream in which every token is one character."""

    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


def stream(text: str, stops: tuple[str, ...], eos: frozenset[int] = frozenset()) -> tuple[str, bool]:
    output = Output(Letters(), SamplingParams(stop=stops), eos)
    out = ""
    for letter in text:
        out += output.push(ord(letter))
        if output.stopped:
            break
    return out + output.flush(), output.stopped


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop(text, stops):
    # The stop that is complete first wins; of several complete at one letter, the one that starts first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert stream(text, tuple(stops)) == (expected, bool(ends))


def test_a_possible_beginning_of_a_stop_is_held_back():
    output = Output(Letters(), SamplingParams(stop=("END",)), frozenset())
    assert [output.push(ord(c)) for c in "xyEN"] == ["", "", "x", "y"]
    assert output.flush() == "EN"


def test_stop_tokens_make_no_text():
    assert stream("abz", (), frozenset([ord("z")])) == ("ab", False)
