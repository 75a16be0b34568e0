"""Every script tells what it does."""

from __future__ import annotations

import pytest
from support.forked import say
from support.scripts import ROOT, run

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py") if "absl" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_is_printed_and_no_failure(flag):
    status, said = say("scripts/convert_checkpoint.py", flag)
    assert status == 0
    assert said.startswith("Converts a checkpoint folder")
    assert "--source" in said


@pytest.mark.parametrize(
    "program", [["scripts/lock.py"], ["-m", "astraea_jax.lab.peer_engines"], ["-m", "astraea_jax.lab.torch_products"]]
)
def test_help_of_programs_without_absl(program):
    assert "show this help" in run(*program, "--help")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_begins_and_ends_in_the_shared_way(name):
    text = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    assert text.endswith('if __name__ == "__main__":\n    run_main(main)\n')


def test_a_wrong_flag_is_a_failure():
    status, _ = say("scripts/convert_checkpoint.py", "--no_such_flag")
    assert status == 1
