"""The offload benchmark at its smallest size."""

from __future__ import annotations

from support.scripts import run


def test_the_offload_benchmark_compares_with_plain_copies(tmp_path):
    picture = tmp_path / "offload.png"
    sizes = ("--lengths=64,128", "--batch=4", "--context=16", "--steps=8", "--repeats=1", "--chunk=64")
    out = run("scripts/bench_offload.py", *sizes, f"--plot={picture}", "--json=")
    for word in ("offload", "restore", "while KV moves", "from the host", "computed again"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
