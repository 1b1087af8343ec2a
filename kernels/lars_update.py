"""The update alone, from norms that are already in memory: the second half of the two-launch path.

    grid         one program an UPDATE item; each works out its tensor's trust ratio from `sums`

Between the halves sharded training adds up `sums` over its ranks. Same chunks and same arithmetic
as `lars_step.py`, so that both paths give bitwise the same weights.

Bytes a parameter in fp32: 20 (12 read, 8 written), 28 with the norms.
"""

import triton
import triton.language as tl

from . import layout
from .lars_rule import (
    gradient_factor,
    inverse_scale,
    learning_rate,
    load_switches,
    load_triple,
    rate_words,
    ratio_options,
    rule_words,
    store_stats,
    trust_ratio,
    update_chunk,
    update_rule,
    uses_decayed_norm,
)
from .memory import chunk_span
from .queue import TICKET_BITS, TICKET_MASK, as_published, unpack_item, watch_start
from .sums import D2, G2, SUM_WORDS, W2

_W_AT = tl.constexpr(layout.W_AT)
_G_AT = tl.constexpr(layout.G_AT)
_V_AT = tl.constexpr(layout.V_AT)
_COPY_AT = tl.constexpr(layout.COPY_AT)
_NUMEL = tl.constexpr(layout.NUMEL)
_FLAGS = tl.constexpr(layout.FLAGS)
_TENSOR_WORDS = tl.constexpr(layout.TENSOR_WORDS)
_GROUP_WORDS = tl.constexpr(layout.GROUP_WORDS)


@triton.jit(
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "counter", "watch", "sums", "ratios", "grad_scale",
        "found_inf",
    ],
)  # fmt: skip
def lars_update(
    items,  # int64: UPDATE items, drawn in order
    tensors,  # int64 [n_tensors, TENSOR_WORDS]
    groups,  # float64 [n_groups, GROUP_WORDS]
    counter,  # int64 [1]: (epoch << 32) | programs started
    watch,  # int64 [2]: whether every launch began at ticket 0
    sums,  # float64 [n_tensors, SUM_WORDS]
    ratios,  # float64 [n_tensors, RATIO_WORDS]
    grad_scale,  # float32 [1]
    found_inf,  # float32 [1]: non-zero skips the step
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    V_DT: tl.constexpr,
    COPY_DT: tl.constexpr,
    W_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    COPY_ALIGN: tl.constexpr,
    EVICT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """Update one chunk."""
    taken = tl.load(found_inf) == 0
    # The counter numbers the programs in the order of their start, and carries the epoch as in
    # the one-launch kernel; the last to start resets it.
    word = tl.atomic_add(counter, 1, sem="relaxed")
    ticket = (word & TICKET_MASK).to(tl.int32)
    epoch = (word >> TICKET_BITS).to(tl.int32)
    if taken & (ticket == 0):
        watch_start(watch, epoch)
    if taken & (ticket < tl.num_programs(0)):  # never an item beyond the list
        _, tensor, group, chunk = unpack_item(tl.load(items + ticket))
        row = tensors + tensor * _TENSOR_WORDS
        options = groups + group * _GROUP_WORDS
        w_address, g_address = tl.load(row + _W_AT), tl.load(row + _G_AT)
        v_address = tl.load(row + _V_AT)
        copy_address = w_address
        if COPY_DT is not None:
            copy_address = tl.load(row + _COPY_AT)
        numel, row_flags = tl.load(row + _NUMEL), tl.load(row + _FLAGS)
        start, count, whole = chunk_span(numel, row_flags, chunk, CHUNK, BLOCK)
        w2 = tl.load(sums + SUM_WORDS * tensor + W2)
        switches = load_switches(options)
        used = G2 + (D2 - G2) * uses_decayed_norm(switches).to(tl.int64)
        norm2 = tl.load(sums + SUM_WORDS * tensor + used)
        loaded = ratio_options(options)
        lr = learning_rate(rate_words(options), switches)
        factor = gradient_factor(switches, inverse_scale(grad_scale))
        momentum, keep, decay, nesterov, inside = update_rule(
            rule_words(options), switches, row_flags, epoch
        )
        ratio = as_published(trust_ratio(w2, norm2, loaded, switches, lr))
        if chunk == 0:
            store_stats(ratios, tensor, ratio, lr)
        w, g, v = load_triple(
            w_address, g_address, v_address, start, whole > 0,
            BLOCK, W_DT, G_DT, V_DT, W_ALIGN, G_ALIGN, V_ALIGN, EVICT, EMULATE_BF16,
        )  # fmt: skip
        update_chunk(
            w, g, v, w_address, g_address, v_address, copy_address, start, count, whole,
            factor, ratio, lr, momentum, keep, decay, nesterov, inside,
            CHUNK, BLOCK, THREADS, W_DT, G_DT, V_DT, COPY_DT,
            W_ALIGN, G_ALIGN, V_ALIGN, COPY_ALIGN, EVICT, EMULATE_BF16,
        )  # fmt: skip
    if ticket == tl.num_programs(0) - 1:
        tl.store(counter, (epoch + taken).to(tl.int64) << TICKET_BITS)
