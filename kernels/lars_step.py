"""All layers' norms and updates in one launch.

    tensors      conv1 (one chunk)     fc (three chunks)                     bias group (adapt off)
    items        BOTH                  NORM NORM NORM ... UPDATE x3           BOTH
    tickets      0                     1    2    3    ...                     n-1
    programs     each draws the next ticket from one counter until none is left
    partials     -                     slot 0, 1, 2 -> last arriver sums them, publishes (epoch, q)

Items are ordered by the host so that an item depends only on earlier ones: the smallest unfinished
ticket is always held by a running program and waits for nothing unfinished. So the launch cannot
deadlock, whatever number of programs is resident, and needs no cooperative launch.

Per element: see `lars_rule.py`. Bytes: w and g are read by a NORM item and again by its UPDATE
item; the host keeps the two close in ticket order. Where the second read hits L2, DRAM sees read
w, g, v and write w, v: 20 bytes a parameter in fp32, as plain SGD; on an H200 22.6 (ResNet-50).

Why not a grid barrier, float atomics or autotune: `README.md`.
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
    rule_words,
    update_chunk,
    update_rule,
)
from .last_chunk import finish_tensor
from .memory import chunk_span
from .queue import (
    TICKET_BITS,
    TICKET_MASK,
    ask,
    draw,
    end_of_launch,
    receive,
    unpack_item,
    wait_for_ratio,
    watch_start,
)
from .sums import chunk_square_sums, load_pair, store_triple

_NORM = tl.constexpr(layout.NORM)
_UPDATE = tl.constexpr(layout.UPDATE)
_W_AT = tl.constexpr(layout.W_AT)
_G_AT = tl.constexpr(layout.G_AT)
_V_AT = tl.constexpr(layout.V_AT)
_COPY_AT = tl.constexpr(layout.COPY_AT)
_NUMEL = tl.constexpr(layout.NUMEL)
_SLOT = tl.constexpr(layout.SLOT)
_FLAGS = tl.constexpr(layout.FLAGS)
_TENSOR_WORDS = tl.constexpr(layout.TENSOR_WORDS)
_DECAY = tl.constexpr(layout.DECAY)
_GROUP_WORDS = tl.constexpr(layout.GROUP_WORDS)


@triton.jit(
    do_not_specialize=["n_items"],
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "counter", "watch", "arrivals", "flags", "partials", "sums",
        "ratios", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def lars_step(
    items,  # int64 [n_items]: the work, in ticket order
    tensors,  # int64 [n_tensors, TENSOR_WORDS]: addresses and sizes
    groups,  # float64 [n_groups, GROUP_WORDS]: hyper-parameters
    counter,  # int64 [1]: (epoch << 32) | next ticket
    watch,  # int64 [2]: whether every launch began at ticket 0
    arrivals,  # int32 [n_tensors]: chunks of the tensor summed so far, zero between launches
    flags,  # int64 [n_tensors]: (epoch, ratio) as published
    partials,  # float64 [n_slots, SUM_WORDS]
    sums,  # float64 [n_tensors, SUM_WORDS]: w², g², d², kept for layer_stats()
    ratios,  # float64 [n_tensors, RATIO_WORDS]: trust ratio and effective learning rate, likewise
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
    HOLD: tl.constexpr,
    EVICT: tl.constexpr,
    POLL_ATOMIC: tl.constexpr,
    BACKOFF: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """One optimizer step over every tensor of one dtype combination."""
    taken = tl.load(found_inf) == 0
    todo = tl.where(taken, n_items, 0)
    unscale = inverse_scale(grad_scale)
    word = tl.atomic_add(counter, 1, sem="relaxed")
    ticket = (word & TICKET_MASK).to(tl.int32)
    epoch = (word >> TICKET_BITS).to(tl.int32)
    if taken & (ticket == 0):
        watch_start(watch, epoch)
    item = tl.load(items + ticket, mask=ticket < todo, other=0)
    while ticket < todo:
        # The next ticket is asked for here and received, with its item, while the first data is on
        # its way. Safe: a program does its tickets in increasing order.
        drawn = draw(counter, THREADS)
        kind, tensor, group, chunk = unpack_item(item)
        row = tensors + tensor * _TENSOR_WORDS
        options = groups + group * _GROUP_WORDS
        # All that the first data load needs, in one batch.
        w_address, g_address = tl.load(row + _W_AT), tl.load(row + _G_AT)
        v_address = tl.load(row + _V_AT)
        numel, row_flags = tl.load(row + _NUMEL), tl.load(row + _FLAGS)
        first_slot = tl.load(row + _SLOT)
        switches = load_switches(options)
        factor = gradient_factor(switches, unscale)
        start, count, whole = chunk_span(numel, row_flags, chunk, CHUNK, BLOCK)
        ratio = tl.full([], 1.0, tl.float64)  # of a chunk that is not adapted
        next_ticket = ticket
        next_item = item

        if (kind & _NORM) != 0:
            w, g = load_pair(
                w_address, g_address, start, whole > 0,
                BLOCK, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
            )  # fmt: skip
            decay = tl.load(options + _DECAY).to(tl.float32)
            next_ticket = receive(drawn, THREADS)
            next_item = tl.load(items + next_ticket, mask=next_ticket < todo, other=0)
            # Or ptxas moves that load behind the loop over blocks, and its latency is exposed. With
            # fp16 gradients of fp32 weights there is no register left for it (compiled).
            if (tl.float16 != G_DT) | (tl.float16 == W_DT):
                tl.debug_barrier()
            w2, g2, d2 = chunk_square_sums(
                w, g, w_address, g_address, start, count, whole, factor, decay,
                CHUNK, BLOCK, THREADS, W_DT, G_DT, W_ALIGN, G_ALIGN, HOLD, EMULATE_BF16,
            )  # fmt: skip
            chunks = (numel + CHUNK - 1) // CHUNK
            complete = chunks == 1
            if chunks > 1:
                store_triple(partials, first_slot + chunk, w2, g2, d2)
                # acq_rel: releases this chunk's slot, and acquires all others for the last one.
                complete = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == chunks - 1
            if complete:
                ratio = finish_tensor(
                    tl.arange(0, LANES), tensor, chunks, first_slot, w2, g2, d2, options, switches,
                    epoch, kind == _NORM, arrivals, flags, partials, sums, ratios,
                    LANES, EMULATE_BF16,
                )  # fmt: skip

        if (kind & _UPDATE) != 0:
            w, g, v = load_triple(
                w_address, g_address, v_address, start, whole > 0,
                BLOCK, W_DT, G_DT, V_DT, W_ALIGN, G_ALIGN, V_ALIGN, EVICT, EMULATE_BF16,
            )  # fmt: skip
            # Everything else comes while that is on its way; only this item writes this chunk.
            rate = rate_words(options)
            momentum, keep, decay, nesterov, inside = update_rule(
                rule_words(options), switches, row_flags, epoch
            )
            if kind == _UPDATE:
                asked = ask(flags + tensor, POLL_ATOMIC)
                next_ticket = receive(drawn, THREADS)
                next_item = tl.load(items + next_ticket, mask=next_ticket < todo, other=0)
                ratio = wait_for_ratio(asked, flags + tensor, epoch, POLL_ATOMIC, BACKOFF)
            lr = learning_rate(rate, switches)
            copy_address = w_address
            if COPY_DT is not None:
                copy_address = tl.load(row + _COPY_AT)
            update_chunk(
                w, g, v, w_address, g_address, v_address, copy_address, start, count, whole,
                factor, ratio, lr, momentum, keep, decay, nesterov, inside,
                CHUNK, BLOCK, THREADS, W_DT, G_DT, V_DT, COPY_DT,
                W_ALIGN, G_ALIGN, V_ALIGN, COPY_ALIGN, EVICT, EMULATE_BF16,
            )  # fmt: skip
        ticket = next_ticket
        item = next_item

    last = todo + tl.num_programs(0) - 1
    end_of_launch(counter, watch, ticket, last, epoch, taken)
