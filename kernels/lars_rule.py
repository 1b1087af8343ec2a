"""LARS itself: the trust ratio of a tensor, and the update of one chunk.

Per element, in fp32 registers (symbols as in the README):

    d  = s·g + βw          s = ±1/loss_scale: the gradient's sign (maximize) and unscaling
    u  = q·d, or γq·d      γ inside the momentum buffer for lr_in_momentum
    v  = μv + (1-τ)u       τ = 0 on a tensor's first step and without momentum
    w  = w - v, or w - γv  nesterov: u + μv in the place of v

Each stored value (w, v, the low-precision copy) is rounded once, at its store.
Bytes a parameter in fp32: 12 read and 8 written.

A second rule (LAMB, say) replaces this file; `README.md` says what else it would need.
"""

import triton
import triton.language as tl

from . import layout
from .memory import (
    TAIL_TURNS,
    UNIT_DOWN,
    UNIT_UP,
    element_offset,
    load_block,
    narrow,
    pointer_to,
    widen,
)

_FRESH = tl.constexpr(layout.FRESH)
_LR = tl.constexpr(layout.LR)
_LR_AT = tl.constexpr(layout.LR_AT)
_SWITCHES = tl.constexpr(layout.SWITCHES)
_MOMENTUM = tl.constexpr(layout.MOMENTUM)
_KEEP = tl.constexpr(layout.KEEP)
_DECAY = tl.constexpr(layout.DECAY)
_TRUST = tl.constexpr(layout.TRUST)
_EPS = tl.constexpr(layout.EPS)
_RATIO = tl.constexpr(layout.RATIO)
_RATE = tl.constexpr(layout.RATE)
_RATIO_WORDS = tl.constexpr(layout.RATIO_WORDS)
_ADAPT = tl.constexpr(layout.ADAPT)
_MAXIMIZE = tl.constexpr(layout.MAXIMIZE)
_NESTEROV = tl.constexpr(layout.NESTEROV)
_LR_IN_MOMENTUM = tl.constexpr(layout.LR_IN_MOMENTUM)
_CLIP = tl.constexpr(layout.CLIP)
_DECAY_ZERO_NORM = tl.constexpr(layout.DECAY_ZERO_NORM)
_LR_IS_FP64 = tl.constexpr(layout.LR_IS_FP64)
_DECAYED = tl.constexpr(layout.DENOMINATORS["decayed"])
_NOT_SUM = tl.constexpr(sum(layout.DENOMINATORS.values()))

# Beyond this gain (gradients near the smallest of fp32) the unit is larger.
_GAIN_HUGE = tl.constexpr(2.0**220)
_UNIT_HUGE = tl.constexpr(2.0**126)
_FP32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def inverse_scale(grad_scale):
    """1/loss_scale, exact for a power of two."""
    return (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32)


@triton.jit
def load_switches(options):
    """Everything of a group's row that is not a number, as bits (`layout.py`)."""
    return tl.load(options + _SWITCHES).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def gradient_factor(switches, unscale):
    """Factor on the gradient, ±1/loss_scale: unscaling, and the sign for maximize."""
    return tl.where((switches & _MAXIMIZE) != 0, -unscale, unscale)


@triton.jit
def rate_words(options):
    """What `learning_rate` needs of a group's row: loads of which none waits."""
    return tl.load(options + _LR), tl.load(options + _LR_AT).to(tl.int64, bitcast=True)


@triton.jit
def learning_rate(words, switches):
    """γ as float64: from the table, or from the device tensor whose address the table holds."""
    lr, address = words
    if address != 0:
        if (switches & _LR_IS_FP64) != 0:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def waits_for_ratio(switches):
    """Whether an update needs its tensor's norms: not with adapt=False."""
    return (switches & _ADAPT) != 0


@triton.jit
def uses_decayed_norm(switches):
    """Whether the trust ratio is made of N(d) and not of N(s·g)."""
    return (switches & _DECAYED) != 0


@triton.jit
def ratio_options(options):
    """What `trust_ratio` needs of a group's row: one batch of loads, of which none waits."""
    return tl.load(options + _DECAY), tl.load(options + _EPS), tl.load(options + _TRUST)


@triton.jit
def trust_ratio(w2, norm2, loaded, switches, lr):
    """Trust ratio q (README, Semantics). Negative: use the raw gradient, without decay.

        q = η N(w) / D,  D = N(g) + βN(w) + ε | N(d) + ε | N(g) + ε
        q = 1 when N(w) = 0 or the denominator's norm is 0;  q = min(q/γ, 1) with trust_clip

    `norm2`: the square of N(d) or N(g) (`uses_decayed_norm`). `loaded`: `ratio_options`. A norm
    that is NaN makes q NaN, which poisons that tensor and no other.
    """
    decay, eps, trust = loaded
    adapt = (switches & _ADAPT) != 0
    w_norm = tl.sqrt(w2)
    norm = tl.sqrt(norm2)
    adapted = adapt & (w_norm != 0) & (norm != 0)
    below = norm + tl.where((switches & _NOT_SUM) == 0, decay, 0.0) * w_norm + eps
    q = trust * w_norm / tl.where(adapted, below, 1.0)
    if (switches & _CLIP) != 0:
        clipped = q / tl.where(lr == 0, 1.0, lr)
        q = tl.where((clipped > 1.0) | (lr == 0), 1.0, clipped)
    raw = adapt & ((switches & _DECAY_ZERO_NORM) == 0)
    return tl.where(adapted, q, tl.where(raw, -1.0, 1.0))


@triton.jit
def store_stats(ratios, tensor, ratio, lr):
    """Keep the trust ratio and the effective learning rate for layer_stats()."""
    row = ratios + _RATIO_WORDS * tensor
    tl.store(row + _RATIO, tl.abs(ratio))
    tl.store(row + _RATE, tl.abs(ratio) * lr)


@triton.jit
def direction(w, g, factor, decay):
    """What the step follows before any scaling: d = s·g + βw. The norm pass squares it too."""
    return g * factor + decay * w


@triton.jit
def apply_update(w, g, v, factor, decay, gain_unit, gain, momentum, keep, nesterov, out):
    """The update rule for one block: new w and new v."""
    u = direction(w, g, factor, decay) * gain_unit * gain
    v = momentum * v + keep * u
    return w - out * tl.where(nesterov, u + momentum * v, v), v


@triton.jit
def rule_words(options):
    """What `update_rule` needs of a group's row: loads of which none waits."""
    return tl.load(options + _MOMENTUM), tl.load(options + _KEEP), tl.load(options + _DECAY)


@triton.jit
def update_rule(words, switches, flags, epoch):
    """What an update needs besides ratio and γ: μ, 1-τ (1 on the first step), β, nesterov, inside.

    `flags`: of the tensor. `inside`: γ is within the momentum buffer.
    """
    momentum, keep, decay = words
    nesterov = (switches & _NESTEROV) != 0
    inside = (switches & _LR_IN_MOMENTUM) != 0
    fresh = ((flags & _FRESH) != 0) & (epoch == 1)
    keep = tl.where(fresh | (momentum == 0), 1.0, keep).to(tl.float32)
    return momentum.to(tl.float32), keep, decay.to(tl.float32), nesterov, inside


@triton.jit
def update_factors(ratio, lr, decay, inside):
    """What the elements of a tensor are updated with, in fp32: β, unit, gain, and the factor on v.

    Two factors where one fp32 number cannot hold the gain: a unit near its square root, so that
    neither product leaves fp32 before the other brings it back; a unit of 1 otherwise.
    """
    decay = tl.where(ratio < 0, 0.0, decay)
    out = tl.where(inside, 1.0, lr).to(tl.float32)
    gain = tl.abs(ratio) * tl.where(inside, lr, 1.0)
    unit = tl.where(gain > UNIT_UP, UNIT_UP, tl.where(gain < UNIT_DOWN, UNIT_DOWN, 1.0))
    back = tl.where(gain > UNIT_UP, UNIT_DOWN, tl.where(gain < UNIT_DOWN, UNIT_UP, 1.0))
    unit = tl.where(gain > _GAIN_HUGE, _UNIT_HUGE, unit).to(tl.float32)
    gain *= tl.where(gain > _GAIN_HUGE, 1.0 / _UNIT_HUGE, back)
    gain = tl.where(gain > _FP32_MAX, _FP32_MAX, gain).to(tl.float32)
    return decay, unit, gain, out


@triton.jit
def load_triple(
    w_address, g_address, v_address, at, there,
    BLOCK: tl.constexpr, W_DT: tl.constexpr, G_DT: tl.constexpr, V_DT: tl.constexpr,
    W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr,
    EVICT: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """A whole block of w, g and v (`load_block`): w and g for the last time. No v: zeros."""
    w = load_block(w_address, at, there, BLOCK, W_DT, W_ALIGN, EVICT, EMULATE_BF16)
    g = load_block(g_address, at, there, BLOCK, G_DT, G_ALIGN, EVICT, EMULATE_BF16)
    v_at = pointer_to(v_address, V_DT, V_ALIGN, EMULATE_BF16) + at + tl.arange(0, BLOCK)
    v = tl.load(v_at, mask=there & (v_address != 0), other=0)  # a hint was slower (tuning.py)
    return w, g, v


@triton.jit
def update_chunk(
    w, g, v, w_address, g_address, v_address, copy_address, start, count, whole,
    factor, ratio, lr, momentum, keep, decay, nesterov, inside,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, V_DT: tl.constexpr, COPY_DT: tl.constexpr,
    W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, COPY_ALIGN: tl.constexpr,
    EVICT: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Update one chunk in place, whose first whole block was loaded as w, g and v.

    COPY_DT None: w is the parameter. Otherwise w is its fp32 master, and the parameter is written
    beside it.
    """
    decay, unit, gain, out = update_factors(ratio, lr, decay, inside)
    has_v = v_address != 0
    lane = tl.arange(0, BLOCK)
    w_at = pointer_to(w_address, W_DT, W_ALIGN, EMULATE_BF16)
    v_at = pointer_to(v_address, V_DT, V_ALIGN, EMULATE_BF16)
    if COPY_DT is not None:
        copy_at = pointer_to(copy_address, COPY_DT, COPY_ALIGN, EMULATE_BF16)
    block = whole * 0
    while block < whole:
        at = start + element_offset(block, BLOCK)
        new_w, new_v = apply_update(
            widen(w, W_DT, EMULATE_BF16), widen(g, G_DT, EMULATE_BF16),
            widen(v, V_DT, EMULATE_BF16),
            factor, decay, unit, gain, momentum, keep, nesterov, out,
        )  # fmt: skip
        tl.store(w_at + at + lane, narrow(new_w, W_DT, EMULATE_BF16), eviction_policy=EVICT)
        new_v = narrow(new_v, V_DT, EMULATE_BF16)
        tl.store(v_at + at + lane, new_v, mask=has_v, eviction_policy=EVICT)
        if COPY_DT is not None:
            new_copy = narrow(new_w, COPY_DT, EMULATE_BF16)
            tl.store(copy_at + at + lane, new_copy, eviction_policy=EVICT)
        block += 1
        if BLOCK < CHUNK:
            w, g, v = load_triple(
                w_address, g_address, v_address, start + element_offset(block, BLOCK),
                block < whole, BLOCK, W_DT, G_DT, V_DT, W_ALIGN, G_ALIGN, V_ALIGN,
                EVICT, EMULATE_BF16,
            )  # fmt: skip
    update_tail(
        tl.arange(0, THREADS), w_address, g_address, v_address, copy_address, start,
        whole * BLOCK, count, factor, decay, unit, gain, momentum, keep, nesterov, out,
        THREADS, W_DT, G_DT, V_DT, COPY_DT, EMULATE_BF16,
    )  # fmt: skip


@triton.jit
def update_tail(
    thread, w_address, g_address, v_address, copy_address, start, done, count,
    factor, decay, unit, gain, momentum, keep, nesterov, out, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, V_DT: tl.constexpr, COPY_DT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """The rest of a chunk, and all of a misaligned one: element by element, some turns at a time.

    `thread`: 0 to THREADS - 1. Every turn's loads come before the first turn's stores, which the
    compiler may not reorder: it does not know that they touch other elements.
    """
    w_any = pointer_to(w_address, W_DT, 1, EMULATE_BF16)
    g_any = pointer_to(g_address, G_DT, 1, EMULATE_BF16)
    v_any = pointer_to(v_address, V_DT, 1, EMULATE_BF16)
    has_v = v_address != 0
    while done < count:
        loaded = ()
        for turn in tl.static_range(TAIL_TURNS):
            mask = done + turn * THREADS + thread < count
            at = start + done + turn * THREADS + thread
            w = tl.load(w_any + at, mask=mask, other=0)
            g = tl.load(g_any + at, mask=mask, other=0)
            v = tl.load(v_any + at, mask=mask & has_v, other=0)
            loaded = loaded + (w, g, v)  # noqa: RUF005 (triton has no starred expressions)
        for turn in tl.static_range(TAIL_TURNS):
            mask = done + turn * THREADS + thread < count
            at = start + done + turn * THREADS + thread
            w, v = apply_update(
                widen(loaded[3 * turn], W_DT, EMULATE_BF16),
                widen(loaded[3 * turn + 1], G_DT, EMULATE_BF16),
                widen(loaded[3 * turn + 2], V_DT, EMULATE_BF16),
                factor, decay, unit, gain, momentum, keep, nesterov, out,
            )  # fmt: skip
            new_v = narrow(v, V_DT, EMULATE_BF16)
            tl.store(w_any + at, narrow(w, W_DT, EMULATE_BF16), mask=mask)
            tl.store(v_any + at, new_v, mask=mask & has_v)
            if COPY_DT is not None:
                copy_any = pointer_to(copy_address, COPY_DT, 1, EMULATE_BF16)
                tl.store(copy_any + at, narrow(w, COPY_DT, EMULATE_BF16), mask=mask)
        done += TAIL_TURNS * THREADS
