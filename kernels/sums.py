"""Sums of squares of one chunk, and of the chunks of one tensor.

    chunk      fp32 lane sums -> one fp32 number each for w², (s·g)², d²; again, rescaled, if a
               square left fp32's range
    tensor     the chunks' slots in fixed order, in float64: by the last program to arrive
               (`sum_partials`), or by one that waits for each slot (`sum_tagged`)

Bytes a parameter in fp32: 8 read.
"""

import triton
import triton.language as tl

from . import layout
from .lars_rule import direction
from .memory import (
    TAIL_TURNS,
    UNIT_DOWN,
    UNIT_UP,
    element_offset,
    load_block,
    pointer_to,
    widen,
)

# A block's fp32 sum of squares is trusted between these bounds: below, squares have lost bits to
# underflow (2^-126 against 2^-80 leaves 2^-46 relative); above, one more square may overflow.
SUM_FLOOR = tl.constexpr(2.0**-80)
SUM_CEILING = tl.constexpr(2.0**120)


W2 = tl.constexpr(layout.W2)
G2 = tl.constexpr(layout.G2)
D2 = tl.constexpr(layout.D2)
SUM_WORDS = tl.constexpr(layout.SUM_WORDS)

_UNSIGNED = tl.constexpr((1 << 63) - 1)

# Turns of LANES slots that the last arriver of a tensor loads at a time.
PARTIAL_TURNS = tl.constexpr(8)


@triton.jit
def by_thread(x, BLOCK: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Add up what each thread holds of a block: no thread needs another, and one number is kept.

    A block lies over the threads in runs of VECTOR elements, once or several times around. To keep
    a number for every element instead would cost registers.
    """
    runs = tl.reshape(x, [BLOCK // (THREADS * VECTOR), THREADS, VECTOR])
    return tl.sum(tl.sum(runs, 2), 0)


@triton.jit
def _add2(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _add3(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@triton.jit
def sum3(a, b, c, EMULATE_BF16: tl.constexpr):
    """Sums of three tensors: one trip through shared memory for the three of them.

    The interpreter runs a reduction of several tensors element by element, and one sum as a whole.
    """
    if EMULATE_BF16:
        return tl.sum(a), tl.sum(b), tl.sum(c)
    return tl.reduce((a, b, c), 0, _add3)


@triton.jit
def squares(
    w, g, factor, decay, w_unit, g_unit, d_unit, RESCALE: tl.constexpr, W_DT: tl.constexpr,
    G_DT: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """(w_unit·w)², (g_unit·s·g)² and (d_unit·d)² of loaded elements."""
    w = widen(w, W_DT, EMULATE_BF16)
    if G_DT is None:
        g = w * 0
    else:
        g = widen(g, G_DT, EMULATE_BF16)
    d = direction(w, g, factor, decay)
    g = g * factor
    if RESCALE:
        w, g, d = w * w_unit, g * g_unit, d * d_unit
    return w * w, g * g, d * d


@triton.jit
def add_tail_squares(
    w_sum, g_sum, d_sum, thread, w_address, g_address, start, done, count,
    factor, decay, w_unit, g_unit, d_unit, RESCALE: tl.constexpr, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Add the rest of a chunk to the sums, and all of a misaligned one: element by element.

    `thread`: 0 to THREADS - 1, in the layout of the sums.
    """
    w_any = pointer_to(w_address, W_DT, 1, EMULATE_BF16)
    if G_DT is not None:
        g_any = pointer_to(g_address, G_DT, 1, EMULATE_BF16)
    while done < count:
        for turn in tl.static_range(TAIL_TURNS):  # unrolled: their loads are in flight together
            mask = done + turn * THREADS + thread < count
            at = start + done + turn * THREADS + thread
            w_one = tl.load(w_any + at, mask=mask, other=0)
            g_one = w_one
            if G_DT is not None:
                g_one = tl.load(g_any + at, mask=mask, other=0)
            w2, g2, d2 = squares(
                w_one, g_one, factor, decay, w_unit, g_unit, d_unit,
                RESCALE, W_DT, G_DT, EMULATE_BF16,
            )  # fmt: skip
            w_sum += w2
            g_sum += g2
            d_sum += d2
        done += TAIL_TURNS * THREADS
    return w_sum, g_sum, d_sum


@triton.jit
def _sum_squares(
    w, g, w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
    RESCALE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    HOLD: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Sums of squares in fp32 over one chunk, whose first whole block was loaded as w and g.

    G_DT None: there is no g, and its sum is 0.
    """
    tl.static_assert(BLOCK % THREADS == 0, "a block must be whole turns of all threads")
    ACCESS: tl.constexpr = W_ALIGN * 8 // W_DT.primitive_bitwidth  # elements of one wide load
    VECTOR: tl.constexpr = ACCESS if ACCESS * THREADS <= BLOCK else BLOCK // THREADS
    w_sum = tl.zeros([THREADS], tl.float32)
    g_sum = tl.zeros([THREADS], tl.float32)
    d_sum = tl.zeros([THREADS], tl.float32)
    block = whole * 0
    while block < whole:
        w2, g2, d2 = squares(
            w, g, factor, decay, w_unit, g_unit, d_unit, RESCALE, W_DT, G_DT, EMULATE_BF16
        )
        w_sum += by_thread(w2, BLOCK, THREADS, VECTOR)
        g_sum += by_thread(g2, BLOCK, THREADS, VECTOR)
        d_sum += by_thread(d2, BLOCK, THREADS, VECTOR)
        block += 1
        if BLOCK < CHUNK:
            w, g = load_pair(
                w_address, g_address, start + element_offset(block, BLOCK), block < whole,
                BLOCK, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
            )  # fmt: skip
    thread = tl.arange(0, THREADS)
    w_sum, g_sum, d_sum = add_tail_squares(
        w_sum, g_sum, d_sum, thread, w_address, g_address, start, whole * BLOCK, count,
        factor, decay, w_unit, g_unit, d_unit, RESCALE, THREADS, W_DT, G_DT, EMULATE_BF16,
    )  # fmt: skip
    return sum3(w_sum, g_sum, d_sum, EMULATE_BF16)


@triton.jit
def load_pair(
    w_address, g_address, at, there,
    BLOCK: tl.constexpr, W_DT: tl.constexpr, G_DT: tl.constexpr, W_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr, HOLD: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """A whole block of w and g. HOLD: eviction policy of what the update will read again."""
    w = load_block(w_address, at, there, BLOCK, W_DT, W_ALIGN, HOLD, EMULATE_BF16)
    g = w
    if G_DT is not None:
        g = load_block(g_address, at, there, BLOCK, G_DT, G_ALIGN, HOLD, EMULATE_BF16)
    return w, g


@triton.jit
def _in_range(total):
    return (total > SUM_FLOOR) & (total < SUM_CEILING)


@triton.jit
def rescue_unit(total):
    """Power of two that brings a sum of squares back into fp32's range (1 where it is there)."""
    return tl.where(_in_range(total), 1.0, tl.where(total < 1.0, UNIT_UP, UNIT_DOWN))


@triton.jit
def in_plain_units(total, unit):
    """A sum of squares, in float64, that was taken of elements times `unit`."""
    back = tl.where(unit > 1.0, UNIT_DOWN, tl.where(unit < 1.0, UNIT_UP, 1.0)).to(tl.float64)
    return total.to(tl.float64) * back * back


@triton.jit
def chunk_square_sums(
    w, g, w_address, g_address, start, count, whole, factor, decay,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    HOLD: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Sums of w², (s·g)² and d² in float64 over one chunk, right over the whole range of fp32.

    `w`, `g`: its first block (`load_pair`). Squares leave fp32's range long before the elements do.
    Such a chunk (all zeros also looks like one) is summed a second time in rescaled units; its
    elements are still in L2.
    """
    one = tl.full([], 1.0, tl.float32)
    w_sum, g_sum, d_sum = _sum_squares(
        w, g, w_address, g_address, start, count, whole, factor, decay, one, one, one,
        False, CHUNK, BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
    )  # fmt: skip
    w_unit = rescue_unit(w_sum)
    g_unit = rescue_unit(g_sum)
    d_unit = rescue_unit(d_sum)
    fits = w_unit == 1.0
    if G_DT is not None:  # without g there are no other sums
        fits = fits & (g_unit == 1.0) & (d_unit == 1.0)
    if not fits:
        w, g = load_pair(
            w_address, g_address, start, whole > 0,
            BLOCK, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
        )  # fmt: skip
        w_sum, g_sum, d_sum = _sum_squares(
            w, g, w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
            True, CHUNK, BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
        )  # fmt: skip
    return (
        in_plain_units(w_sum, w_unit),
        in_plain_units(g_sum, g_unit),
        in_plain_units(d_sum, d_unit),
    )


@triton.jit
def store_triple(table, row, w2, g2, d2):
    """Put three sums into row `row` of a table: a chunk's slot, or a tensor's result."""
    tl.store(table + SUM_WORDS * row + W2, w2)
    tl.store(table + SUM_WORDS * row + G2, g2)
    tl.store(table + SUM_WORDS * row + D2, d2)


@triton.jit
def tag_of(epoch):
    """The sign that this launch's partial sums carry, and those of the launch before do not."""
    return (epoch & 1).to(tl.int64) << 63


@triton.jit
def store_tagged(partials, slot, w2, g2, d2, tag, thread):
    """Put a chunk's sums into its slot, each under this launch's tag.

    So a reader knows each word for new or old by itself, and the writer needs no fence, which would
    wait for all of its loads and stores. Sums of squares have no sign of their own, but for NaN,
    which loses it. Every launch that is not skipped stores each slot once, and a slot that nobody
    has stored is old for epoch 1.
    `thread`: 0 to THREADS - 1; the first three store a word each.
    """
    sums = tl.where(thread == W2, w2, tl.where(thread == G2, g2, d2))
    at = partials.to(tl.pointer_type(tl.int64)) + SUM_WORDS * slot + thread
    words = (sums.to(tl.int64, bitcast=True) & _UNSIGNED) | tag
    tl.atomic_xchg(at, words, mask=thread < SUM_WORDS, sem="relaxed")


@triton.jit
def _load_tagged(partials, slot, there, tag):
    """Three words of each slot, without the tag: negative where this launch has not stored it."""
    at = partials.to(tl.pointer_type(tl.int64)) + SUM_WORDS * slot
    w2 = tl.load(at + W2, mask=there, other=0, volatile=True)
    g2 = tl.load(at + G2, mask=there, other=0, volatile=True)
    d2 = tl.load(at + D2, mask=there, other=0, volatile=True)
    w2, g2, d2 = w2 ^ tag, g2 ^ tag, d2 ^ tag
    return tl.where(there, w2, 0), tl.where(there, g2, 0), tl.where(there, d2, 0)


@triton.jit
def sum_tagged(partials, lane, first_slot, chunks, tag, LANES: tl.constexpr):
    """`sum_partials` of w², (s·g)² and d² while other programs store them: waits for every slot.

    In the same order, with the same result. Slots are stored about in order, so that all but the
    last turn are added before the last chunk is summed.
    """
    a = (lane * 0).to(tl.float64)
    b = (lane * 0).to(tl.float64)
    c = (lane * 0).to(tl.float64)
    added = chunks * 0
    while added < chunks:
        there = added + lane < chunks
        at = first_slot + added + lane
        w2, g2, d2 = _load_tagged(partials, at, there, tag)
        while tl.sum(((w2 | g2 | d2) < 0).to(tl.int32)) != 0:
            w2, g2, d2 = _load_tagged(partials, at, there, tag)
        a += w2.to(tl.float64, bitcast=True)
        b += g2.to(tl.float64, bitcast=True)
        c += d2.to(tl.float64, bitcast=True)
        added += LANES
    return tl.reduce((a, b, c), 0, _add3)


@triton.jit
def sum_partials(
    partials, lane, first_slot, chunks, one, other, LANES: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Sums over a tensor's slots of two of their words, W2, G2 or D2 (`layout.py`).

    `lane`: 0 to LANES - 1, in the layout in which they are added.

    Always in the same order: the result is bitwise repeatable. Several turns at once, so that their
    loads are in flight together, as far as registers allow. `.cg` reads past L1, which may hold the
    slots as they were in an earlier step.
    """
    a = (lane * 0).to(tl.float64)
    b = (lane * 0).to(tl.float64)
    done = chunks * 0
    while done < chunks:
        for turn in tl.static_range(PARTIAL_TURNS):
            slot = done + turn * LANES + lane
            mask = slot < chunks
            at = partials + SUM_WORDS * (first_slot + slot)
            a += tl.load(at + one, mask=mask, other=0.0, cache_modifier=".cg")
            b += tl.load(at + other, mask=mask, other=0.0, cache_modifier=".cg")
        done += PARTIAL_TURNS * LANES
    if EMULATE_BF16:
        return tl.sum(a), tl.sum(b)
    return tl.reduce((a, b), 0, _add2)
