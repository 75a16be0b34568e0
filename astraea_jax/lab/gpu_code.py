"""What a compiled step does on a GPU besides computing: its launches, its branches, and the registers of its kernels.

A launch takes a few microseconds of the host, or about one of the GPU where XLA records all of them as a command buffer
(a CUDA graph), which a branch or a loop on the device prevents. A kernel that spills registers works in slow memory.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAUNCHES = {"decode": (12.5, 20), "mixed": (14.5, 20), "offload": (0, 1), "restore": (1, 0)}
"""Kind of executable -> launches that a layer may have, and those around the layers. A step has four products a layer,
of which three are split and summed; two norms, one activation; attention's two or four kernels; and a sum of residuals
now and then, as XLA sees fit."""
MIXED = {"decode": 7, "mixed": 16}
"""Kind of step -> launches more of a layer with a mixture: the router's product, scores and choice; dispatch, which XLA
does for many tokens; the sum of what experts return, and biases."""
FREE = ("parameter", "constant", "get-tuple-element", "bitcast", "tuple", "copy-done", "partition-id")
"""Opcodes that launch nothing; an asynchronous copy counts where it starts."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as the assembler of the GPU sees it."""

    name: str
    registers: int
    """Registers of each thread."""
    spilled: int
    """Bytes of each thread that do not fit into them, stored and loaded again."""


def launches(program: str) -> int:
    """Count the launches of an optimised HLO text whose layers are unrolled."""
    (entry,) = re.findall(r"^ENTRY [^\n]*{\n(.*?)^}", program, re.M | re.S)
    opcodes = re.findall(r"^ *(?:ROOT )?%?\S+ = .*? ([a-z][a-z-]*)\(", entry, re.M)
    return sum(opcode not in FREE for opcode in opcodes)


def most_launches(kind: str, layers: int, mixed: bool) -> int:
    """Most launches of this ``kind``, of :data:`LAUNCHES`, on one GPU, with or without mixtures of experts.

    Matrices of a model without mixtures are not quantized.
    """
    of_layer, around = LAUNCHES[kind]
    return int((of_layer + (MIXED.get(kind, 0) if mixed else 0)) * layers + around)


def branches(program: str) -> list[str]:
    """Opcodes in an optimised HLO text that keep a step from being one command buffer."""
    return sorted(set(re.findall(r" (while|conditional)\(", program)))


def assembled(folder: Path, capability: int) -> Iterator[Kernel]:
    """Assemble the PTX files in ``folder``, where jax-triton keeps them by ``JAX_TRITON_DUMP_DIR``, and remove them."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    for file in sorted(folder.glob("*/*.ptx")):
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(file), "--output-file=/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        registers = re.findall(r"Used (\d+) registers", said)
        spilled = re.findall(r"(\d+) bytes spill", said)
        yield Kernel(file.stem, max(map(int, registers)), sum(map(int, spilled)))
        file.unlink()
