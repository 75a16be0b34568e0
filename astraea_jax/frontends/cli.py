"""The installed command, ``astraea-jax``: each of its subcommands is a module that has flags of its own."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

COMMANDS = {"serve": "serve a model over gRPC"}
"""Subcommand, which is a module beside this one with a function ``run``; and what it does."""


def main() -> None:
    """Run the subcommand that the command line names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        sys.stdout.write(f"astraea-jax {version('astraea-jax')}\n")
    elif name in COMMANDS:
        sys.argv = [f"astraea-jax {name}", *arguments]  # before the import: flags belong to the program of this name
        importlib.import_module(f"astraea_jax.frontends.{name}").run()
    else:
        lines = [f"  astraea-jax {command:10}{what}; --help lists its flags" for command, what in COMMANDS.items()]
        text = "\n".join(["usage:", *lines, "  astraea-jax --version", ""])
        if name not in ("--help", "-h", "help"):
            raise SystemExit(f"astraea-jax has no command {name!r}\n{text}")
        sys.stdout.write(text)
