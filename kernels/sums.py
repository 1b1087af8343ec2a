"""Sums of squares of one chunk, and of the chunks of one tensor.

    chunk      fp32 lane sums -> one fp32 number each for w², (s·g)², d²; again, rescaled, if a
               square left fp32's range
    tensor     the chunks' slots in fixed order, in float64

Bytes a parameter in fp32: 8 read.
"""

import triton
import triton.language as tl

from .tile import UNIT_DOWN, UNIT_UP, element_offset, pointer_to, widen

# A block's fp32 sum of squares is trusted between these bounds: below, squares have lost bits to
# underflow (2^-126 against 2^-80 leaves 2^-46 relative); above, one more square may overflow.
SUM_FLOOR = tl.constexpr(2.0**-80)
SUM_CEILING = tl.constexpr(2.0**120)


@triton.jit
def _by_thread(x, BLOCK: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Add up what each thread holds of a block: no thread needs another, and one number is kept.

    A block lies over the threads in runs of VECTOR elements, once or several times around. To keep
    a number for every element instead would cost registers.
    """
    runs = tl.reshape(x, [BLOCK // (THREADS * VECTOR), THREADS, VECTOR])
    return tl.sum(tl.sum(runs, 2), 0)


@triton.jit
def _sum_squares(
    w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, W_DT: tl.constexpr, G_DT: tl.constexpr,
    W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Fp32 sums of (w_unit·w)², (g_unit·s·g)² and (d_unit·d)² over one chunk.

    G_DT None: there is no g, and its sum is 0.
    """
    tl.static_assert(BLOCK % THREADS == 0, "a block must be whole turns of all threads")
    ACCESS: tl.constexpr = W_ALIGN * 8 // W_DT.primitive_bitwidth  # elements of one wide load
    VECTOR: tl.constexpr = ACCESS if ACCESS * THREADS <= BLOCK else BLOCK // THREADS
    w_sum = tl.zeros([THREADS], tl.float32)
    g_sum = tl.zeros([THREADS], tl.float32)
    d_sum = tl.zeros([THREADS], tl.float32)
    # Whole blocks: no mask, so that the hints give 128-bit loads.
    lane = tl.arange(0, BLOCK)
    w_at = pointer_to(w_address, W_DT, W_ALIGN, EMULATE_BF16)
    if G_DT is not None:
        g_at = pointer_to(g_address, G_DT, G_ALIGN, EMULATE_BF16)
    block = whole * 0
    while block < whole:
        first = start + element_offset(block, BLOCK)
        w = widen(tl.load(w_at + first + lane), W_DT, EMULATE_BF16)
        g = w * 0
        if G_DT is not None:
            g = widen(tl.load(g_at + first + lane), G_DT, EMULATE_BF16)
        d = (g * factor + decay * w) * d_unit
        w = w * w_unit
        g = g * factor * g_unit
        w_sum += _by_thread(w * w, BLOCK, THREADS, VECTOR)
        g_sum += _by_thread(g * g, BLOCK, THREADS, VECTOR)
        d_sum += _by_thread(d * d, BLOCK, THREADS, VECTOR)
        block += 1
    # The rest, and everything of a misaligned tensor: masked, element by element.
    thread = tl.arange(0, THREADS)
    w_any = pointer_to(w_address, W_DT, 1, EMULATE_BF16)
    if G_DT is not None:
        g_any = pointer_to(g_address, G_DT, 1, EMULATE_BF16)
    done = whole * BLOCK
    while done < count:
        mask = done + thread < count
        first = start + done
        w = widen(tl.load(w_any + first + thread, mask=mask, other=0), W_DT, EMULATE_BF16)
        g = w * 0
        if G_DT is not None:
            g = widen(tl.load(g_any + first + thread, mask=mask, other=0), G_DT, EMULATE_BF16)
        d = (g * factor + decay * w) * d_unit
        w = w * w_unit
        g = g * factor * g_unit
        w_sum += w * w
        g_sum += g * g
        d_sum += d * d
        done += THREADS
    return tl.sum(w_sum), tl.sum(g_sum), tl.sum(d_sum)


@triton.jit
def _in_range(total):
    return (total > SUM_FLOOR) & (total < SUM_CEILING)


@triton.jit
def _rescue_unit(total):
    """Power of two that brings a sum of squares back into fp32's range (1 where it is there)."""
    return tl.where(_in_range(total), 1.0, tl.where(total < 1.0, UNIT_UP, UNIT_DOWN))


@triton.jit
def _in_plain_units(total, unit):
    """Float64 value of a sum of squares that was taken of elements times `unit`."""
    back = tl.where(unit > 1.0, UNIT_DOWN, tl.where(unit < 1.0, UNIT_UP, 1.0)).to(tl.float64)
    return total.to(tl.float64) * back * back


@triton.jit
def chunk_square_sums(
    w_address, g_address, start, count, whole, factor, decay,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, W_DT: tl.constexpr, G_DT: tl.constexpr,
    W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Float64 sums of w², (s·g)² and d² over one chunk, right over the whole range of fp32.

    Squares leave fp32's range long before the elements do. Such a chunk (all zeros also looks
    like one) is summed a second time in rescaled units; its elements are still in L2.
    """
    w_unit = tl.full([], 1.0, tl.float32)
    g_unit = tl.full([], 1.0, tl.float32)
    d_unit = tl.full([], 1.0, tl.float32)
    w2 = tl.full([], 0.0, tl.float64)
    g2 = tl.full([], 0.0, tl.float64)
    d2 = tl.full([], 0.0, tl.float64)
    tries = tl.full([], 0, tl.int32)
    while tries < 2:
        w_sum, g_sum, d_sum = _sum_squares(
            w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
            BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, EMULATE_BF16,
        )  # fmt: skip
        w2 = _in_plain_units(w_sum, w_unit)
        g2 = _in_plain_units(g_sum, g_unit)
        d2 = _in_plain_units(d_sum, d_unit)
        fits = _in_range(w_sum)
        if G_DT is not None:  # without g there are no other sums
            fits = fits & _in_range(g_sum) & _in_range(d_sum)
        w_unit = _rescue_unit(w_sum)
        g_unit = _rescue_unit(g_sum)
        d_unit = _rescue_unit(d_sum)
        tries = tl.where(fits, 2, tries + 1)
    return w2, g2, d2


@triton.jit
def store_triple(table, row, w2, g2, d2):
    """Put three sums into row `row` of a table: a chunk's slot, or a tensor's result."""
    tl.store(table + 3 * row, w2)
    tl.store(table + 3 * row + 1, g2)
    tl.store(table + 3 * row + 2, d2)


@triton.jit
def sum_partials(partials, first_slot, chunks, LANES: tl.constexpr):
    """Sum of a tensor's slots, always in the same order: the result is bitwise repeatable.

    `.cg` reads past L1, which may hold the slots as they were in an earlier step.
    """
    lane = tl.arange(0, LANES)
    w2 = tl.zeros([LANES], tl.float64)
    g2 = tl.zeros([LANES], tl.float64)
    d2 = tl.zeros([LANES], tl.float64)
    done = chunks * 0
    while done < chunks:
        mask = done + lane < chunks
        at = partials + 3 * (first_slot + done + lane)
        w2 += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        g2 += tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
        d2 += tl.load(at + 2, mask=mask, other=0.0, cache_modifier=".cg")
        done += LANES
    return tl.sum(w2), tl.sum(g2), tl.sum(d2)
