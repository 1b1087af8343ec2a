"""All layers' norms and updates in one launch.

    tensors      conv1 (one chunk)     fc (three chunks)                     bias group (adapt off)
    items        BOTH                  NORM NORM NORM ... UPDATE x3           BOTH
    tickets      0                     1    2    3    ...                     n-1
    programs     each draws the next ticket from one counter until none is left
    partials     -                     slot 0, 1, 2 -> last arriver sums them, publishes (epoch, q)

Items are ordered by the host so that an item depends only on earlier ones: the smallest unfinished
ticket is always held by a running program and waits for nothing unfinished. So the launch cannot
deadlock, whatever number of programs is resident, and needs no cooperative launch.

Per element: see `tile.py`. Bytes: w and g are read by a NORM item and again by its UPDATE item; the
host keeps the two close enough in ticket order for the second read to hit L2, so that DRAM sees
read w, g, v and write w, v: 20 bytes a parameter in fp32, as plain SGD.

Why not a grid barrier, float atomics or autotune: `README.md`.
"""

import triton
import triton.language as tl

from .sums import chunk_square_sums, store_triple, sum_partials
from .tile import (
    DECAY,
    G_AT,
    GROUP,
    GROUP_WORDS,
    NORM,
    NUMEL,
    SLOT,
    TENSOR_WORDS,
    UPDATE,
    W_AT,
    chunk_span,
    decode_ratio,
    encode_ratio,
    gradient_factor,
    inverse_scale,
    learning_rate,
    store_stats,
    trust_ratio,
    unpack_item,
    update_chunk,
    update_rule,
)

# The counter word is (epoch << 32) | next ticket: one atomic gives both.
_TICKET = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _draw(counter, THREADS: tl.constexpr):
    """Send for the next ticket: one thread's atomic, for whose answer nobody waits yet.

    A scalar atomic would wait, since its answer is handed to all threads on the spot. So would an
    atomic that adds the same in every thread: ptxas makes one of a warp's and hands out the answer.
    """
    lane = tl.arange(0, THREADS)
    return tl.atomic_add(counter + lane * 0, lane.to(tl.int64) + 1, mask=lane == 0, sem="relaxed")


@triton.jit
def _receive(drawn, THREADS: tl.constexpr):
    """Ticket that `_draw` sent for."""
    return tl.sum(tl.where(tl.arange(0, THREADS) == 0, drawn, 0)) & _TICKET


@triton.jit
def _publish(flag, epoch, ratio):
    """One 64-bit word carries the ratio and the step that it belongs to.

    So its reader needs no fence, and no flag is cleared between steps.
    """
    tl.atomic_xchg(flag, ((epoch & 0xFFFF) << 48) | encode_ratio(ratio), sem="relaxed")


@triton.jit
def _poll(flag, POLL_ATOMIC: tl.constexpr):
    # A plain load in a spin loop is hoisted or deleted. NVIDIA keeps a volatile one; the AMD
    # backend drops `volatile`, so that only an atomic read works there.
    if POLL_ATOMIC:
        return tl.atomic_add(flag, 0, sem="relaxed")
    return tl.load(flag, volatile=True)


@triton.jit
def _wait_for_ratio(flag, epoch, POLL_ATOMIC: tl.constexpr):
    word = _poll(flag, POLL_ATOMIC)
    while ((word >> 48) & 0xFFFF) != (epoch & 0xFFFF):
        word = _poll(flag, POLL_ATOMIC)
    return decode_ratio(word)


@triton.jit(
    do_not_specialize=["n_items"],
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "group_words", "counter", "arrivals", "flags", "partials",
        "sums", "ratios", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def lars_step(
    items,  # int64 [n_items]: the work, in ticket order
    tensors,  # int64 [n_tensors, 8]: addresses and sizes
    groups,  # float64 [n_groups, 16]: hyper-parameters
    group_words,  # int64: the same memory, for the address of a learning rate
    counter,  # int64 [1]: (epoch << 32) | next ticket
    arrivals,  # int32 [n_tensors]: chunks of the tensor summed so far, zero between launches
    flags,  # int64 [n_tensors]: (epoch, ratio) as published
    partials,  # float64 [n_slots, 3]
    sums,  # float64 [n_tensors, 3]: w², g², d², kept for layer_stats()
    ratios,  # float64 [n_tensors, 2]: trust ratio and effective learning rate, likewise
    grad_scale,  # float32 [1]: gradients are divided by it
    found_inf,  # float32 [1]: non-zero skips the step
    n_items,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    W_DT: tl.constexpr,
    G_DT: tl.constexpr,
    V_DT: tl.constexpr,
    COPY_DT: tl.constexpr,
    W_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    COPY_ALIGN: tl.constexpr,
    EVICT: tl.constexpr,
    POLL_ATOMIC: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """One optimizer step over every tensor of one dtype combination."""
    taken = tl.load(found_inf) == 0
    todo = tl.where(taken, n_items, 0).to(tl.int64)
    unscale = inverse_scale(grad_scale)
    word = tl.atomic_add(counter, 1, sem="relaxed")
    ticket = word & _TICKET
    epoch = word >> 32
    item = tl.load(items + ticket, mask=ticket < todo, other=0)
    while ticket < todo:
        # The next ticket is sent for now and its item in the middle of this one, so that neither
        # is waited for. Safe: a program does its tickets in increasing order.
        drawn = _draw(counter, THREADS)
        kind, tensor, chunk = unpack_item(item)
        row = tensors + tensor * TENSOR_WORDS
        w_address, g_address = tl.load(row + W_AT), tl.load(row + G_AT)
        group = tl.load(row + GROUP)
        options = groups + group * GROUP_WORDS
        option_words = group_words + group * GROUP_WORDS
        factor = gradient_factor(options, unscale)
        start, count, whole = chunk_span(row, chunk, CHUNK, BLOCK)
        ratio = tl.full([], 1.0, tl.float64)  # of a chunk that is not adapted
        w2 = tl.full([], 0.0, tl.float64)
        g2 = tl.full([], 0.0, tl.float64)
        d2 = tl.full([], 0.0, tl.float64)
        if (kind & NORM) != 0:
            w2, g2, d2 = chunk_square_sums(
                w_address, g_address, start, count, whole, factor,
                tl.load(options + DECAY).to(tl.float32),
                BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, EMULATE_BF16,
            )  # fmt: skip

        next_ticket = _receive(drawn, THREADS)
        next_item = tl.load(items + next_ticket, mask=next_ticket < todo, other=0)

        if (kind & NORM) != 0:
            chunks = (tl.load(row + NUMEL) + CHUNK - 1) // CHUNK
            complete = chunks == 1
            if chunks > 1:
                first_slot = tl.load(row + SLOT)
                store_triple(partials, first_slot + chunk, w2, g2, d2)
                # acq_rel: releases this chunk's slot, and acquires all others for the last one.
                complete = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == chunks - 1
                if complete:
                    w2, g2, d2 = sum_partials(partials, first_slot, chunks, LANES)
                    tl.store(arrivals + tensor, 0)
            if complete:
                store_triple(sums, tensor, w2, g2, d2)
                lr = learning_rate(options, option_words)
                ratio = trust_ratio(w2, g2, d2, options, lr)
                store_stats(ratios, tensor, ratio, lr)
                if kind == NORM:
                    _publish(flags + tensor, epoch, ratio)

        if (kind & UPDATE) != 0:
            # Before the wait, which then overlaps with these loads.
            lr = learning_rate(options, option_words)
            momentum, keep, decay, nesterov, inside = update_rule(options, row, epoch)
            if kind == UPDATE:
                ratio = _wait_for_ratio(flags + tensor, epoch, POLL_ATOMIC)
            update_chunk(
                row, w_address, g_address, start, count, whole, factor, ratio, lr,
                momentum, keep, decay, nesterov, inside,
                BLOCK, THREADS, W_DT, G_DT, V_DT, COPY_DT,
                W_ALIGN, G_ALIGN, V_ALIGN, COPY_ALIGN, EVICT, EMULATE_BF16,
            )  # fmt: skip
        ticket = next_ticket
        item = next_item

    # Every program ends on one ticket past the work. The very last ticket resets the queue for
    # the next launch; a skipped step does not count, so that "first step" stays first.
    if ticket == todo + tl.num_programs(0) - 1:
        tl.store(counter, (epoch + taken.to(tl.int64)) << 32)
