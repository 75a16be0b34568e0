"""Chat templates and tokenizers of many kinds, in our own words, and conversations as clients send them back."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from support.reading import TINY, spaced
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from astraea_jax.models.tokenizer import Tokenizer

Message = dict[str, Any]

CONTROL = ("<|im_start|>", "<|im_end|>", "<|eot|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "[INST]")
MORE_CONTROL = ("[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>", "<|role|>", "<|/role|>")


@dataclass(frozen=True)
class Template:
    """A chat template, and how its text is read."""

    name: str
    text: str
    stop: str
    turn: str
    """Pattern of an assistant's turn, up to its stop text; what stands before it is its first group."""
    drops: bool = False
    """Whether thoughts go when a new job begins."""

    def turns(self, rendered: str) -> list[tuple[int, int]]:
        """Where the assistant's turns begin and end."""
        return [(found.end(1), found.end()) for found in re.finditer(self.turn, rendered, re.DOTALL)]

    def around(self, rendered: str, count: int) -> list[str]:
        """The text before, between and after the first ``count`` turns."""
        at, texts = 0, []
        for begin, end in self.turns(rendered)[:count]:
            texts.append(rendered[at:begin])
            at = end
        return [*texts, rendered[at:]]


CALLS = (
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' }}{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}{{ '</tool_call>' }}{%- endfor -%}"
)
TOOLS = "{%- if tools -%}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{%- endif -%}"
LAST_USER = (
    "{%- set seen = namespace(user=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set seen.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
THOUGHTS = "{{ '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' }}"


def _chatml(before: str, thoughts: str, after: str) -> str:
    return (
        f"{before}{TOOLS}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\n' }}"
        f"{thoughts}"
        "{{ (m.content or '') | trim }}"
        f"{CALLS}"
        "{{ '<|im_end|>\n' }}{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
        f"{after}"
        "{%- endif -%}"
    )


CHATML_TURN = r"(<\|im_end\|>\n|^)<\|im_start\|>assistant\n.*?<\|im_end\|>"
DROPS = Template(
    "drops",
    _chatml(
        LAST_USER,
        "{%- if loop.index0 > seen.user and (loop.last or m.reasoning_content) -%}" + THOUGHTS + "{%- endif -%}",
        "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}",
    ),
    "<|im_end|>",
    CHATML_TURN,
    drops=True,
)
KEEPS = Template(
    "keeps",
    _chatml("", "{%- if m.reasoning_content -%}" + THOUGHTS + "{%- endif -%}", ""),
    "<|im_end|>",
    CHATML_TURN,
)
OPENS = Template("opens", _chatml("", THOUGHTS, "{{ '<think>\n' }}"), "<|im_end|>", CHATML_TURN)
"""The generation prompt opens a thought."""
DATED = Template(
    "dated",
    "{{ '<|role|>system<|/role|>\n\nToday is ' + (date or '1 May') + '.\n' }}"
    "{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- if tools -%}{{ '\n' + (tools | tojson) }}{%- endif -%}{{ '<|eot|>' }}"
    "{%- for m in messages -%}{{ '<|role|>' + m.role + '<|/role|>\n\n' }}{{ (m.content or '') | trim }}"
    "{%- for c in m.tool_calls or [] -%}{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}"
    "{%- endfor -%}{{ '<|eot|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|role|>assistant<|/role|>\n\n' }}{%- endif -%}",
    "<|eot|>",
    r"(<\|eot\|>)<\|role\|>assistant<\|/role\|>.*?<\|eot\|>",
)
IDS = Template(
    "ids",
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- if m.tool_calls -%}{{ '[TOOL_CALLS][' }}"
    "{%- for c in m.tool_calls -%}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{%- endfor -%}{{ ']' }}{%- endif -%}{{ ' ' + (m.content or '') + '</s>' }}"
    "{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]{\"id\": ' + (m.tool_call_id | tojson) + ', \"content\": ' }}"
    "{{ m.content | tojson + '}[/TOOL_RESULTS]' }}{%- else -%}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif -%}"
    "{%- endfor -%}",
    "</s>",
    r"(\[/INST\]|\[/TOOL_RESULTS\])(?!\[INST\]|\[TOOL_RESULTS\]|$).*?</s>",
)
TEMPLATES = (DROPS, KEEPS, OPENS, DATED, IDS)

TEXTS = (
    'How much is it? It is 14. The lamp\n\n costs { "item": "lamp" } more.\nassistant\nuser\nsystem tool',
    '{"name": "price", "arguments": {"item": "lamp", "n": 2}}}}\n\n  \n]]}}"}',
)


def _with_control(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in (*CONTROL[:3], *MORE_CONTROL, CONTROL[-1])])
    raw.add_tokens([AddedToken(text, normalized=False) for text in CONTROL[3:7]])
    return raw


def byte_level(*, regex: bool) -> tokenizers.Tokenizer:
    """Byte-level BPE; without ``regex`` it merges across words, lines and brackets."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 4, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return _with_control(raw)


def sentences(prepend: str) -> tokenizers.Tokenizer:
    """Of SentencePiece's kind, with byte fallback and a space before a text."""
    return _with_control(tokenizers.Tokenizer.from_str(json.dumps(spaced(prepend))))


def bundled() -> tokenizers.Tokenizer:
    """The tokenizer of the bundled model."""
    return _with_control(tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")))


TOKENIZERS: Mapping[str, Callable[[], tokenizers.Tokenizer]] = {
    "words": lambda: byte_level(regex=True),
    "across": lambda: byte_level(regex=False),
    "first": lambda: sentences("first"),
    "always": lambda: sentences("always"),
    "normalizer": lambda: sentences("normalizer"),
    "bundled": bundled,
}


def tokenizer(kind: str, template: Template) -> Tokenizer:
    """A tokenizer of a kind, whose chats look as ``template`` says."""
    raw = TOKENIZERS[kind]()
    stops = frozenset({raw.token_to_id(template.stop), raw.token_to_id("<|im_end|>")})
    return Tokenizer(raw, bos_id=None, eos_ids=stops, template=template.text, special={})


@dataclass
class Client:
    """A client that changes what it sends back in all the ways that change nothing."""

    random: random.Random
    messages: list[Message] = field(default_factory=list)

    def send(self) -> list[Message]:
        """The history as it goes over the wire this time."""
        return [self._changed(message) for message in self.messages]

    def _changed(self, message: Message) -> Message:
        if message["role"] == "system":
            return {**message, "content": self._with_header(message["content"])}
        if message["role"] != "assistant":
            return message if self.random.random() < 0.5 else {**message, "content": self._parts(message["content"])}
        changed: Message = {"role": "assistant", "content": message["content"].strip() or None}
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [self._printed(call) for call in calls]
        if message.get("reasoning_content") and self.random.random() < 0.5:
            name = self.random.choice(["reasoning", "reasoning_content"])
            changed[name] = message["reasoning_content"]
        return changed

    def _with_header(self, text: str) -> str:
        return f"x-anthropic-billing-header: cc_version=2.1; cch={self.random.randrange(16**5):05x};\n{text}"

    def _parts(self, text: str) -> list[Message]:
        at = self.random.randrange(len(text) + 1)
        return [{"type": "text", "text": part} for part in (text[:at], text[at:])]

    def _printed(self, call: Message) -> Message:
        arguments = call["function"]["arguments"]
        keys = self.random.sample(list(arguments), len(arguments))
        separators = self.random.choice([(",", ":"), (", ", ": "), (" , ", " :  ")])
        printed = json.dumps({key: arguments[key] for key in keys}, separators=separators)
        return {**call, "function": {"name": call["function"]["name"], "arguments": printed}}


def generated(tokenizer: Tokenizer, text: str, stop: str, cuts: Sequence[int]) -> list[int]:
    """Tokens that a model may have generated for ``text``: divided anywhere, and its stop token."""
    ids: list[int] = []
    at = 0
    for cut in [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]:
        ids += tokenizer.encode_after(text[at:cut])
        at = cut
    return ids + tokenizer.encode_after(stop)
