"""Squared L2 norms of many tensors in one launch.

The first half of the two-launch path, and the public norm functions.

    grid         one program a NORM item (the chunks of all tensors, in any order)
    partials     one slot a chunk; the last program of a tensor sums its slots in fixed order

Bytes a parameter in fp32: 8 (w and g), or 4 for one list of tensors (G_DT None).
"""

import triton
import triton.language as tl

from .sums import chunk_square_sums, store_triple, sum_partials
from .tile import (
    DECAY,
    G_AT,
    GROUP,
    GROUP_WORDS,
    NUMEL,
    SLOT,
    TENSOR_WORDS,
    W_AT,
    chunk_span,
    gradient_factor,
    inverse_scale,
    unpack_item,
)


@triton.jit(
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "arrivals", "partials", "sums", "grad_scale",
    ],
)  # fmt: skip
def l2norm(
    items,  # int64: NORM items
    tensors,  # int64 [n_tensors, 8]
    groups,  # float64 [n_groups, 16]
    arrivals,  # int32 [n_tensors], zero between launches
    partials,  # float64 [n_slots, 3]
    sums,  # float64 [n_tensors, 3]: w², (s·g)², d²
    grad_scale,  # float32 [1]
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    W_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """Sum the squares of one chunk; finish the tensor if it is its last chunk to arrive."""
    _, tensor, chunk = unpack_item(tl.load(items + tl.program_id(0)))
    row = tensors + tensor * TENSOR_WORDS
    w_address, g_address = tl.load(row + W_AT), tl.load(row + G_AT)
    options = groups + tl.load(row + GROUP) * GROUP_WORDS
    start, count, whole = chunk_span(row, chunk, CHUNK, BLOCK)
    w2, g2, d2 = chunk_square_sums(
        w_address, g_address, start, count, whole,
        gradient_factor(options, inverse_scale(grad_scale)),
        tl.load(options + DECAY).to(tl.float32),
        BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, EMULATE_BF16,
    )  # fmt: skip
    chunks = (tl.load(row + NUMEL) + CHUNK - 1) // CHUNK
    if chunks == 1:
        store_triple(sums, tensor, w2, g2, d2)
    else:
        first_slot = tl.load(row + SLOT)
        store_triple(partials, first_slot + chunk, w2, g2, d2)
        if tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == chunks - 1:
            w2, g2, d2 = sum_partials(partials, first_slot, chunks, LANES)
            store_triple(sums, tensor, w2, g2, d2)
            tl.store(arrivals + tensor, 0)
