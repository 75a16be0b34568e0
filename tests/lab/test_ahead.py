"""The gates of programs compiled ahead, on lines as the compiler writes them."""

from __future__ import annotations

from collections import Counter

import pytest

from astraea_jax.lab.ahead import collectives, moved, wrong_collectives

PROGRAM = """HloModule jit__run, is_scheduled=true

%fused_computation.5 (param_0.395: bf16[4096,8,6,128]) -> bf16[4096,8,6,128] {
  %param_0.395 = bf16[4096,8,6,128]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.103 = bf16[4096,8,6,128]{3,0,2,1:T(8,128)(2,1)} copy(%param_0.395), sharding={replicated}
}

ENTRY %main.7 (pages.1: bf16[9,2,8,16,128]) -> (bf16[9,2,8,16,128], bf16[8,4096]) {
  %pages.1 = bf16[9,2,8,16,128]{4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %fusion.5 = bf16[8,4096]{1,0:T(8,128)(2,1)} fusion(%leaves_2_.1), kind=kOutput, calls=%fused_computation.5
  %copy-start = (bf16[4096,8,6,128]{3,1,2,0:T(8,128)(2,1)S(1)}, bf16[4096,8,6,128]{3,1,2,0}, u32[]) copy-start(%w)
  %copy.9 = s32[8]{0:T(128)} copy(%small)
  POOL
  %all-reduce.1 = bf16[8,4096]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.5), channel_id=3, to_apply=%add.2.clone
  %ag = (bf16[2,4096]{1,0}, bf16[8,4096]{1,0}) all-gather-start(%fusion.5), channel_id=4
  ROOT %tuple = (bf16[9,2,8,16,128]{4,3,2,1,0}, bf16[8,4096]{1,0}) tuple(%pages.1, %all-reduce.1)
}
"""
WEIGHT, LAYER = 4096 * 8 * 6 * 128, 9 * 2 * 8 * 16 * 128


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("%copy.1 = bf16[9,2,8,16,128]{4,3,2,1,0:T(8,128)(2,1)} copy(%pages.1)", ["bf16[9,2,8,16,128] by copy"]),
        ("%t = bf16[16,9,2,8,128]{4,3,2,1,0} transpose(%pages.1), dimensions={3}", ["bf16[16,9,2,8,128] by transpose"]),
        (
            "%c = (bf16[9,2,8,16,128]{4,3}, bf16[9,2,8,16,128]{4}, u32[]) copy-start(%p)",
            ["bf16[9,2,8,16,128] by copy-start"],
        ),
        ('%w = bf16[9,2,8,16,128]{4,3,2,1,0} custom-call(%k, %pages.1), custom_call_target="write"', []),
        (
            "%ds.1 = bf16[1,4096,6144]{2,1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%slice.7",
            ["bf16[1,4096,6144] by fusion"],
        ),
        ("%ds.1 = bf16[1,4096,6144]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice.7", []),
        ("%one = bf16[4096,6144]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=3", []),
    ],
)
def test_finds_what_is_moved(line, found):
    """Neither what is read ahead or inside a fusion, nor small things, nor pages that are written in place."""
    assert moved(PROGRAM.replace("POOL", line), {LAYER}, {WEIGHT}) == found


def test_counts_what_devices_exchange():
    assert collectives(PROGRAM) == {"all-reduce": 1, "all-gather": 1}


@pytest.mark.parametrize(
    ("found", "layers", "right"),
    [
        ({}, 0, True),
        ({"all-reduce": 1}, 0, False),
        ({"all-reduce": 6, "all-to-all": 1}, 2, True),
        ({"all-reduce": 5, "all-gather": 1, "all-to-all": 1}, 2, True),
        ({"all-reduce": 3, "all-gather": 3, "all-to-all": 1}, 2, False),
        ({"all-reduce": 7, "all-to-all": 1}, 2, False),
        ({"all-reduce": 6, "all-to-all": 1, "collective-permute": 1}, 2, False),
        ({}, 2, False),
    ],
)
def test_devices_exchange_what_they_must(found, layers, right):
    assert (wrong_collectives(Counter(found), layers) == []) is right
