"""What a program of `lars_resident` does with one item; it holds w and g in shared memory.

    item_of, load_row, load_old_row, load_rule    the words and rows of an item: sent for in time
    prefetch_copy, prefetch_momentum              DRAM → L2, a step before
    start_copy                                    memory → ring, asynchronously
    square_sums                                   ring → sums of squares
    take_out                                      ring → registers

A slot of the ring is one chunk of w and one of g. A chunk that is not whole, or misaligned, never
enters it: it is read from memory, element by element.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import layout
from .lars_rule import load_switches, rate_words, rule_words
from .memory import chunk_span, pointer_to
from .queue import unpack_item
from .sums import add_tail_squares, by_thread, in_plain_units, rescue_unit, squares, sum3

# Since Triton 3.9 it has another name, and the one before raises.
_send = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_UPDATE = gl.constexpr(layout.UPDATE)
_W_AT = gl.constexpr(layout.W_AT)
_G_AT = gl.constexpr(layout.G_AT)
_V_AT = gl.constexpr(layout.V_AT)
_NUMEL = gl.constexpr(layout.NUMEL)
_SLOT = gl.constexpr(layout.SLOT)
_FLAGS = gl.constexpr(layout.FLAGS)
_TENSOR_WORDS = gl.constexpr(layout.TENSOR_WORDS)
_DECAY = gl.constexpr(layout.DECAY)
_GROUP_WORDS = gl.constexpr(layout.GROUP_WORDS)


@gluon.jit
def item_of(items, step, program, programs, own):
    """A program's item of a step; one of no kind before its first and behind its last."""
    return gl.load(items + step * programs + program, mask=(step >= 0) & (step < own), other=0)


@gluon.jit
def load_row(tensors, groups, item):
    """What copying and summing an item need of its rows: one batch of loads."""
    _, tensor, group, _ = unpack_item(item)
    row, options = tensors + tensor * _TENSOR_WORDS, groups + group * _GROUP_WORDS
    switches, decay = load_switches(options), gl.load(options + _DECAY)
    w_address, g_address = gl.load(row + _W_AT), gl.load(row + _G_AT)
    numel, row_flags = gl.load(row + _NUMEL), gl.load(row + _FLAGS)
    return w_address, g_address, numel, row_flags, gl.load(row + _SLOT), switches, decay


@gluon.jit
def load_old_row(tensors, item):
    """What updating an item needs of its tensor's row."""
    _, tensor, _, _ = unpack_item(item)
    row = tensors + tensor * _TENSOR_WORDS
    w_address, g_address = gl.load(row + _W_AT), gl.load(row + _G_AT)
    v_address, numel = gl.load(row + _V_AT), gl.load(row + _NUMEL)
    return w_address, g_address, v_address, numel, gl.load(row + _FLAGS)


@gluon.jit
def load_rule(groups, item):
    """What updating an item needs of its group."""
    _, _, group, _ = unpack_item(item)
    options = groups + group * _GROUP_WORDS
    return load_switches(options), rate_words(options), rule_words(options)


@gluon.jit
def take_out(
    w_ring, g_ring, slot, item, row, lane,
    CHUNK: gl.constexpr, V_DT: gl.constexpr, V_ALIGN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A held chunk, and its momentum if it is to be updated and whole: zeros otherwise."""
    _, _, v_address, numel, row_flags = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = ((kind & _UPDATE) != 0) & (whole > 0) & (v_address != 0) & (lane >= 0)
    v_at = pointer_to(v_address, V_DT, V_ALIGN, False) + start + lane
    v = gl.load(v_at, mask=there, other=0)
    return w_ring.index(slot).load(LAYOUT), g_ring.index(slot).load(LAYOUT), v


@gluon.jit
def start_copy(
    w_ring, g_ring, slot, item, row, lane, CHUNK: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr, W_ALIGN: gl.constexpr, G_ALIGN: gl.constexpr,
):  # fmt: skip
    """Send for an item's w and g, if its chunk is whole: one commit group, also of nothing."""
    w_address, g_address, numel, row_flags, _, _, _ = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = (kind != 0) & (whole > 0) & (lane >= 0)
    w_at = pointer_to(w_address, W_DT, W_ALIGN, False) + start + lane
    g_at = pointer_to(g_address, G_DT, G_ALIGN, False) + start + lane
    _send(w_ring.index(slot), w_at, mask=there)
    _send(g_ring.index(slot), g_at, mask=there)
    async_copy.commit_group()


@gluon.jit
def _sum_once(
    w, g, thread, w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
    RESCALE: gl.constexpr, BLOCK: gl.constexpr, THREADS: gl.constexpr, VECTOR: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr,
):  # fmt: skip
    """Sums of squares in fp32 over a chunk: of its held elements, or element by element."""
    if whole > 0:
        w2, g2, d2 = squares(
            w, g, factor, decay, w_unit, g_unit, d_unit, RESCALE, W_DT, G_DT, False
        )
        w_sum, g_sum, d_sum = sum3(
            by_thread(w2, BLOCK, THREADS, VECTOR), by_thread(g2, BLOCK, THREADS, VECTOR),
            by_thread(d2, BLOCK, THREADS, VECTOR), False,
        )  # fmt: skip
    else:
        zero = (thread * 0).to(gl.float32)
        w_part, g_part, d_part = add_tail_squares(
            zero, zero, zero, thread, w_address, g_address, start, whole, count,
            factor, decay, w_unit, g_unit, d_unit, RESCALE, THREADS, W_DT, G_DT, False,
        )  # fmt: skip
        w_sum, g_sum, d_sum = sum3(w_part, g_part, d_part, False)
    return w_sum, g_sum, d_sum


@gluon.jit
def square_sums(
    w, g, thread, w_address, g_address, start, count, whole, factor, decay,
    BLOCK: gl.constexpr, THREADS: gl.constexpr, VECTOR: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr,
):  # fmt: skip
    """`sums.chunk_square_sums` of a held chunk."""
    one = gl.to_tensor(1.0)
    w_sum, g_sum, d_sum = _sum_once(
        w, g, thread, w_address, g_address, start, count, whole, factor, decay, one, one, one,
        False, BLOCK, THREADS, VECTOR, W_DT, G_DT,
    )  # fmt: skip
    w_unit = rescue_unit(w_sum)
    g_unit = rescue_unit(g_sum)
    d_unit = rescue_unit(d_sum)
    if not ((w_unit == 1.0) & (g_unit == 1.0) & (d_unit == 1.0)):
        w_sum, g_sum, d_sum = _sum_once(
            w, g, thread, w_address, g_address, start, count, whole, factor, decay,
            w_unit, g_unit, d_unit,
            True, BLOCK, THREADS, VECTOR, W_DT, G_DT,
        )  # fmt: skip
    return (
        in_plain_units(w_sum, w_unit),
        in_plain_units(g_sum, g_unit),
        in_plain_units(d_sum, d_unit),
    )


@gluon.jit
def _prefetch(address, at, there, thread, CHUNK: gl.constexpr, DTYPE: gl.constexpr):
    """Send for a chunk, from element `at` on, into L2: one instruction of one thread.

    The data comes from DRAM while the program is at another step, whether or not the ring has room
    for it; the copy or the load that follows a step later finds it near.
    """
    BYTES: gl.constexpr = DTYPE.primitive_bitwidth // 8
    sends = there & (thread == 0)
    gl.inline_asm_elementwise(
        """{
        .reg .pred sends;
        setp.ne.s32 sends, $3, 0;
        @sends cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [address + at * BYTES + thread * 0, thread * 0 + CHUNK * BYTES, sends.to(gl.int32)],
        gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def prefetch_copy(item, row, thread, CHUNK: gl.constexpr, W_DT: gl.constexpr, G_DT: gl.constexpr):
    """Prefetch the w and g that `start_copy` will send for."""
    w_address, g_address, numel, row_flags, _, _, _ = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = (kind != 0) & (whole > 0)
    _prefetch(w_address, start, there, thread, CHUNK, W_DT)
    _prefetch(g_address, start, there, thread, CHUNK, G_DT)


@gluon.jit
def prefetch_momentum(item, row, thread, CHUNK: gl.constexpr, V_DT: gl.constexpr):
    """Prefetch the momentum that `take_out` will load."""
    _, _, v_address, numel, row_flags = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = ((kind & _UPDATE) != 0) & (whole > 0) & (v_address != 0)
    _prefetch(v_address, start, there, thread, CHUNK, V_DT)
