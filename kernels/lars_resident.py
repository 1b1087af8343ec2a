"""All layers' norms and updates in one launch, w and g held on chip between the two.

    finishers    the first FINISHERS programs: add up the sums of the others (`finisher.py`)
    workers      all others: worker p takes items p, p + P, p + 2P, ..., of P workers: no tickets
    ring         SLOTS chunks of w and g in shared memory
    step s       item s is summed, item s - LAG is updated (LAG = SLOTS - 1), and item s + 2 sent
                 for, into the slot that item s + 1 - LAG has left for registers

`lars_step.py` leaves w and g to the L2 cache between a tensor's norms and its updates. Here each
worker keeps its chunks in shared memory and updates them from there: DRAM sees read w, g, v and
write w, v, 20 bytes a parameter in fp32, whatever the cache does. Of a tensor with more chunks than
all workers hold, the first ones get NORM items, and UPDATE items that copy them a second time.

A worker waits for nothing but ratios: it leaves its sums where a finisher finds them, each under
the tag of this launch, without a fence. What a step reads is sent for into L2 a step ahead of the
copy or the load that takes it from there.

Programs wait for one another with their rings full, so all of them must be resident: the launch is
cooperative. It cannot deadlock. Every chunk of a tensor is summed in an earlier step than any of
them is updated in (`_engine/plan.py`, order "resident"), so a worker waits only for tensors whose
last sum is of an earlier step than its own. Finishers take tensors in the order of their last sums,
so the first tensor without a ratio has a finisher that waits for nothing but its sums, and no
worker that has still to store one of them waits at all.

A chunk that is not whole, or misaligned, does not enter the ring: it is read from memory twice.

Written in Gluon, the language below Triton's, which has shared memory and asynchronous copies. Rule
and sums are those of `lars_step.py`: the same result to the bit where chunks are of the same size.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import layout
from .finisher import finish_sums, finish_tensors
from .lars_rule import (
    apply_update,
    gradient_factor,
    inverse_scale,
    learning_rate,
    update_factors,
    update_rule,
    update_tail,
    waits_for_ratio,
)
from .memory import chunk_span, narrow, pointer_to, widen
from .queue import (
    TICKET_BITS,
    TICKET_MASK,
    ask,
    unpack_item,
    wait_for_ratio,
    watch_start,
)
from .ring import (
    item_of,
    load_old_row,
    load_row,
    load_rule,
    prefetch_copy,
    prefetch_momentum,
    square_sums,
    start_copy,
    take_out,
)
from .sums import store_tagged, tag_of

_NORM = gl.constexpr(layout.NORM)
_UPDATE = gl.constexpr(layout.UPDATE)
_COPY_AT = gl.constexpr(layout.COPY_AT)
_TENSOR_WORDS = gl.constexpr(layout.TENSOR_WORDS)
_GROUP_WORDS = gl.constexpr(layout.GROUP_WORDS)


@gluon.jit(
    do_not_specialize=["n_items"],
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "counter", "watch", "arrivals", "flags", "partials", "sums",
        "ratios", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def lars_resident(
    items,  # int64: n_items of work; an item of each tensor of several chunks; FINISHERS zeros
    tensors,  # int64 [n_tensors, TENSOR_WORDS]: addresses and sizes
    groups,  # float64 [n_groups, GROUP_WORDS]: hyper-parameters
    counter,  # int64 [1]: (epoch << 32) | programs started
    watch,  # int64 [2]: whether every launch began with no program started
    arrivals,  # not used: `lars_step.py` has the same arguments
    flags,  # int64 [n_tensors]: (epoch, ratio) as published
    partials,  # float64 [n_slots, SUM_WORDS]: tagged (`sums.py`)
    sums,  # float64 [n_tensors, SUM_WORDS]: w², g², d², kept for layer_stats()
    ratios,  # float64 [n_tensors, RATIO_WORDS]: trust ratio and effective learning rate, likewise
    grad_scale,  # float32 [1]: gradients are divided by it
    found_inf,  # float32 [1]: non-zero skips the step
    n_items,
    CHUNK: gl.constexpr,
    THREADS: gl.constexpr,
    LANES: gl.constexpr,
    W_DT: gl.constexpr,
    G_DT: gl.constexpr,
    V_DT: gl.constexpr,
    COPY_DT: gl.constexpr,
    W_ALIGN: gl.constexpr,
    G_ALIGN: gl.constexpr,
    V_ALIGN: gl.constexpr,
    COPY_ALIGN: gl.constexpr,
    SLOTS: gl.constexpr,
    FINISHERS: gl.constexpr,
    EVICT: gl.constexpr,
    POLL_ATOMIC: gl.constexpr,
    BACKOFF: gl.constexpr,
):
    """One optimizer step over every tensor of one dtype combination."""
    LAG: gl.constexpr = SLOTS - 1  # steps from an item's sums to its update
    VECTOR: gl.constexpr = W_ALIGN * 8 // W_DT.primitive_bitwidth
    WARPS: gl.constexpr = THREADS // 32
    wide: gl.constexpr = gl.BlockedLayout([VECTOR], [32], [WARPS], [0])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    w_ring = gl.allocate_shared_memory(W_DT, [SLOTS, CHUNK], rows)
    g_ring = gl.allocate_shared_memory(G_DT, [SLOTS, CHUNK], rows)
    lane = gl.arange(0, CHUNK, layout=wide)
    thread = gl.arange(0, THREADS, layout=single)

    taken = gl.load(found_inf) == 0
    unscale = inverse_scale(grad_scale)
    # The counter numbers the programs in the order of their start, and carries the epoch; the last
    # to start resets it. A skipped step does not count, so that "first step" stays first.
    programs = gl.num_programs(0)
    word = gl.atomic_add(counter, 1, sem="relaxed")
    program = (word & TICKET_MASK).to(gl.int32)
    epoch = (word >> TICKET_BITS).to(gl.int32)
    if taken & (program == 0):
        watch_start(watch, epoch)
    if program == programs - 1:
        gl.store(counter, (epoch + taken).to(gl.int64) << TICKET_BITS)

    if taken & (program < FINISHERS):
        finish_tensors(
            items + n_items, program, FINISHERS, gl.arange(0, LANES, layout=single), epoch,
            tensors, groups, flags, partials, sums, ratios, CHUNK, LANES,
        )  # fmt: skip
    tag = tag_of(epoch)
    worker, workers = program - FINISHERS, programs - FINISHERS
    own = gl.where(taken & (worker >= 0), (n_items - worker + workers - 1) // workers, 0)
    steps = gl.where(own > 0, own + LAG, 0)
    step, slot = own * 0, own * 0 + 0
    # Words and rows of this step and of the next ones, of items to be summed and updated: what a
    # step loads of them has a whole step to arrive.
    item = item_of(items, step, worker, workers, own)
    item_1 = item_of(items, step + 1, worker, workers, own)
    item_2 = item_of(items, step + 2, worker, workers, own)
    item_3 = item_of(items, step + 3, worker, workers, own)
    old = item_of(items, step - LAG, worker, workers, own)
    old_1 = item_of(items, step + 1 - LAG, worker, workers, own)
    old_2 = item_of(items, step + 2 - LAG, worker, workers, own)
    row = load_row(tensors, groups, item)
    row_1 = load_row(tensors, groups, item_1)
    row_2 = load_row(tensors, groups, item_2)
    old_row = load_old_row(tensors, old)
    old_row_1 = load_old_row(tensors, old_1)
    rule, rule_1 = load_rule(groups, old), load_rule(groups, old_1)
    w, g, v = take_out(w_ring, g_ring, slot, old, old_row, lane, CHUNK, V_DT, V_ALIGN, wide)
    start_copy(w_ring, g_ring, slot, item, row, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN)
    slot_1 = slot + 1
    start_copy(w_ring, g_ring, slot_1, item_1, row_1, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN)
    while step < steps:
        old_kind, old_tensor, _, old_chunk = unpack_item(old)
        asked = ask(flags + old_tensor, POLL_ATOMIC)
        prefetch_momentum(old_1, old_row_1, thread, CHUNK, V_DT)
        prefetch_copy(item_2, row_2, thread, CHUNK, W_DT, G_DT)
        async_copy.wait_group(1)
        kind, tensor, group, chunk = unpack_item(item)
        w_address, g_address, numel, row_flags, first_slot, switches, decay = row
        norms = (kind & _NORM) != 0
        chunks = (numel + CHUNK - 1) // CHUNK
        if norms:
            start, count, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
            w2, g2, d2 = square_sums(
                w_ring.index(slot).load(wide), g_ring.index(slot).load(wide), thread,
                w_address, g_address, start, count, whole,
                gradient_factor(switches, unscale), decay.to(gl.float32),
                CHUNK, THREADS, VECTOR, W_DT, G_DT,
            )  # fmt: skip
            if chunks > 1:
                store_tagged(partials, first_slot + chunk, w2, g2, d2, tag, thread)
            else:
                options = groups + group * _GROUP_WORDS
                finish_sums(tensor, w2, g2, d2, options, switches, epoch, flags, sums, ratios)

        if (old_kind & _UPDATE) != 0:
            old_w, old_g, old_v, old_numel, old_flags = old_row
            old_switches, rate, words = rule
            momentum, keep, old_decay, nesterov, inside = update_rule(
                words, old_switches, old_flags, epoch
            )
            ratio = gl.to_tensor(1.0).to(gl.float64)
            if waits_for_ratio(old_switches):
                ratio = wait_for_ratio(asked, flags + old_tensor, epoch, POLL_ATOMIC, BACKOFF)
            lr = learning_rate(rate, old_switches)
            factor = gradient_factor(old_switches, unscale)
            old_decay, unit, gain, out = update_factors(ratio, lr, old_decay, inside)
            copy_address = old_w
            if COPY_DT is not None:
                copy_address = gl.load(tensors + old_tensor * _TENSOR_WORDS + _COPY_AT)
            old_start, old_count, old_whole = chunk_span(
                old_numel, old_flags, old_chunk, CHUNK, CHUNK
            )
            if old_whole > 0:
                new_w, new_v = apply_update(
                    widen(w, W_DT, False), widen(g, G_DT, False), widen(v, V_DT, False),
                    factor, old_decay, unit, gain, momentum, keep, nesterov, out,
                )  # fmt: skip
                w_at = pointer_to(old_w, W_DT, W_ALIGN, False) + old_start + lane
                v_at = pointer_to(old_v, V_DT, V_ALIGN, False) + old_start + lane
                gl.store(w_at, narrow(new_w, W_DT, False), eviction_policy=EVICT)
                gl.store(
                    v_at, narrow(new_v, V_DT, False), mask=(old_v != 0) & (lane >= 0),
                    eviction_policy=EVICT,
                )  # fmt: skip
                if COPY_DT is not None:
                    copy_at = pointer_to(copy_address, COPY_DT, COPY_ALIGN, False) + old_start
                    gl.store(copy_at + lane, narrow(new_w, COPY_DT, False), eviction_policy=EVICT)
            else:
                update_tail(
                    thread, old_w, old_g, old_v, copy_address, old_start, old_whole, old_count,
                    factor, old_decay, unit, gain, momentum, keep, nesterov, out,
                    THREADS, W_DT, G_DT, V_DT, COPY_DT, False,
                )  # fmt: skip

        row_3 = load_row(tensors, groups, item_3)
        item_4 = item_of(items, step + 4, worker, workers, own)
        old_row_2 = load_old_row(tensors, old_2)
        old_3 = item_of(items, step + 3 - LAG, worker, workers, own)
        # The oldest chunk leaves the ring, its momentum is sent for; into its place goes another.
        slot_2 = gl.where(slot_1 == SLOTS - 1, 0, slot_1 + 1)
        rule_2 = load_rule(groups, old_2)
        w, g, v = take_out(
            w_ring, g_ring, slot_2, old_1, old_row_1, lane, CHUNK, V_DT, V_ALIGN, wide
        )
        start_copy(w_ring, g_ring, slot_2, item_2, row_2, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN)

        item, item_1, item_2, item_3 = item_1, item_2, item_3, item_4
        old, old_1, old_2 = old_1, old_2, old_3
        row, row_1, row_2 = row_1, row_2, row_3
        old_row, old_row_1 = old_row_1, old_row_2
        rule, rule_1 = rule_1, rule_2
        slot, slot_1 = slot_1, slot_2
        step += 1
