"""Turns as models of each call format write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = tuple[str, Mapping[str, Any]]
Writer = Callable[[str, str, Sequence[Call]], str]
"""Of a thought, a text and calls; each may be empty."""


def dumped(value: Any) -> str:
    """JSON as templates print it."""
    return json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> str:
    """A value in a tag: strings as they are."""
    return value if isinstance(value, str) else dumped(value)


def tagged(calls: Sequence[Call], begin: str, end: str, arguments: str = "arguments") -> str:
    """Calls as objects of JSON, each in tags."""
    return "\n".join(f"{begin}{dumped({'name': name, arguments: dict(given)})}{end}" for name, given in calls)


def hermes(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Qwen3 does."""
    return think(thought) + text + tagged(calls, "<tool_call>\n", "\n</tool_call>")


def think(thought: str) -> str:
    """A thought in the usual tags."""
    return f"<think>\n{thought}\n</think>\n\n" if thought else ""


def llama3_json(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Llama 3 does, without any tag if there is no text."""
    bodies = "; ".join(dumped({"name": name, "parameters": dict(given)}) for name, given in calls)
    return think(thought) + text + ("<|python_tag|>" if text and calls else "") + bodies


def mistral(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Mistral's models of 2024 do."""
    bodies = [{"name": name, "arguments": dict(given)} for name, given in calls]
    return (
        f"[THINK]{thought}[/THINK]{text}" * bool(thought)
        + text * (not thought)
        + f"[TOOL_CALLS]{dumped(bodies)}" * bool(calls)
    )


def mistral_named(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Mistral's models of 2025 do."""
    named = "".join(f"[TOOL_CALLS]{name}[ARGS]{dumped(dict(given))}" for name, given in calls)
    return f"[THINK]{thought}[/THINK]" * bool(thought) + text + named


def pythonic(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Llama 4 does."""
    body = ", ".join(f"{name}({python_arguments(given)})" for name, given in calls)
    return think(thought) + text + (f"<|python_start|>[{body}]<|python_end|>" if calls else "")


def pythonic_lines(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Olmo 3 does."""
    body = "\n".join(f"{name}({python_arguments(given)})" for name, given in calls)
    return think(thought) + text + (f"<function_calls>\n{body}\n</function_calls>" if calls else "")


def python_arguments(given: Mapping[str, Any]) -> str:
    """Keyword arguments."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in given.items())


def qwen3_coder(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Qwen3-Coder does."""

    def one(name: str, given: Mapping[str, Any]) -> str:
        tags = "".join(f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in given.items())
        return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"

    return think(thought) + text + "\n".join(one(*call) for call in calls)


def glm(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as GLM 4.5 does."""

    def one(name: str, given: Mapping[str, Any]) -> str:
        tags = (f"<arg_key>{key}</arg_key>\n<arg_value>{as_text(value)}</arg_value>\n" for key, value in given.items())
        return f"<tool_call>{name}\n{''.join(tags)}</tool_call>"

    return think(thought) + text + "\n".join(one(*call) for call in calls)


def gemma(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as Gemma 4 does."""

    def value(of: Any) -> str:
        if isinstance(of, str):
            return f'<|"|>{of}<|"|>'
        if isinstance(of, Mapping):
            return "{" + ",".join(f"{key}:{value(item)}" for key, item in of.items()) + "}"
        return f"[{','.join(map(value, of))}]" if isinstance(of, list) else dumped(of)

    thoughts = f"<|channel>thought\n{thought}\n<channel|>" if thought else ""
    return thoughts + text + "".join(f"<|tool_call>call:{name}{value(given)}<tool_call|>" for name, given in calls)


def harmony(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as gpt-oss does; the last token of the turn is no text."""
    channel = "commentary" if calls else "final"
    said = [f"<|channel|>analysis<|message|>{thought}"] if thought else []
    said += [f"<|channel|>{channel}<|message|>{text}"] if text else []
    said += [
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumped(dict(given))}"
        for name, given in calls
    ]
    return "<|end|><|start|>assistant".join(said)


def deepseek(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as DeepSeek V3.1 does."""
    bodies = (
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumped(dict(given))}<｜tool▁call▁end｜>" for name, given in calls
    )
    block = f"<｜tool▁calls▁begin｜>{''.join(bodies)}<｜tool▁calls▁end｜>"
    return think(thought) + text + block * bool(calls)


def deepseek_fenced(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as DeepSeek V3 and R1 do."""
    bodies = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumped(dict(given))}\n```<｜tool▁call▁end｜>"
        for name, given in calls
    )
    return think(thought) + text + f"<｜tool▁calls▁begin｜>{bodies}<｜tool▁calls▁end｜>" * bool(calls)


def deepseek_dsml(thought: str, text: str, calls: Sequence[Call]) -> str:
    """Write as DeepSeek V3.2 does."""

    def parameter(key: str, value: Any) -> str:
        string = str(isinstance(value, str)).lower()
        return f'<｜DSML｜parameter name="{key}" string="{string}">{as_text(value)}</｜DSML｜parameter>\n'

    bodies = "".join(
        f'<｜DSML｜invoke name="{name}">\n{"".join(parameter(*pair) for pair in given.items())}</｜DSML｜invoke>\n'
        for name, given in calls
    )
    return think(thought) + text + f"<｜DSML｜function_calls>\n{bodies}</｜DSML｜function_calls>" * bool(calls)


WRITERS: dict[str, tuple[str, Writer]] = {
    "json": ("json", hermes),
    "hermes": ("hermes", hermes),
    "llama3_json": ("llama3_json", llama3_json),
    "mistral": ("mistral", mistral),
    "mistral_named": ("mistral", mistral_named),
    "pythonic": ("pythonic", pythonic),
    "pythonic_lines": ("pythonic", pythonic_lines),
    "qwen3_coder": ("qwen3_coder", qwen3_coder),
    "glm": ("glm", glm),
    "gemma": ("gemma", gemma),
    "harmony": ("harmony", harmony),
    "deepseek": ("deepseek", deepseek),
    "deepseek_fenced": ("deepseek", deepseek_fenced),
    "deepseek_dsml": ("deepseek", deepseek_dsml),
}
"""Name of a way to write -> the format that reads it, and the way."""
