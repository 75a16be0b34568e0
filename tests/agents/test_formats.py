"""A model's format is known by its chat template, its tokenizer's own specification, or its name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tokenizers
from support.call_writers import WRITERS

from astraea_jax.agents.formats import FOLDER, NAMES, SIGNS, choose, named
from astraea_jax.agents.reply import ReplyReader
from astraea_jax.agents.response_templates import ResponseParser, load_response_template
from astraea_jax.agents.tool_calls import read_turn
from astraea_jax.engine.call_syntax import SYNTAXES, WAYS
from astraea_jax.engine.lark_text import Thought
from astraea_jax.models import resolve
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.tokenizer import Tokenizer


def tokenizer(template: str | None, response_template: object = None) -> Tokenizer:
    """One that has only a chat template."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    return Tokenizer(
        inner, bos_id=None, eos_ids=frozenset(), template=template, special={}, response_template=response_template
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "json"),
        ("{{ messages[0].content }}", "json"),
        ('{{ \'<tool_call>\\n{"name": "\' }}', "hermes"),
        ("<tool_call>\n{{ '<function=' + call.name + '>' }}", "qwen3_coder"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ("{%- if m.content and '<|channel|>' in m.content %}{% endif %}", "harmony"),
        ("<|tool_call>call:{{ name }}", "gemma"),
        ("[TOOL_CALLS]{{ calls | tojson }}", "mistral"),
        ("<|start_header_id|>{{ role }}", "llama3_json"),
        ("<|header_start|>{{ '<|python_start|>' }}", "pythonic"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek"),
        ("{# <tool_call> #}none", "json"),
    ],
)
def test_a_chat_template_shows_the_format(template: str | None, name: str) -> None:
    assert choose(tokenizer(template)).name == name


def test_the_bundled_model() -> None:
    assert choose(Tokenizer.from_folder(resolve("astraea-tiny"))).name == "hermes"


def test_a_name_overrides_what_the_template_shows() -> None:
    assert choose(tokenizer("<tool_call>"), "mistral").name == "mistral"
    with pytest.raises(ValueError, match="no call format 'nous'; there are: deepseek, gemma"):
        choose(tokenizer(None), "nous")


OWN = {
    "start_anchor": "<bot>",
    "fields": {
        "reasoning_content": {"open": "<r>", "close": "</r>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<eot>"},
    },
}


def test_a_tokenizer_may_have_a_format_of_its_own() -> None:
    reader = ReplyReader(choose(tokenizer("<tool_call>", OWN)), "<user>Hi<bot><r>", [])
    reader.feed("Hm.</r>So:<call price>\nitem: lamp\n</call><call stock>x</call><eot>")
    reader.finish()
    reply = reader.reply
    assert (reply.thought, reply.text, reply.errors) == ("Hm.", "So:", [])
    assert [(call.name, call.arguments) for call in reply.calls] == [("price", {"item": "lamp"}), ("stock", {})]


def test_it_is_read_from_the_folder_of_the_model(tmp_path) -> None:
    for path in resolve("astraea-tiny").glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": OWN}))
    assert choose(Tokenizer.from_folder(tmp_path)).name == "response_template"


@pytest.mark.parametrize("damaged", [[], {"fields": {}}, {**OWN, "version": 2}, {**OWN, "start_anchor": 3}, "x"])
def test_a_damaged_format_is_named(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="response_template is damaged"):
        choose(tokenizer(None, damaged))


@pytest.mark.parametrize("name", sorted({*WRITERS} - {"deepseek_fenced", "pythonic_lines"}))  # are read more loosely
def test_files_are_specifications_that_transformers_reads(name: str) -> None:
    """Its parser, which needs whole turns without surprises, finds the same calls."""
    format, write = WRITERS[name]
    spec = json.loads((FOLDER / f"{format}.json").read_text(encoding="utf-8"))["response_template"]
    parser = ResponseParser(load_response_template(spec), prefix="")
    parser.feed(write("Hm.", "So:", [("price", {"item": "lamp"})]))
    message, _ = parser.finalize()
    assert "'price'" in str(message)
    assert message["thinking"] == "Hm."


def test_every_format_has_a_sign_and_every_sign_a_format() -> None:
    assert {name for _, name in SIGNS} | {"json"} == set(NAMES)
    assert all(named(name).name == name for name in NAMES)


def test_the_library_says_nothing_about_pytorch() -> None:
    code = "import astraea_jax.agents.reply, sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_of_a_format_are_read_as_such(name: str) -> None:
    format = named(name)
    assert format.thoughts
    for begin, end in format.thoughts:
        reader = ReplyReader(format, "", [])
        reader.feed(f"{begin}Hm.{end}{format.answer}So.")
        reader.finish()
        assert (reader.reply.thought, reader.reply.text) == ("Hm.", "So.")


@pytest.mark.parametrize(
    ("name", "prompt", "tokens", "thought"),
    [
        ("hermes", "<|im_start|>assistant\n", ["<think>"], Thought()),
        ("hermes", "<|im_start|>assistant\n", [], None),
        ("hermes", "<|im_start|>assistant\n<think>\n", [], Thought(opened=True)),
        ("hermes", "<|im_start|>assistant\n<think>\n\n</think>\n", ["<think>"], Thought()),
        ("hermes", "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", [], None),
        ("mistral", "[INST]Hi[/INST]", ["[THINK]", "[/THINK]"], Thought("[THINK]", "[/THINK]")),
        ("mistral", "[INST]Hi[/INST]", ["<think>"], Thought()),
        ("json", "<|assistant|><|begin_of_thought|>", [], Thought("<|begin_of_thought|>", "<|end_of_thought|>", True)),
        ("gemma", "<|turn>model\n", ["<|channel>"], Thought("<|channel>thought\n", "<channel|>")),
        (
            "harmony",
            "<|end|><|start|>assistant",
            ["<|channel|>", "<|end|>"],
            Thought("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        ),
    ],
)
def test_a_turn_may_begin_with_a_thought(name: str, prompt: str, tokens: list[str], thought: Thought | None) -> None:
    assert named(name).thought(prompt, tokens) == thought


def test_a_template_of_its_own_says_how_it_thinks() -> None:
    format = choose(tokenizer(None, OWN))
    assert format.thought("<user>Hi<bot><r>", []) == Thought("<r>", "</r>", opened=True)


def test_calls_have_the_ids_that_the_chat_template_takes() -> None:
    assert named("hermes").call_id(7) == "call_7"
    ids = [named("mistral").call_id(number) for number in range(20)]
    assert len(set(ids)) == 20
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    written = WRITERS["mistral"][1]("", "", [("price", {}), ("stock", {})])
    assert [call.id for call in read_turn(written, 3, format=named("mistral")).calls] == ids[3:5]


def test_calls_of_every_format_can_be_required() -> None:
    """Whoever adds a format adds a grammar for it, and the other way round."""
    ways = {way: format for format, _, way in WAYS}
    assert {ways.get(name, name) for name in SYNTAXES} == set(NAMES)
    assert set(NAMES) <= set(SYNTAXES)
    assert set(ways) <= set(SYNTAXES)


@pytest.mark.parametrize("name", sorted(SYNTAXES))
def test_calls_that_a_grammar_demands_are_read(name: str) -> None:
    """The shortest call of each syntax, put together by hand."""
    syntax = SYNTAXES[name]
    empty = "{}" if syntax.parameter is None else ""
    written = "".join([syntax.begin, syntax.before.replace("{name}", "stock"), empty, syntax.after, syntax.end])
    turn = read_turn(written, tools=["stock"], format=named({way: format for format, _, way in WAYS}.get(name, name)))
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == [("stock", {}, None)]
    assert turn.content == ""
