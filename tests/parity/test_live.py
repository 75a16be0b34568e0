"""The same questions put to the transformers that is installed, on checkpoints it writes now: `make parity`."""

from __future__ import annotations

import json

import pytest
from support.parity import check_logits, check_tokens
from support.variants import VARIANTS, write

from astraea_jax.models.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to turn into errors
]


IN_AN_ENGINE = (
    *("qwen2-window", "mistral-window", "phi3-short", "gemma2-caps", "qwen3moe-dense-layers-bf16", "gptoss-bf16"),
    "glm4moe-groups",
)
"""Variants without a golden that an engine serves, too; it takes longer than all else."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
async def test_fresh_checkpoints(variant, tmp_path):
    write(variant, tmp_path, seed=17)
    check_logits(tmp_path)
    if variant.name in IN_AN_ENGINE:
        await check_tokens(tmp_path)


CHATS = [
    [{"role": "user", "content": "Hello <b>you</b> & é\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ],
    [
        {"role": "user", "content": "price?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "price", "arguments": {"item": "lämp"}}}],
        },
        {"role": "tool", "name": "price", "content": "14"},
    ],
]
TEMPLATES = {
    "qwen": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}"
        "{% for m in messages %}\n{%- if loop.first and m.role != 'system' %}{{ 'system default\\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>\\n' }}{{ c.function | tojson }}{{ '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama": (
        "{{- bos_token }}\n{%- set ns = namespace(n=0) %}\n{%- for m in messages %}\n    {%- set ns.n = ns.n + 1 %}\n"
        "    {%- if m.role == 'unknown' %}{{ raise_exception('no') }}{% endif %}\n"
        "    {{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + eos_token }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant' + ns.n | string }}\n{%- endif %}\n"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["plain", "system", "tools"])
def test_chat_templates_render_alike(template, chat, random_folder, tmp_path):
    import transformers

    (tmp_path / "tokenizer.json").write_bytes((random_folder / "tokenizer.json").read_bytes())
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATES[template]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "price", "description": "<é>", "parameters": {"type": "object"}}}
    for tools in (None, [tool]):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)
            ours = Tokenizer.from_folder(tmp_path).render(chat, tools, add_generation_prompt=prompt)
            assert ours == expected
