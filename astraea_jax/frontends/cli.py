"""The installed command, ``astraea-jax``: each of its subcommands is a module that has flags of its own."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

COMMANDS = {
    "serve": ("astraea_jax.frontends.serve", "serve a model"),
    "convert": ("astraea_jax.frontends.convert", "convert a checkpoint between Hugging Face and Orbax, or to 8 bits"),
    "bench attention": ("astraea_jax.lab.bench_attention", "measure attention kernels"),
    "bench continuity": ("astraea_jax.lab.bench_continuity", "measure what turns reuse, and what that costs"),
    "bench doors": ("astraea_jax.lab.bench_doors", "measure what the front doors cost, and constrained decoding"),
    "bench jct": ("astraea_jax.lab.bench_jct", "study job completion times under policies, simulated"),
    "bench offload": ("astraea_jax.lab.bench_offload", "measure the moving of KV against computing it again"),
    "bench scheduler": ("astraea_jax.lab.bench_scheduler", "measure what plans cost"),
    "bench serving": ("astraea_jax.lab.bench_serving", "measure throughput and latency of an engine"),
    "bench step": ("astraea_jax.lab.bench_step", "measure steps, beside the roofline"),
}
"""Subcommand -> its module, which has a function ``run``; and what it does."""


def main() -> None:
    """Run the subcommand that the command line names."""
    words = sys.argv[1:] or ["--help"]
    name = next((" ".join(words[:n]) for n in (1, 2) if " ".join(words[:n]) in COMMANDS), None)
    if words[0] == "--version":
        sys.stdout.write(f"astraea-jax {version('astraea-jax')}\n")
    elif name is not None:
        module, _ = COMMANDS[name]
        arguments = words[len(name.split()) :]
        sys.argv = [f"astraea-jax {name}", *arguments]  # before the import: flags belong to the program of this name
        importlib.import_module(module).run()
    else:
        lines = [f"  astraea-jax {command:17}{what}" for command, (_, what) in COMMANDS.items()]
        text = "\n".join(["usage, with --help for a command's flags:", *lines, "  astraea-jax --version", ""])
        if words[-1] not in ("--help", "-h", "help", "bench"):
            raise SystemExit(f"astraea-jax has no command {' '.join(words[:2])!r}\n{text}")
        sys.stdout.write(text)
