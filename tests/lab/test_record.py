"""Tests of how benchmarks record themselves: tables, the JSON line, the entry in the results, and git's state."""

from __future__ import annotations

import json
import subprocess

import pytest
from absl import flags
from rich.console import Console

from astraea_jax.lab import record
from astraea_jax.lab.record import HEADING, Environment, Section, command, publish, with_entry
from astraea_jax.lab.roofline import Roofline

ROOFLINE = Roofline(read_gb_s=10.0, copy_gb_s=12.5, matmul_tflop_s=0.25)
TABLE = Section("Steps", ("", "measured"), [("decode | alone", "1.5 ms"), ("  prefill", "20 ms")])


@pytest.fixture
def recording(monkeypatch, tmp_path):
    """A checkout of nothing but an empty RESULTS.md, and the flags of a benchmark there."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("# Results\n")
    record.define_flags("bench", values)
    return values


def git(folder, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_every_run_adds_one_line(recording, tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    recording(["bench", f"--json={path}", "--revision=r1"])
    console = Console(width=100, record=True)
    for n in (1, 2):
        publish("bench_step", [TABLE], {"decode_ms": n}, ROOFLINE, console=console)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["figures"], second["figures"]) == ({"decode_ms": 1}, {"decode_ms": 2})
    assert first["floors"] == {"read_gb_s": 10.0, "copy_gb_s": 12.5, "matmul_tflop_s": 0.25}
    assert first["revision"] == "r1"
    assert {"device", "platform", "jax", "jaxlib", "python", "date", "dirty", "command"} <= first.keys()
    said = console.export_text()
    assert "decode | alone" in said
    assert "read 10.0 GB/s" in said
    assert (tmp_path / "benchmarks" / "RESULTS.md").read_text() == "# Results\n"


def test_record_writes_the_tables_down(recording, tmp_path):
    recording(["bench", "--record", "--revision=r1"])
    for _ in range(2):
        publish("bench_step", [TABLE], {}, ROOFLINE, console=Console(quiet=True))
    assert len((tmp_path / "benchmarks" / "records" / "bench.jsonl").read_text().splitlines()) == 2
    text = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert text.count(HEADING) == 1
    assert text.count("### bench_step, ") == 2
    assert "| decode \\| alone | 1.5 ms |" in text
    assert "| --- | ---: |" in text


def test_what_is_no_checkout_has_nothing_to_record_in(recording, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path / "site-packages")
    values = flags.FlagValues()
    record.define_flags("bench", values)
    with pytest.raises(flags.IllegalFlagValueError, match="to write to"):
        values(["bench", "--record"])
    values(["bench", "--norecord"])
    assert values.json is None


def test_an_entry_goes_to_the_end_of_its_part():
    text = with_entry(f"# R\n\n{HEADING}\n\n### one\n\n## After\n\nlast\n", "### two")
    assert text == f"# R\n\n{HEADING}\n\n### one\n\n### two\n\n## After\n\nlast\n"
    assert with_entry("# R\n", "### one") == f"# R\n\n{HEADING}\n\n### one\n"


@pytest.mark.parametrize(
    "own", [["--json=/some/where"], ["--json", "/some/where"], ["--record"], ["--revision", "r1", "--norecord"]]
)
def test_the_command_repeats_the_run_but_for_where_it_was_written(recording, monkeypatch, own):
    flags.DEFINE_list("sizes", ["1"], "", flag_values=recording)
    flags.DEFINE_multi_string("trace", [], "", flag_values=recording)
    flags.DEFINE_bool("quick", False, "", short_name="q", flag_values=recording)
    flags.DEFINE_integer("seed", 0, "", flag_values=recording)
    argv = ["/here/scripts/bench.py", "--quick", "--sizes=1,2", "--trace=a b", *own, "--trace", "c"]
    monkeypatch.setattr("sys.argv", argv)
    recording(argv)
    assert command() == "python scripts/bench.py --sizes=1,2 '--trace=a b' --trace=c --quick"


def test_the_revision_of_a_checkout(recording, tmp_path):
    root = tmp_path.resolve()
    assert record._revision(root) == (None, False)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    name = git(root, "rev-parse", "HEAD").strip()[:12]
    (root / "benchmarks" / "RESULTS.md").write_text("measured\n")
    assert record._revision(root) == (name, False)
    (root / "new.py").touch()
    assert record._revision(root) == (name, True)
    installed = root / "site"
    installed.mkdir()
    assert record._revision(installed) == (None, False)


def test_the_environment_names_this_machine(recording):
    recording(["bench"])
    here = Environment.here()
    assert here.platform == "cpu"
    assert here.jax in str(here)
    assert here.revision == "unknown"
