"""The table in docs/hardware.md, made from the tests that say so: `python tests/support/table.py` writes it.

A test says it with ``@pytest.mark.serves(backend, how, *features)``. Marks are read from the source, since what can be
collected depends on what is installed.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- made by tests/support/table.py -->\n", "<!-- end -->\n"
BACKENDS = {
    "native": "`native` (CPU)",
    "reference": "`reference` (any device)",
    "triton": "`triton` (NVIDIA)",
    "pallas": "`pallas` (TPU, ours)",
}
HOWS = ("tested", "interpreted", "compiled", "run")
"""Run as it is in `make test`; its own code run by an interpreter; compiled for the device; a test ran on one."""


def marks(source: str) -> list[tuple[str, ...]]:
    """(backend, how, features …) of every test function of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.serves":
                    found.append(tuple(ast.literal_eval(argument) for argument in mark.args))
    return found


def cells() -> defaultdict[str, defaultdict[str, set[str]]]:
    """Feature -> backend -> how tests show it; features in the order in which the tests name them."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(TESTS.rglob("test_*.py"), key=lambda path: (path.parent.name != "engine", path)):
        for backend, how, *features in marks(path.read_text()):
            if backend not in BACKENDS or how not in HOWS:
                raise ValueError(f"{path.name} marks {backend!r}, {how!r}")
            for feature in features:
                found[feature][backend].add(how)
    return found


def table() -> str:
    """In Markdown."""
    lines = [f"| | {' | '.join(BACKENDS.values())} |", f"|---|{'---|' * len(BACKENDS)}"]
    for feature, row in cells().items():
        shown = [", ".join(how for how in HOWS if how in row[backend]) for backend in BACKENDS]
        lines.append(f"| {feature} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def split(readme: str) -> tuple[str, str, str]:
    """The text before the table, the table, and the text after."""
    before, _, rest = readme.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = split(DOCUMENT.read_text())
    DOCUMENT.write_text(f"{before}{BEGIN}{table()}{END}{after}")
