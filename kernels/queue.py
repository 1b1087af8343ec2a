"""The ticket queue of one launch: drawing work, publishing a ratio, waiting for one."""

import triton
import triton.language as tl

from . import layout

_KIND_MASK = tl.constexpr(layout.BOTH)
_TENSOR_SHIFT = tl.constexpr(layout.TENSOR_SHIFT)
_TENSOR_MASK = tl.constexpr(layout.MAX_TENSORS - 1)
_GROUP_SHIFT = tl.constexpr(layout.GROUP_SHIFT)
_GROUP_MASK = tl.constexpr(layout.MAX_GROUPS - 1)
_CHUNK_SHIFT = tl.constexpr(layout.CHUNK_SHIFT)
TICKET_BITS = tl.constexpr(layout.TICKET_BITS)
TICKET_MASK = tl.constexpr((1 << layout.TICKET_BITS) - 1)
_LAST_EPOCH = tl.constexpr(layout.LAST_EPOCH)
_LOST_EPOCH = tl.constexpr(layout.LOST_EPOCH)
_RATIO_BITS = tl.constexpr(layout.RATIO_BITS)
_RATIO_MASK = tl.constexpr((1 << layout.RATIO_BITS) - 1)
_DROPPED = tl.constexpr(64 - layout.RATIO_BITS)  # low bits of a float64 that are not published
_HALF = tl.constexpr(1 << (63 - layout.RATIO_BITS))
_EPOCH_MASK = tl.constexpr((1 << (64 - layout.RATIO_BITS)) - 1)


@triton.jit
def unpack_item(item):
    """Kind, tensor, group and chunk of a work item."""
    tensor = (item >> _TENSOR_SHIFT) & _TENSOR_MASK
    group = (item >> _GROUP_SHIFT) & _GROUP_MASK
    return item & _KIND_MASK, tensor, group, (item >> _CHUNK_SHIFT).to(tl.int32)


@triton.jit
def watch_start(watch, epoch):
    """By the holder of ticket 0: notice a launch before this one whose queue was not at its start.

    Such a launch hands out no ticket 0, and the items before its first ticket are lost. Compared
    one launch later, when no other program can be at it, it takes no fence. The host compares the
    last launch when it reads the table.
    """
    if tl.load(watch + _LAST_EPOCH) != epoch - 1:
        tl.store(watch + _LOST_EPOCH, epoch - 1)
    tl.store(watch + _LAST_EPOCH, epoch)


@triton.jit
def end_of_launch(counter, watch, ticket, last, epoch, taken):
    """By every program on its one ticket past the work; `last`: the last one of the launch.

    Its holder resets the queue for the next launch; a skipped step does not count, so that "first
    step" stays first. If found_inf was written during the launch, programs disagree on the work,
    and the next launch may find its queue beyond the start. Two signs of that are noted: a ticket
    after the last, and a step that is skipped though its ticket 0 was not.
    """
    if ticket >= last:
        lost = ticket > last
        if ticket == last:
            lost = (taken == 0) & (tl.load(watch + _LAST_EPOCH) == epoch)
            tl.store(counter, (epoch + taken).to(tl.int64) << TICKET_BITS)
        if lost:
            tl.store(watch + _LOST_EPOCH, epoch)


@triton.jit
def draw(counter, THREADS: tl.constexpr):
    """Issue the atomic for the next ticket without waiting for its result.

    A scalar atomic would wait: it broadcasts its result to all threads at once. So would an atomic
    that adds the same in every thread: ptxas merges it over the warp and shuffles the result.
    """
    lane = tl.arange(0, THREADS)
    return tl.atomic_add(counter + lane * 0, lane.to(tl.int64) + 1, mask=lane == 0, sem="relaxed")


@triton.jit
def receive(drawn, THREADS: tl.constexpr):
    """Ticket that `draw` asked for."""
    ticket = tl.sum(tl.where(tl.arange(0, THREADS) == 0, drawn, 0))
    return (ticket & TICKET_MASK).to(tl.int32)


@triton.jit
def _encode(ratio):
    """The top 48 bits of a float64, rounded: sign, the whole exponent, 36 bits of mantissa.

    A ratio can pass fp32's range both ways (weights of 1e3 over gradients of 1e-40); what is
    published beside a 16-bit epoch keeps its exponent and is still finer than fp32.
    """
    return ((ratio.to(tl.int64, bitcast=True) + _HALF) >> _DROPPED) & _RATIO_MASK


@triton.jit
def _decode(code):
    """The value of a code, in float64. Bits above the 48 are shifted out."""
    return (code << _DROPPED).to(tl.float64, bitcast=True)


@triton.jit
def as_published(ratio):
    """A ratio as its readers get it: rounded to the bits that are published."""
    return _decode(_encode(ratio))


@triton.jit
def publish(flag, epoch, ratio):
    """Publish a ratio together with its step in one 64-bit word.

    So its reader needs no fence, and no flag is cleared between steps.
    """
    tl.atomic_xchg(
        flag, ((epoch.to(tl.int64) & _EPOCH_MASK) << _RATIO_BITS) | _encode(ratio), sem="relaxed"
    )


@triton.jit
def ask(flag, POLL_ATOMIC: tl.constexpr):
    """Read a flag; the first use of the answer waits for it.

    A plain load in a spin loop is hoisted or deleted. NVIDIA keeps a volatile one; the AMD backend
    drops `volatile`, so that only an atomic read works there. Every warp reads for itself: sharing
    one warp's answer would take a barrier, and registers that are live in every item.
    """
    if POLL_ATOMIC:
        word = tl.atomic_add(flag, 0, sem="relaxed")
    else:
        word = tl.load(flag, volatile=True)
    return word


@triton.jit
def _pause(word, BACKOFF: tl.constexpr):
    """Sleep for about BACKOFF ns. `word` passes through, so that the next poll comes later."""
    return tl.inline_asm_elementwise(
        "nanosleep.u32 $2; mov.b64 $0, $1;", "=l,l,r", [word, BACKOFF], tl.int64, False, 1
    )


@triton.jit
def wait_for_ratio(word, flag, epoch, POLL_ATOMIC: tl.constexpr, BACKOFF: tl.constexpr):
    """Spin until the ratio of this step is published. `word`: a first read of its flag."""
    while ((word >> _RATIO_BITS) & _EPOCH_MASK).to(tl.int32) != (epoch & _EPOCH_MASK):
        if BACKOFF:
            word = _pause(word, BACKOFF)
        word = ask(flag, POLL_ATOMIC)
    return _decode(word)
