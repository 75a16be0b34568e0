"""What a compiled step does on a GPU, on lines as the compiler writes them."""

from __future__ import annotations

import pytest

from astraea_jax.lab.gpu_code import branches, launches

PROGRAM = """HloModule jit__run, is_scheduled=true

%wrapped_add_computation (param_0: bf16[64,4096]) -> bf16[64,4096] {
  %param_0 = bf16[64,4096]{1,0} parameter(0)
  ROOT %add.1 = bf16[64,4096]{1,0} add(%param_0, %param_0)
}

ENTRY %main.7 (pages.1: bf16[9,2,8,16,128]) -> (bf16[9,2,8,16,128], bf16[8,4096]) {
  %pages.1 = bf16[9,2,8,16,128]{4,3,2,1,0} parameter(0)
  %constant_177_0 = s32[] constant(0)
  %gemm_fusion_dot = f32[4,64,6144]{2,1,0} fusion(%bitcast.58.0, %w), kind=kCustom, calls=%gemm_fusion_dot_computation
  %bitcast.8.0 = bf16[64,8,6,128]{3,2,1,0} bitcast(%loop_reduce_fusion.1)
  %call.10 = (f32[64,32,2,128]{3,2,1,0}, /*index=1*/bf16[9,2,8,16,128]{4,3,2,1,0}) custom-call(%bitcast.8.0, %pages.1)
  %get-tuple-element.7 = s32[64]{0} get-tuple-element(%call.10), index=1
  %copy.68 = s32[] copy(%constant_177_0)
  %copy-start.1 = (s32[8]{0}, s32[8]{0}, u32[]) copy-start(%small)
  %copy-done.1 = s32[8]{0} copy-done(%copy-start.1)
  LINE
  ROOT %tuple = (bf16[9,2,8,16,128]{4,3,2,1,0}, bf16[8,4096]{1,0}) tuple(%pages.1, %fusion.5)
}
"""


def test_counts_what_is_launched_and_not_what_is_inside():
    assert launches(PROGRAM) == 4
    assert launches(PROGRAM.replace("LINE", "%fusion.5 = bf16[8,4096]{1,0} fusion(%bitcast.8.0), kind=kLoop")) == 5


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("%while.16 = (s32[], u32[64]{0}) while(%tuple.57), condition=%region_3.7, body=%region_2.6", ["while"]),
        (
            "%cond.3 = (s32[64]{0}) conditional(%p, %a, %b), true_computation=%r.10\n  %w = (s32[]) while(%t)",
            ["conditional", "while"],
        ),
    ],
)
def test_what_keeps_a_step_from_being_one_command_buffer_is_found(line, found):
    assert branches(PROGRAM.replace("LINE", line)) == found
