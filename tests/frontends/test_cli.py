"""The installed command: its subcommands, and what it says to those who mistype."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import forked

from astraea_jax import __version__
from astraea_jax.frontends.cli import COMMANDS

COMMAND = str(Path(sys.executable).with_name("astraea-jax"))


def say(*arguments: str) -> tuple[int, str]:
    return forked.say(COMMAND, *arguments)


def test_the_version():
    assert subprocess.check_output([COMMAND, "--version"], text=True) == f"astraea-jax {__version__}\n"


def test_the_usage():
    status, said = say()
    assert status == 0
    assert all(f"astraea-jax {command}" in said for command in COMMANDS)


@pytest.mark.parametrize("words", [["sevre"], ["bench", "stpe"]])
def test_an_unknown_command_gets_the_usage(words):
    status, said = say(*words)
    assert status == 1
    assert f"has no command {' '.join(words)!r}" in said
    assert "astraea-jax serve" in said


def test_a_command_says_what_its_flags_are():
    status, said = say("bench", "scheduler", "--help")
    assert status == 0
    assert said.lstrip().startswith("Measures")
    assert "--policies" in said


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_every_command_has_a_module_that_runs(module):
    assert "\ndef run() -> None:\n" in Path(find_spec(module).origin).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder", "out"], "cannot convert: '/no/such/folder' is neither a folder"),
        (["one"], "two folders are needed"),
        (["one", "two", "--source=three"], "two folders are needed"),
    ],
)
def test_what_cannot_be_converted_gets_one_line(arguments, words):
    status, said = say("convert", *arguments)
    assert status == 1
    assert words in said
    assert "Traceback" not in said
