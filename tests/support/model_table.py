"""The table of models in README.md, made from the tests: `PYTHONPATH=tests python tests/support/model_table.py` writes it.

A backend serves a family in a form if tests mark it with every feature that published models of the family, and the
form, need (:mod:`support.table`). What is compared with transformers is in :mod:`support.variants`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from support.table import BACKENDS, HOWS, cells
from support.variants import VARIANTS

from astraea_jax.models.config import ModelConfig
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.published_fields import FIELDS

DOCUMENT = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by tests/support/model_table.py -->\n", "<!-- end -->\n"

NAMES = {
    "LlamaForCausalLM": "Llama 3.x",
    "Qwen2ForCausalLM": "Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3-MoE, Qwen3-Coder",
    "GptOssForCausalLM": "gpt-oss",
    "Glm4MoeForCausalLM": "GLM-4.5, 4.6, 4.7, Air",
    "MistralForCausalLM": "Mistral, Ministral",
    "MinistralForCausalLM": "Mistral, Ministral",
    "Mistral3ForConditionalGeneration": "Mistral, Ministral",
    "Ministral3ForCausalLM": "Ministral 3, Devstral 2",
    "Phi3ForCausalLM": "Phi-3, Phi-4, Phi-4-mini",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3",
    "Gemma3ForConditionalGeneration": "Gemma 3",
}
"""Class in transformers -> row. Classes that see pictures, too, are served for text."""
ONLY_EXPERTS = {"MXFP4 weights"}
FORMS: dict[str, set[str]] = {
    "16 and 32 bits": set(),
    "int8": {"int8 and fp8 weights"},
    "fp8": {"fp8 weights"},
    "int4": {"int4 weights"},
    "MXFP4": ONLY_EXPERTS,
}
"""Forms of weights -> features that a backend must have to serve them; only experts are published in MXFP4."""
BASE = "prefill and decode in one step"


def needs(model: ModelConfig) -> set[str]:
    """Features that a backend must have to serve a model."""
    switches = {
        "windows": model.sliding,
        "sinks": model.sinks,
        "score caps": model.score_cap,
        "experts": model.experts,
        "norms of heads in float32": model.float32_norms and model.qk_norm,
    }
    return {BASE, *(feature for feature, there in switches.items() if there)}


def model_table() -> str:
    """In Markdown: families by form of their weights, and in every cell what is shown for each backend."""
    marked = cells()
    wanted: defaultdict[str, set[str]] = defaultdict(lambda: {BASE})
    for name, fields in FIELDS.items():
        wanted[NAMES[fields["architectures"][0]]] |= needs(PUBLISHED[name])
    compared: defaultdict[str, list[str]] = defaultdict(list)
    for variant in VARIANTS:
        compared[NAMES[variant.family]].append(variant.dtype)
    lines = [
        f"| | compared with transformers | {' | '.join(FORMS)} |",
        f"|---|---|{'---|' * len(FORMS)}",
    ]
    for row in dict.fromkeys(NAMES.values()):
        dtypes = ", ".join(sorted(set(compared[row])))
        forms = [_shown(marked, wanted[row], form) for form in FORMS.values()]
        lines.append(f"| {row} | {len(compared[row])}: {dtypes} | {' | '.join(forms)} |")
    return "\n".join(lines) + "\n"


def _shown(marked: dict[str, dict[str, set[str]]], family: set[str], form: set[str]) -> str:
    """For each backend the first letter of the best that shows all features of a family and a form of weights."""
    if form == ONLY_EXPERTS and "experts" not in family:
        return ""
    hows = [set.intersection(*(marked[feature][backend] for feature in family | form)) for backend in BACKENDS]
    return " · ".join(next((how[0] for how in reversed(HOWS) if how in found), "–") for found in hows)


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + model_table() + END + rest.split(END, 1)[1])
