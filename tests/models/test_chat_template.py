"""Templates as models come with them: what they are given, and what they may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.reading import copy_tiny
from tokenizers import Tokenizer as Raw
from tokenizers import models

from astraea_jax.models.chat_template import FILE, LEGACY_FILE, NAMED_FILES
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.tokenizer import Tokenizer

TEXT = {"role": "user", "content": "What is 1+1?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 1+1?"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def rendered(template, messages, tools=None, **arguments):
    blank = Tokenizer(Raw(models.BPE()), bos_id=None, eos_ids=frozenset(), template=template, special={})
    return blank.render(messages, tools, **arguments)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}",  # Llama 3
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}",  # Qwen2.5
        # Qwen3
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% macro t(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p['text'] }}{% endfor %}{% endif %}"
        "{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ t(m.content) }}{% endfor %}",  # GLM
        "{{ raise_exception('user first') if messages[0].role != 'user' }}[user]{{ messages[0]['content'] }}",
    ],
)
@pytest.mark.parametrize("message", [TEXT, PARTS])
def test_content_is_given_as_the_template_reads_it(template, message):
    assert rendered(template, [message]) == "[user]What is 1+1?"


def test_results_of_tools_in_parts():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content | tojson }}{% endif %}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat = [TEXT, {"role": "assistant", "tool_calls": [call]}, {**PARTS, "role": "tool"}]
    assert rendered(template, chat) == '"What is 1+1?"'  # Llama 3.1 prints results as JSON


@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_no_content(content):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{{ m.content is defined }}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert rendered(template, [{"role": "assistant", **content, "tool_calls": [call]}]) == "[assistant]False"


def test_arguments_reach_the_template():
    template = "{{ enable_thinking }} {{ tools | length }} {{ levels.high }} {{ documents is none }}"
    arguments = {"enable_thinking": False, "levels": {"high": 3}}
    assert rendered(template, [TEXT], [TOOL], **arguments) == "False 1 3 True"
    with pytest.raises(TypeError, match="template arguments cannot hold object"):
        rendered(template, [TEXT], levels=object())


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("x | tojson", '{"b": "<é>", "a": [1]}'),
        ("x | tojson(ensure_ascii=true)", '{"b": "<\\u00e9>", "a": [1]}'),
        ("x | tojson(indent=1)", '{\n "b": "<é>",\n "a": [\n  1\n ]\n}'),
        ("x | tojson(separators=(',', ':'))", '{"b":"<é>","a":[1]}'),
        ("x | tojson(sort_keys=true)", '{"a": [1], "b": "<é>"}'),
        ("x | tojson(false, none, none, true)", '{"a": [1], "b": "<é>"}'),
    ],
)
def test_json_as_transformers_writes_it(expression, text):
    assert rendered(f"{{{{ {expression} }}}}", [TEXT], x={"b": "<é>", "a": [1]}) == text


@pytest.mark.parametrize(
    "failure", ["1 / 0", "x.y.z", "[][0].a", "messages | tojson(indent={})", "raise_exception('no')"]
)
def test_templates_fail_as_values(failure):
    with pytest.raises(ValueError, match="cannot render"):
        rendered(f"{{{{ {failure} }}}}", [TEXT])


def test_files_before_fields_before_the_legacy_file(tmp_path):
    folder = copy_tiny(tmp_path / "model")
    (folder / FILE).unlink()
    (folder / LEGACY_FILE).write_text(json.dumps({"chat_template": "legacy"}))
    assert Tokenizer.from_folder(folder).render([TEXT]) == "legacy"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "field"}))
    assert Tokenizer.from_folder(folder).render([TEXT]) == "field"
    (folder / NAMED_FILES).mkdir()
    (folder / NAMED_FILES / "tool_use.jinja").write_text("for tools")
    assert Tokenizer.from_folder(folder).render([TEXT], [TOOL]) == "for tools"
    with pytest.raises(CheckpointError, match="templates are tool_use; without tools"):
        Tokenizer.from_folder(folder).render([TEXT])
    (folder / FILE).write_text("file")
    assert Tokenizer.from_folder(folder).render([TEXT]) == "file"


ELSEWHERE = """
import sys
from pathlib import Path
from astraea_jax.models.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
text = tokenizer.render([{"role": "user", "content": "x"}])
sys.stdout.buffer.write(text.encode())
"""


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    folder = copy_tiny(tmp_path / "model")
    (folder / FILE).write_text("é {{ q_token }}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"q_token": "ü"}', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, folder],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    )
    assert done.stdout.decode() == "é ü"
    (folder / FILE).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_folder(folder)
