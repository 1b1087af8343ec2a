"""The machine itself: it must find what hardware would, and must not find what is not there."""

import re

import numpy as np
import pytest

from tests.ptx.instructions import Unknown
from tests.ptx.machine import Fault, Kernel, Memory, launch

pytestmark = pytest.mark.cpu


def kernel(body, threads=64, parameters=1):
    """A kernel that begins with its parameters in %rd0, %rd1 ... and its thread's index in %r0."""
    names = ", ".join(f".param .u64 k_param_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [k_param_{i}];" for i in range(parameters))
    names = names.replace(", ", ",\n")
    return Kernel(
        f"""
        .visible .entry k({names})
        .reqntid {threads}
        {{
        .reg .pred %p<9>;
        .reg .b16 %rs<9>;
        .reg .b32 %r<40>;
        .reg .b64 %rd<40>;
        {loads}
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd9, %r0, 4;
        add.s64 %rd10, %rd0, %rd9;  // this thread's word
        {body}
        ret;
        }}"""
    )


def run(k, array, grid=1, shared=0, **schedule):
    memory = Memory([(array.ctypes.data, array.nbytes)])
    launch(k, grid, [array.ctypes.data], memory, shared, **schedule)
    return array


def aligned(n, dtype):
    """Zeros whose address is a multiple of 16."""
    dtype = np.dtype(dtype)
    raw = np.zeros(n * dtype.itemsize + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + n * dtype.itemsize].view(dtype)


def test_each_thread_writes_its_word():
    found = run(kernel("st.global.b32 [ %rd10 + 0 ], { %r0 };"), aligned(64, "u4"))
    assert found.tolist() == list(range(64))


@pytest.mark.parametrize("by_warp", [False, True])
def test_threads_diverge_and_meet_again(by_warp):
    body = """
        and.b32 %r1, %r0, 1;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 bra $L__BB0_2;
        mov.b32 %r2, 100;
        bra.uni $L__BB0_3;
    $L__BB0_2:
        mov.b32 %r2, 200;
    $L__BB0_3:
        add.s32 %r3, %r2, %r0;
        @!%p1 add.s32 %r3, %r3, 1000;
        st.global.b32 [ %rd10 + 0 ], { %r3 };"""
    found = run(kernel(body), aligned(64, "u4"), by_warp=by_warp)
    assert found.tolist() == [t + (200 if t % 2 == 0 else 1100) for t in range(64)]


def test_a_barrier_is_waited_for_by_all_warps():
    """Each thread reads what the one opposite wrote; without the barrier some come too early."""
    body = """
        mov.b32 %r1, global_smem;
        shl.b32 %r2, %r0, 2;
        add.s32 %r3, %r1, %r2;
        st.shared.b32 [ %r3 + 0 ], %r0;
        bar.sync 0;
        xor.b32 %r4, %r2, 252;
        add.s32 %r5, %r1, %r4;
        ld.shared.b32 %r6, [ %r5 + 0 ];
        st.global.b32 [ %rd10 + 0 ], { %r6 };"""

    def always_right(text):
        opposite = [63 - t for t in range(64)]
        found = [
            run(kernel(text), aligned(64, "u4"), shared=256, by_warp=True, seed=seed).tolist()
            for seed in range(10)
        ]
        return all(words == opposite for words in found)

    assert always_right(body)
    # A warp has its turn until a place where one may jump to.
    assert not always_right(body.replace("bar.sync 0;", "bra.uni $L__BB0_9;\n$L__BB0_9:"))


def test_atomics_of_all_programs_add_up():
    body = """
        mov.b32 %r1, 1;
        atom.global.gpu.relaxed.add.u32 %r2, [ %rd0 + 0 ], %r1;"""
    assert run(kernel(body), aligned(1, "u4"), grid=5, resident=2)[0] == 5 * 64


def test_shuffles_stay_within_a_warp():
    body = """
        shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;
        mov.b32 %r2, 3;
        shfl.sync.idx.b32 %r3, %r0, %r2, 31, -1;
        add.s32 %r4, %r1, %r3;
        st.global.b32 [ %rd10 + 0 ], { %r4 };"""
    found = run(kernel(body), aligned(64, "u4")).tolist()
    assert found == [(t ^ 16) + t // 32 * 32 + 3 for t in range(64)]


def test_arithmetic_of_floats_and_shifts():
    body = """
        cvt.f64.f32 %rd11, %r1;
        mov.b32 %r1, 0f40400000;
        fma.rn.f32 %r2, %r1, %r1, 0f3F800000;
        cvt.rn.bf16x2.f32 %r3, %r1, %r2;
        shr.s32 %r4, -8, 1;
        shl.b32 %r5, %r4, 40;
        setp.geu.f32 %p1, 0f7FC00000, %r1;
        selp.b32 %r6, 7, 9, %p1;
        st.global.v4.b32 [ %rd0 + 0 ], { %r2, %r3, %r4, %r6 };
        st.global.b32 [ %rd0 + 16 ], { %r5 };"""
    words = run(kernel(body, threads=32), aligned(5, "u4"))
    assert words[:1].view("f4")[0] == 10.0
    assert hex(words[1]) == "0x40404120"  # 3 and 10 in bf16
    assert words[2:3].view("i4")[0] == -4
    assert (words[3], words[4]) == (7, 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("st.global.b32 [ %rd10 + 4 ], { %r0 };", "in no buffer"),
        ("ld.global.b32 { %r1 }, [ %rd10 + -4 ];", "in no buffer"),
        ("st.global.v4.b32 [ %rd10 + 0 ], { %r0, %r0, %r0, %r0 };", "misaligned|in no buffer"),
        ("ld.shared.b32 %r1, [ %r0 + 4096 ];", "in no buffer"),
        ("$L__BB0_1:\n ld.global.b32 { %r1 }, [ %rd0 + 0 ];\n bra.uni $L__BB0_1;", "each other"),
    ],
)
def test_what_hardware_would_refuse_is_a_fault(body, reason):
    with pytest.raises(Fault, match=reason):
        run(kernel(body), aligned(64, "u4"), most_turns=5_000)


def test_an_unknown_instruction_is_told():
    with pytest.raises(Unknown, match=re.escape("tanh.approx.f32 %r1, %r0")):
        kernel("tanh.approx.f32 %r1, %r0;")
