"""The update alone, from norms that are already in memory: the second half of the two-launch path.

    grid         one program an UPDATE item; each works out its tensor's trust ratio from `sums`

Between the halves sharded training adds up `sums` over its ranks. Same chunks and same arithmetic
as `lars_step.py`, so that both paths give bitwise the same weights.

Bytes a parameter in fp32: 20 (12 read, 8 written), 28 with the norms.
"""

import triton
import triton.language as tl

from .tile import (
    G_AT,
    GROUP,
    GROUP_WORDS,
    TENSOR_WORDS,
    W_AT,
    chunk_span,
    gradient_factor,
    inverse_scale,
    learning_rate,
    store_stats,
    trust_ratio,
    unpack_item,
    update_chunk,
    update_rule,
)


@triton.jit(
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "group_words", "counter", "sums", "ratios", "grad_scale",
        "found_inf",
    ],
)  # fmt: skip
def lars_update(
    items,  # int64: UPDATE items, drawn in order
    tensors,  # int64 [n_tensors, 8]
    groups,  # float64 [n_groups, 16]
    group_words,  # int64: the same memory
    counter,  # int64 [1]: (epoch << 32) | programs started
    sums,  # float64 [n_tensors, 3]
    ratios,  # float64 [n_tensors, 2]
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
    ticket = word & 0xFFFFFFFF
    epoch = word >> 32
    if taken:
        _, tensor, chunk = unpack_item(tl.load(items + ticket))
        row = tensors + tensor * TENSOR_WORDS
        group = tl.load(row + GROUP)
        options = groups + group * GROUP_WORDS
        lr = learning_rate(options, group_words + group * GROUP_WORDS)
        start, count, whole = chunk_span(row, chunk, CHUNK, BLOCK)
        w2 = tl.load(sums + 3 * tensor)
        g2 = tl.load(sums + 3 * tensor + 1)
        d2 = tl.load(sums + 3 * tensor + 2)
        ratio = trust_ratio(w2, g2, d2, options, lr)
        if chunk == 0:
            store_stats(ratios, tensor, ratio, lr)
        factor = gradient_factor(options, inverse_scale(grad_scale))
        momentum, keep, decay, nesterov, inside = update_rule(options, row, epoch)
        update_chunk(
            row, tl.load(row + W_AT), tl.load(row + G_AT), start, count, whole, factor, ratio, lr,
            momentum, keep, decay, nesterov, inside,
            BLOCK, THREADS, W_DT, G_DT, V_DT, COPY_DT,
            W_ALIGN, G_ALIGN, V_ALIGN, COPY_ALIGN, EVICT, EMULATE_BF16,
        )  # fmt: skip
    if ticket == tl.num_programs(0) - 1:
        tl.store(counter, (epoch + taken.to(tl.int64)) << 32)
