"""All layers' norms and updates in one launch, w and g held on chip between the two.

    program      takes every P-th item of the list, of P programs: no tickets
    ring         SLOTS chunks of w and g in shared memory
    step s       its item s is summed, item s - LAG is updated (LAG = SLOTS - 1), and item s + 2
                 sent for, into the slot that item s + 1 - LAG has left for registers

`lars_step.py` leaves w and g to the L2 cache between a tensor's norms and its updates. Here each
program keeps its chunks in shared memory and updates them from there: DRAM sees read w, g, v and
write w, v, 20 bytes a parameter in fp32, whatever the cache does. Of a tensor with more chunks than
all programs hold, the first ones get NORM items, and UPDATE items that copy them a second time.

Programs wait for one another with their rings full, so all of them must be resident: the launch is
cooperative. It cannot deadlock: an item waits for nothing but a ratio, and every chunk of a tensor
is summed in an earlier step than any of them is updated in (`_engine/plan.py`, order "resident"),
so that the programs at the earliest step wait for nothing.

A chunk that is not whole, or misaligned, does not enter the ring: it is read from memory twice.

Written in Gluon, the language below Triton's, which has shared memory and asynchronous copies. Rule
and sums are those of `lars_step.py`, with the same result to the bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import layout
from .lars_rule import (
    apply_update,
    gradient_factor,
    inverse_scale,
    learning_rate,
    load_switches,
    rate_words,
    rule_words,
    update_factors,
    update_rule,
    update_tail,
    waits_for_ratio,
)
from .last_chunk import finish_tensor
from .memory import chunk_span, narrow, pointer_to, widen
from .queue import (
    TICKET_BITS,
    TICKET_MASK,
    ask,
    unpack_item,
    wait_for_ratio,
    watch_start,
)
from .sums import (
    add_tail_squares,
    by_thread,
    in_plain_units,
    rescue_unit,
    squares,
    store_triple,
    sum3,
)

_NORM = gl.constexpr(layout.NORM)
_UPDATE = gl.constexpr(layout.UPDATE)
_W_AT = gl.constexpr(layout.W_AT)
_G_AT = gl.constexpr(layout.G_AT)
_V_AT = gl.constexpr(layout.V_AT)
_COPY_AT = gl.constexpr(layout.COPY_AT)
_NUMEL = gl.constexpr(layout.NUMEL)
_SLOT = gl.constexpr(layout.SLOT)
_FLAGS = gl.constexpr(layout.FLAGS)
_TENSOR_WORDS = gl.constexpr(layout.TENSOR_WORDS)
_DECAY = gl.constexpr(layout.DECAY)
_GROUP_WORDS = gl.constexpr(layout.GROUP_WORDS)


@gluon.jit
def _item_of(items, step, program, programs, own):
    """A program's item of a step; one of no kind before its first and behind its last."""
    return gl.load(items + step * programs + program, mask=(step >= 0) & (step < own), other=0)


@gluon.jit
def _load_row(tensors, groups, item):
    """What copying and summing an item need of its rows: one batch of loads."""
    _, tensor, group, _ = unpack_item(item)
    row, options = tensors + tensor * _TENSOR_WORDS, groups + group * _GROUP_WORDS
    switches, decay = load_switches(options), gl.load(options + _DECAY)
    w_address, g_address = gl.load(row + _W_AT), gl.load(row + _G_AT)
    numel, row_flags = gl.load(row + _NUMEL), gl.load(row + _FLAGS)
    return w_address, g_address, numel, row_flags, gl.load(row + _SLOT), switches, decay


@gluon.jit
def _load_old_row(tensors, item):
    """What updating an item needs of its tensor's row."""
    _, tensor, _, _ = unpack_item(item)
    row = tensors + tensor * _TENSOR_WORDS
    w_address, g_address = gl.load(row + _W_AT), gl.load(row + _G_AT)
    v_address, numel = gl.load(row + _V_AT), gl.load(row + _NUMEL)
    return w_address, g_address, v_address, numel, gl.load(row + _FLAGS)


@gluon.jit
def _load_rule(groups, item):
    """What updating an item needs of its group."""
    _, _, group, _ = unpack_item(item)
    options = groups + group * _GROUP_WORDS
    return load_switches(options), rate_words(options), rule_words(options)


@gluon.jit
def _take_out(
    w_ring, g_ring, slot, item, row, lane,
    CHUNK: gl.constexpr, V_DT: gl.constexpr, V_ALIGN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A held chunk, and its momentum if it is to be updated and whole: zeros otherwise."""
    _, _, v_address, numel, row_flags = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = ((kind & _UPDATE) != 0) & (whole > 0) & (v_address != 0) & (lane >= 0)
    v_at = pointer_to(v_address, V_DT, V_ALIGN, False) + start + lane
    v = gl.load(v_at, mask=there, other=0)
    return w_ring.index(slot).load(LAYOUT), g_ring.index(slot).load(LAYOUT), v


@gluon.jit
def _start_copy(
    w_ring, g_ring, slot, item, row, lane, CHUNK: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr, W_ALIGN: gl.constexpr, G_ALIGN: gl.constexpr,
):  # fmt: skip
    """Send for an item's w and g, if its chunk is whole: one commit group, also of nothing."""
    w_address, g_address, numel, row_flags, _, _, _ = row
    kind, _, _, chunk = unpack_item(item)
    start, _, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
    there = (kind != 0) & (whole > 0) & (lane >= 0)
    w_at = pointer_to(w_address, W_DT, W_ALIGN, False) + start + lane
    g_at = pointer_to(g_address, G_DT, G_ALIGN, False) + start + lane
    async_copy.async_copy_global_to_shared(w_ring.index(slot), w_at, mask=there)
    async_copy.async_copy_global_to_shared(g_ring.index(slot), g_at, mask=there)
    async_copy.commit_group()


@gluon.jit
def _sum_once(
    w, g, thread, w_address, g_address, start, count, whole, factor, decay, w_unit, g_unit, d_unit,
    RESCALE: gl.constexpr, BLOCK: gl.constexpr, THREADS: gl.constexpr, VECTOR: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr,
):  # fmt: skip
    """Sums of squares in fp32 over a chunk: of its held elements, or element by element."""
    if whole > 0:
        w2, g2, d2 = squares(
            w, g, factor, decay, w_unit, g_unit, d_unit, RESCALE, W_DT, G_DT, False
        )
        w_sum, g_sum, d_sum = sum3(
            by_thread(w2, BLOCK, THREADS, VECTOR), by_thread(g2, BLOCK, THREADS, VECTOR),
            by_thread(d2, BLOCK, THREADS, VECTOR), False,
        )  # fmt: skip
    else:
        zero = (thread * 0).to(gl.float32)
        w_part, g_part, d_part = add_tail_squares(
            zero, zero, zero, thread, w_address, g_address, start, whole, count,
            factor, decay, w_unit, g_unit, d_unit, RESCALE, THREADS, W_DT, G_DT, False,
        )  # fmt: skip
        w_sum, g_sum, d_sum = sum3(w_part, g_part, d_part, False)
    return w_sum, g_sum, d_sum


@gluon.jit
def _square_sums(
    w, g, thread, w_address, g_address, start, count, whole, factor, decay,
    BLOCK: gl.constexpr, THREADS: gl.constexpr, VECTOR: gl.constexpr,
    W_DT: gl.constexpr, G_DT: gl.constexpr,
):  # fmt: skip
    """`sums.chunk_square_sums` of a held chunk."""
    one = gl.to_tensor(1.0)
    w_sum, g_sum, d_sum = _sum_once(
        w, g, thread, w_address, g_address, start, count, whole, factor, decay, one, one, one,
        False, BLOCK, THREADS, VECTOR, W_DT, G_DT,
    )  # fmt: skip
    w_unit = rescue_unit(w_sum)
    g_unit = rescue_unit(g_sum)
    d_unit = rescue_unit(d_sum)
    if not ((w_unit == 1.0) & (g_unit == 1.0) & (d_unit == 1.0)):
        w_sum, g_sum, d_sum = _sum_once(
            w, g, thread, w_address, g_address, start, count, whole, factor, decay,
            w_unit, g_unit, d_unit,
            True, BLOCK, THREADS, VECTOR, W_DT, G_DT,
        )  # fmt: skip
    return (
        in_plain_units(w_sum, w_unit),
        in_plain_units(g_sum, g_unit),
        in_plain_units(d_sum, d_unit),
    )


@gluon.jit(
    do_not_specialize=["n_items"],
    do_not_specialize_on_alignment=[
        "items", "tensors", "groups", "counter", "watch", "arrivals", "flags", "partials", "sums",
        "ratios", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def lars_resident(
    items,  # int64 [n_items]: the work; program p of P takes items p, p + P, p + 2P, ...
    tensors,  # int64 [n_tensors, TENSOR_WORDS]: addresses and sizes
    groups,  # float64 [n_groups, GROUP_WORDS]: hyper-parameters
    counter,  # int64 [1]: (epoch << 32) | programs started
    watch,  # int64 [2]: whether every launch began with no program started
    arrivals,  # int32 [n_tensors]: chunks of the tensor summed so far, zero between launches
    flags,  # int64 [n_tensors]: (epoch, ratio) as published
    partials,  # float64 [n_slots, SUM_WORDS]
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

    own = gl.where(taken, (n_items - program + programs - 1) // programs, 0)
    steps = gl.where(own > 0, own + LAG, 0)
    step, slot = own * 0, own * 0 + 0
    # Words and rows of this step and of the next ones, of items to be summed and updated: what a
    # step loads of them has a whole step to arrive.
    item = _item_of(items, step, program, programs, own)
    item_1 = _item_of(items, step + 1, program, programs, own)
    item_2 = _item_of(items, step + 2, program, programs, own)
    item_3 = _item_of(items, step + 3, program, programs, own)
    old = _item_of(items, step - LAG, program, programs, own)
    old_1 = _item_of(items, step + 1 - LAG, program, programs, own)
    old_2 = _item_of(items, step + 2 - LAG, program, programs, own)
    row = _load_row(tensors, groups, item)
    row_1 = _load_row(tensors, groups, item_1)
    row_2 = _load_row(tensors, groups, item_2)
    old_row = _load_old_row(tensors, old)
    old_row_1 = _load_old_row(tensors, old_1)
    rule, rule_1 = _load_rule(groups, old), _load_rule(groups, old_1)
    w, g, v = _take_out(w_ring, g_ring, slot, old, old_row, lane, CHUNK, V_DT, V_ALIGN, wide)
    _start_copy(w_ring, g_ring, slot, item, row, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN)
    slot_1 = slot + 1
    _start_copy(w_ring, g_ring, slot_1, item_1, row_1, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN)
    while step < steps:
        old_kind, old_tensor, _, old_chunk = unpack_item(old)
        asked = ask(flags + old_tensor, POLL_ATOMIC)
        async_copy.wait_group(1)
        kind, tensor, group, chunk = unpack_item(item)
        w_address, g_address, numel, row_flags, first_slot, switches, decay = row
        norms = (kind & _NORM) != 0
        chunks = (numel + CHUNK - 1) // CHUNK
        arrived = thread * 0
        none = gl.to_tensor(0.0).to(gl.float64)
        w2, g2, d2 = none, none, none
        if norms:
            start, count, whole = chunk_span(numel, row_flags, chunk, CHUNK, CHUNK)
            w2, g2, d2 = _square_sums(
                w_ring.index(slot).load(wide), g_ring.index(slot).load(wide), thread,
                w_address, g_address, start, count, whole,
                gradient_factor(switches, unscale), decay.to(gl.float32),
                CHUNK, THREADS, VECTOR, W_DT, G_DT,
            )  # fmt: skip
            if chunks > 1:
                store_triple(partials, first_slot + chunk, w2, g2, d2)
            # acq_rel: releases this chunk's slot, and acquires all others for the last one. Each
            # thread adds something else: ptxas would hand round the answer to equal ones at once.
            arrived = gl.atomic_add(
                arrivals + tensor + thread * 0, thread + 1, mask=(thread == 0) & (chunks > 1),
                sem="acq_rel",
            )  # fmt: skip

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

        row_3 = _load_row(tensors, groups, item_3)
        item_4 = _item_of(items, step + 4, program, programs, own)
        old_row_2 = _load_old_row(tensors, old_2)
        old_3 = _item_of(items, step + 3 - LAG, program, programs, own)
        # The oldest chunk leaves the ring, its momentum is sent for; into its place goes another.
        slot_2 = gl.where(slot_1 == SLOTS - 1, 0, slot_1 + 1)
        rule_2 = _load_rule(groups, old_2)
        w, g, v = _take_out(
            w_ring, g_ring, slot_2, old_1, old_row_1, lane, CHUNK, V_DT, V_ALIGN, wide
        )
        _start_copy(
            w_ring, g_ring, slot_2, item_2, row_2, lane, CHUNK, W_DT, G_DT, W_ALIGN, G_ALIGN
        )

        # The answer of the arrival, which nothing has waited for so far.
        if norms:
            before = gl.sum(gl.where(thread == 0, arrived, 0), 0)
            if (chunks == 1) | (before == chunks - 1):
                finish_tensor(
                    gl.arange(0, LANES, layout=single), tensor, chunks, first_slot, w2, g2, d2,
                    groups + group * _GROUP_WORDS, switches, epoch, True,
                    arrivals, flags, partials, sums, ratios, True, LANES, False,
                )  # fmt: skip
        item, item_1, item_2, item_3 = item_1, item_2, item_3, item_4
        old, old_1, old_2 = old_1, old_2, old_3
        row, row_1, row_2 = row_1, row_2, row_3
        old_row, old_row_1 = old_row_1, old_row_2
        rule, rule_1 = rule_1, rule_2
        slot, slot_1 = slot_1, slot_2
        step += 1
