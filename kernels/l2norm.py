"""Squared L2 norms of many tensors in one launch.

The first half of the two-launch path, and the public norm functions.

    grid         one program a NORM item (the chunks of all tensors, in any order)
    partials     one slot a chunk; the last program of a tensor sums its slots in fixed order

Bytes a parameter in fp32: 8 (w and g), or 4 for one list of tensors (G_DT None).
"""

import triton
import triton.language as tl

from . import layout
from .lars_rule import gradient_factor, inverse_scale, load_switches
from .memory import chunk_span
from .queue import unpack_item
from .sums import D2, G2, W2, chunk_square_sums, load_pair, store_triple, sum_partials

_W_AT = tl.constexpr(layout.W_AT)
_G_AT = tl.constexpr(layout.G_AT)
_NUMEL = tl.constexpr(layout.NUMEL)
_SLOT = tl.constexpr(layout.SLOT)
_FLAGS = tl.constexpr(layout.FLAGS)
_TENSOR_WORDS = tl.constexpr(layout.TENSOR_WORDS)
_DECAY = tl.constexpr(layout.DECAY)
_GROUP_WORDS = tl.constexpr(layout.GROUP_WORDS)


@triton.jit(
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "arrivals", "partials", "sums", "grad_scale",
    ],
)  # fmt: skip
def l2norm(
    items,  # int64: NORM items
    tensors,  # int64 [n_tensors, TENSOR_WORDS]
    groups,  # float64 [n_groups, GROUP_WORDS]
    arrivals,  # int32 [n_tensors], zero between launches
    partials,  # float64 [n_slots, SUM_WORDS]
    sums,  # float64 [n_tensors, SUM_WORDS]: w², (s·g)², d²
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
    _, tensor, group, chunk = unpack_item(tl.load(items + tl.program_id(0)))
    row = tensors + tensor * _TENSOR_WORDS
    options = groups + group * _GROUP_WORDS
    w_address, g_address = tl.load(row + _W_AT), tl.load(row + _G_AT)
    numel, row_flags, first_slot = (
        tl.load(row + _NUMEL),
        tl.load(row + _FLAGS),
        tl.load(row + _SLOT),
    )
    factor = gradient_factor(load_switches(options), inverse_scale(grad_scale))
    decay = tl.load(options + _DECAY).to(tl.float32)
    start, count, whole = chunk_span(numel, row_flags, chunk, CHUNK, BLOCK)
    w, g = load_pair(
        w_address, g_address, start, whole > 0,
        BLOCK, W_DT, G_DT, W_ALIGN, G_ALIGN, "", EMULATE_BF16,
    )  # fmt: skip
    w2, g2, d2 = chunk_square_sums(
        w, g, w_address, g_address, start, count, whole, factor, decay,
        CHUNK, BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, "", EMULATE_BF16,
    )  # fmt: skip
    chunks = (numel + CHUNK - 1) // CHUNK
    if chunks == 1:
        store_triple(sums, tensor, w2, g2, d2)
    else:
        store_triple(partials, first_slot + chunk, w2, g2, d2)
        if tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == chunks - 1:
            lane = tl.arange(0, LANES)
            w2, g2 = sum_partials(partials, lane, first_slot, chunks, W2, G2, LANES, EMULATE_BF16)
            d2, _d2 = sum_partials(partials, lane, first_slot, chunks, D2, D2, LANES, EMULATE_BF16)
            store_triple(sums, tensor, w2, g2, d2)
            tl.store(arrivals + tensor, 0)
