"""The installed command, ``astraea-jax``: each of its subcommands is a module that has flags of its own."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

COMMANDS = {
    "serve": ("astraea_jax.frontends.serve", "serve a model"),
    "convert": ("astraea_jax.frontends.convert", "convert a checkpoint between Hugging Face and Orbax, or to 8 bits"),
}
"""Subcommand -> its module, which has a function ``run``; and what it does."""


def main() -> None:
    """Run the subcommand that the command line names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        sys.stdout.write(f"astraea-jax {version('astraea-jax')}\n")
    elif name in COMMANDS:
        module, _ = COMMANDS[name]
        sys.argv = [f"astraea-jax {name}", *arguments]  # before the import: flags belong to the program of this name
        importlib.import_module(module).run()
    else:
        lines = [f"  astraea-jax {command:10}{what}; --help lists its flags" for command, (_, what) in COMMANDS.items()]
        text = "\n".join(["usage:", *lines, "  astraea-jax --version", ""])
        if name not in ("--help", "-h", "help"):
            raise SystemExit(f"astraea-jax has no command {name!r}\n{text}")
        sys.stdout.write(text)
