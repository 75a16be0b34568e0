"""The tasks: solvable by their tools, split cleanly, and written so that a model's history is its own tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.agents.tool_calls import assistant_message, parse
from astraea_jax.agents.tools import tool
from astraea_jax.lab.shop import Catalogue, calculator, make_tasks, split_of
from astraea_jax.models import BUNDLED
from astraea_jax.models.tokenizer import Tokenizer

TASKS = make_tasks(seed=3, split="test", count=300)
TINY = Tokenizer.from_folder(BUNDLED / "astraea-tiny")


def test_the_same_seed_gives_the_same_tasks():
    again = make_tasks(seed=3, split="test", count=300)
    assert [task.solution() for task in again] == [task.solution() for task in TASKS]
    assert make_tasks(seed=4, split="test", count=300)[0].question != TASKS[0].question


def test_training_and_test_questions_are_disjoint():
    train = {task.question for task in make_tasks(seed=3, split="train", count=3000)}
    assert not train & {task.question for task in TASKS}
    assert {split_of(question) for question in train} == {"train"}


def test_programs_have_three_to_six_requests():
    assert {len(task.calls) + 1 for task in TASKS} == {3, 4, 5, 6}


def test_only_the_answer_is_right():
    for task in TASKS:
        assert task.is_right(task.reply)
        assert task.is_right(f"It is 7 or rather {task.answer}.")
        assert not task.is_right(f"{task.answer}0")
        assert not task.is_right("I do not know.")


def test_the_calculator_does_sums_and_nothing_else():
    assert calculator(" 3*14+2*(9-4) ") == 52
    assert calculator("-5*-2") == 10
    for bad in (
        "2**9",
        "1/2",
        "__import__('os')",
        "abs(1)",
        "1 if 1 else 2",
        "True",
        "",
        "(",
        "9" * 300,
        "1.5",
        "1\0",
        "\ud800",
    ):
        with pytest.raises(ValueError):
            calculator(bad)
    with pytest.raises(ValueError):
        calculator("(" * 199)


def test_prices_differ_from_task_to_task():
    assert len({Catalogue(seed).price(47) for seed in range(50)}) > 20
    with pytest.raises(ValueError, match="no article 100"):
        Catalogue(0).price(100)


def test_what_the_model_writes_is_what_it_reads_later():
    """Each prompt begins with the last one and its output, token for token: so the KV of a request serves the next."""
    for task in TASKS[:40]:
        schemas = [tool(function).schema() for function in task.tools()]
        solution = task.solution()
        before: list[int] = []
        for at, message in enumerate(solution):
            if message["role"] != "assistant":
                continue
            prompt = TINY.encode(TINY.render(solution[:at], schemas))
            assert prompt[: len(before)] == before
            whole = TINY.encode(TINY.render(solution[: at + 1], schemas, add_generation_prompt=False))
            output = whole[len(prompt) :]
            assert whole[: len(prompt)] == prompt
            before = whole[:-1]  # the line feed after the turn is not generated
            text = TINY.decode(output).strip()
            content, calls = parse(text)
            again = assistant_message(text, content, calls)
            assert TINY.render([again]) == TINY.render([message])


@given(st.text().filter(lambda text: "<|" not in text))  # how its control tokens begin, which are no text
def test_the_bundled_tokenizer_writes_anything(text: str):
    assert TINY.decode(TINY.encode(text)) == text


def test_the_bundled_tokenizer_keeps_markers_and_splits_numbers():
    assert TINY.decode(TINY.encode("<tool_call>{}</tool_call>")) == "<tool_call>{}</tool_call>"
    assert len(TINY.encode("123")) == 3
