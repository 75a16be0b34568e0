"""The installed command: its subcommands, and what it says to those who mistype."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from astraea_jax import __version__
from astraea_jax.frontends.cli import COMMANDS


def say(*arguments: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("astraea-jax")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_version_and_usage():
    assert say("--version") == (0, f"astraea-jax {__version__}\n")
    status, said = say()
    assert status == 0
    assert all(f"astraea-jax {command}" in said for command in COMMANDS)


def test_an_unknown_command_gets_the_usage():
    status, said = say("sevre")
    assert status == 1
    assert "has no command 'sevre'" in said
    assert "astraea-jax serve" in said


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
