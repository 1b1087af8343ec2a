"""Addresses from tables as typed pointers, storage dtypes to fp32 and back, spans of chunks."""

import triton
import triton.language as tl

from . import layout

_ALIGNED = tl.constexpr(layout.ALIGNED)

# Factors that bring a value into fp32's range: exact, being powers of two.
UNIT_UP = tl.constexpr(2.0**100)
UNIT_DOWN = tl.constexpr(2.0**-100)

# Turns of all threads through a tail, element by element, whose loads are in flight together.
TAIL_TURNS = tl.constexpr(8)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Typed pointer to an int64 address; ALIGN bytes are promised to the compiler when above 1.

    The hint must sit on the result of a cast of its own: the compiler keeps it on the defining
    operation, where it would also claim alignment in a branch that does not have it.
    """
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, ALIGN)
    return pointer


@triton.jit
def widen(x, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Exact fp32 value of a loaded element. The interpreter widens bf16 subnormals wrongly."""
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """An fp32 value rounded to nearest even in DTYPE. The interpreter truncates to bf16."""
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.uint16)
    return x.to(DTYPE)


@triton.jit
def element_offset(index, SIZE: tl.constexpr):
    """First element of chunk or block `index`. 64-bit: a tensor may pass 2^31 elements."""
    return index.to(tl.int64) * SIZE


@triton.jit
def chunk_span(numel, flags, chunk, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """First element of a chunk, its element count, and how many whole aligned blocks lead it."""
    start = element_offset(chunk, CHUNK)
    count = tl.minimum(numel - start, CHUNK).to(tl.int32)
    return start, count, tl.where((flags & _ALIGNED) != 0, count // BLOCK, 0)


@triton.jit
def load_block(
    address, at, there,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, EVICT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """A whole block at element `at`, by the widest loads; zeros unless `there`.

    A mask that is the same for all lanes keeps the access wide, and costs no branch.
    """
    pointer = pointer_to(address, DTYPE, ALIGN, EMULATE_BF16) + at + tl.arange(0, BLOCK)
    return tl.load(pointer, mask=there, other=0, eviction_policy=EVICT)
