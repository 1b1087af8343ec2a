"""What every kernel shares: where things lie in memory, the trust ratio, the update of one chunk.

Per element, in fp32 registers (symbols as in the README):

    d  = s·g + βw          s = ±1/loss_scale: the gradient's sign (maximize) and unscaling
    u  = q·d, or γq·d      γ inside the momentum buffer for lr_in_momentum
    v  = μv + (1-τ)u       τ = 0 on a tensor's first step and without momentum
    w  = w - v, or w - γv  nesterov: u + μv in the place of v

Each stored value (w, v, the low-precision copy) is rounded once, at its store.
Bytes a parameter in fp32: 8 to sum the squares, 12 read and 8 written to update.
"""

import triton
import triton.language as tl

# A tensor's row: eight 64-bit words. Addresses are bytes; zero means "there is none".
W_AT = tl.constexpr(0)
G_AT = tl.constexpr(1)
V_AT = tl.constexpr(2)
COPY_AT = tl.constexpr(3)
NUMEL = tl.constexpr(4)
SLOT = tl.constexpr(5)  # first partial-sum slot, for a tensor of several chunks
GROUP = tl.constexpr(6)
FLAGS = tl.constexpr(7)
TENSOR_WORDS = tl.constexpr(8)
ALIGNED = tl.constexpr(1)  # every address allows 128-bit access
FRESH = tl.constexpr(2)  # no momentum yet: epoch 1 of this plan is the tensor's first step

# A group's row: sixteen 64-bit words, all float64 but LR_AT.
LR = tl.constexpr(0)
LR_AT = tl.constexpr(1)  # address of a learning rate that lives in device memory, or zero
LR_IS_FP64 = tl.constexpr(2)
MOMENTUM = tl.constexpr(3)
KEEP = tl.constexpr(4)  # 1 - dampening
DECAY = tl.constexpr(5)
TRUST = tl.constexpr(6)
EPS = tl.constexpr(7)
SIGN = tl.constexpr(8)  # -1 to maximize
ADAPT = tl.constexpr(9)
DENOMINATOR = tl.constexpr(10)
NESTEROV = tl.constexpr(11)
LR_IN_MOMENTUM = tl.constexpr(12)
CLIP = tl.constexpr(13)
DECAY_ZERO_NORM = tl.constexpr(14)
GROUP_WORDS = tl.constexpr(16)

# Values of DENOMINATOR.
SUM = tl.constexpr(0)
DECAYED = tl.constexpr(1)
GRADIENT = tl.constexpr(2)

# A work item: kind in 2 bits, tensor in 30, chunk in 32.
NORM = tl.constexpr(1)
UPDATE = tl.constexpr(2)

# Factors that bring a value into fp32's range: exact, being powers of two.
UNIT_UP = tl.constexpr(2.0**100)
UNIT_DOWN = tl.constexpr(2.0**-100)
# Beyond this gain (gradients near the smallest of fp32) the unit is larger.
GAIN_HUGE = tl.constexpr(2.0**220)
UNIT_HUGE = tl.constexpr(2.0**126)
FP32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Typed pointer to an int64 address; ALIGN bytes are promised to the compiler when above 1.

    The hint must sit on the result of a cast of its own: the compiler keeps it on the defining
    operation, where it would also claim alignment in a branch that does not have it.
    """
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGN > 1:
        pointer = tl.multiple_of(pointer, ALIGN)
    return pointer


@triton.jit
def widen(x, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Exact fp32 value of a loaded element. The interpreter widens bf16 subnormals wrongly."""
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Fp32 rounded to nearest even in DTYPE. The interpreter truncates to bf16, a GPU rounds."""
    if EMULATE_BF16 and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.uint16)
    return x.to(DTYPE)


@triton.jit
def element_offset(index, SIZE: tl.constexpr):
    """First element of chunk or block `index`. 64-bit: a tensor may pass 2^31 elements."""
    return index.to(tl.int64) * SIZE


@triton.jit
def unpack_item(item):
    """Kind, tensor and chunk of a work item."""
    return item & 3, (item >> 2) & 0x3FFFFFFF, (item >> 32).to(tl.int32)


@triton.jit
def chunk_span(row, chunk, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """First element of a chunk, its element count, and how many whole aligned blocks lead it."""
    start = element_offset(chunk, CHUNK)
    count = tl.minimum(tl.load(row + NUMEL) - start, CHUNK).to(tl.int32)
    aligned = (tl.load(row + FLAGS) & ALIGNED) != 0
    return start, count, tl.where(aligned, count // BLOCK, 0)


@triton.jit
def inverse_scale(grad_scale):
    """1/loss_scale, exact for a power of two."""
    return (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32)


@triton.jit
def gradient_factor(options, unscale):
    """S = ±1/loss_scale."""
    return tl.load(options + SIGN).to(tl.float32) * unscale


@triton.jit
def learning_rate(options, option_words):
    """γ as float64: from the table, or from the device tensor whose address the table holds."""
    lr = tl.load(options + LR)
    address = tl.load(option_words + LR_AT)
    if address != 0:
        if tl.load(options + LR_IS_FP64) != 0:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def encode_ratio(ratio):
    """The top 48 bits of a float64, rounded: sign, the whole exponent, 36 bits of mantissa.

    A ratio can pass fp32's range both ways (weights of 1e3 over gradients of 1e-40); what is
    published beside a 16-bit epoch keeps its exponent and is still finer than fp32.
    """
    return ((ratio.to(tl.int64, bitcast=True) + 0x8000) >> 16) & 0xFFFFFFFFFFFF


@triton.jit
def decode_ratio(code):
    """Float64 value of a code. Bits above the 48 are shifted out."""
    return (code << 16).to(tl.float64, bitcast=True)


@triton.jit
def trust_ratio(w2, g2, d2, options, lr):
    """Q of design section 2, negated where the gradient is to be used raw (no decay either).

        q = η N(w) / D,  D = N(g) + βN(w) + ε | N(d) + ε | N(g) + ε
        q = 1 when N(w) = 0 or the denominator's norm is 0;  q = min(q/γ, 1) with trust_clip

    A norm that is NaN makes q NaN: the whole tensor shows it, no other tensor does.
    """
    w_norm = tl.sqrt(w2)
    mode = tl.load(options + DENOMINATOR)
    norm = tl.sqrt(tl.where(mode == DECAYED, d2, g2))
    adapt = tl.load(options + ADAPT) != 0
    adapted = adapt & (w_norm != 0) & (norm != 0)
    decay = tl.where(mode == SUM, tl.load(options + DECAY), 0.0)
    below = norm + decay * w_norm + tl.load(options + EPS)
    q = tl.load(options + TRUST) * w_norm / tl.where(adapted, below, 1.0)
    clipped = q / tl.where(lr == 0, 1.0, lr)
    clipped = tl.where((clipped > 1.0) | (lr == 0), 1.0, clipped)
    q = tl.where(tl.load(options + CLIP) != 0, clipped, q)
    raw = adapt & (tl.load(options + DECAY_ZERO_NORM) == 0)
    q = tl.where(adapted, q, tl.where(raw, -1.0, 1.0))
    return decode_ratio(encode_ratio(q))


@triton.jit
def store_stats(ratios, tensor, ratio, lr):
    """Keep the trust ratio and the effective learning rate for layer_stats()."""
    tl.store(ratios + 2 * tensor, tl.abs(ratio))
    tl.store(ratios + 2 * tensor + 1, tl.abs(ratio) * lr)


@triton.jit
def _apply(w, g, v, factor, decay, gain_unit, gain, momentum, keep, nesterov, out):
    """The update rule for one block: new w and new v."""
    u = (g * factor + decay * w) * gain_unit * gain
    v = momentum * v + keep * u
    return w - out * tl.where(nesterov, u + momentum * v, v), v


@triton.jit
def update_rule(options, row, epoch):
    """What an update needs besides ratio and γ: μ, 1-τ (1 on the first step), β, nesterov, inside.

    `inside`: γ is within the momentum buffer.
    """
    momentum = tl.load(options + MOMENTUM)
    fresh = ((tl.load(row + FLAGS) & FRESH) != 0) & (epoch == 1)
    keep = tl.where(fresh | (momentum == 0), 1.0, tl.load(options + KEEP)).to(tl.float32)
    decay = tl.load(options + DECAY).to(tl.float32)
    nesterov = tl.load(options + NESTEROV) != 0
    inside = tl.load(options + LR_IN_MOMENTUM) != 0
    return momentum.to(tl.float32), keep, decay, nesterov, inside


@triton.jit
def update_chunk(
    row, w_address, g_address, start, count, whole, factor, ratio, lr,
    momentum, keep, decay, nesterov, inside,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
    W_DT: tl.constexpr, G_DT: tl.constexpr, V_DT: tl.constexpr, COPY_DT: tl.constexpr,
    W_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, COPY_ALIGN: tl.constexpr,
    EVICT: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Update one chunk in place.

    COPY_DT None: w is the parameter. Otherwise w is its fp32 master, and the parameter is written
    beside it.
    """
    decay = tl.where(ratio < 0, 0.0, decay)
    out = tl.where(inside, 1.0, lr).to(tl.float32)
    gain = tl.abs(ratio) * tl.where(inside, lr, 1.0)
    # Two factors where one fp32 number cannot hold the gain: a unit near its square root, so that
    # neither product leaves fp32 before the other brings it back; a unit of 1 otherwise.
    unit = tl.where(gain > UNIT_UP, UNIT_UP, tl.where(gain < UNIT_DOWN, UNIT_DOWN, 1.0))
    back = tl.where(gain > UNIT_UP, UNIT_DOWN, tl.where(gain < UNIT_DOWN, UNIT_UP, 1.0))
    unit = tl.where(gain > GAIN_HUGE, UNIT_HUGE, unit).to(tl.float32)
    gain *= tl.where(gain > GAIN_HUGE, 1.0 / UNIT_HUGE, back)
    gain = tl.where(gain > FP32_MAX, FP32_MAX, gain).to(tl.float32)

    lane = tl.arange(0, BLOCK)
    v_address = tl.load(row + V_AT)
    has_v = v_address != 0
    w_at = pointer_to(w_address, W_DT, W_ALIGN, EMULATE_BF16)
    g_at = pointer_to(g_address, G_DT, G_ALIGN, EMULATE_BF16)
    v_at = pointer_to(v_address, V_DT, V_ALIGN, EMULATE_BF16)
    if COPY_DT is not None:
        copy_at = pointer_to(tl.load(row + COPY_AT), COPY_DT, COPY_ALIGN, EMULATE_BF16)
    block = whole * 0
    while block < whole:
        at = start + element_offset(block, BLOCK)
        w = tl.load(w_at + at + lane, eviction_policy=EVICT)
        g = tl.load(g_at + at + lane, eviction_policy=EVICT)
        v = tl.load(v_at + at + lane, mask=has_v, other=0, eviction_policy=EVICT)
        w, v = _apply(
            widen(w, W_DT, EMULATE_BF16), widen(g, G_DT, EMULATE_BF16),
            widen(v, V_DT, EMULATE_BF16),
            factor, decay, unit, gain, momentum, keep, nesterov, out,
        )  # fmt: skip
        new_v = narrow(v, V_DT, EMULATE_BF16)
        tl.store(w_at + at + lane, narrow(w, W_DT, EMULATE_BF16), eviction_policy=EVICT)
        tl.store(v_at + at + lane, new_v, mask=has_v, eviction_policy=EVICT)
        if COPY_DT is not None:
            tl.store(copy_at + at + lane, narrow(w, COPY_DT, EMULATE_BF16), eviction_policy=EVICT)
        block += 1

    w_any = pointer_to(w_address, W_DT, 1, EMULATE_BF16)
    g_any = pointer_to(g_address, G_DT, 1, EMULATE_BF16)
    v_any = pointer_to(v_address, V_DT, 1, EMULATE_BF16)
    if COPY_DT is not None:
        copy_any = pointer_to(tl.load(row + COPY_AT), COPY_DT, 1, EMULATE_BF16)
    thread = tl.arange(0, THREADS)
    done = whole * BLOCK
    while done < count:
        mask = done + thread < count
        at = start + done
        w = tl.load(w_any + at + thread, mask=mask, other=0)
        g = tl.load(g_any + at + thread, mask=mask, other=0)
        v = tl.load(v_any + at + thread, mask=mask & has_v, other=0)
        w, v = _apply(
            widen(w, W_DT, EMULATE_BF16), widen(g, G_DT, EMULATE_BF16),
            widen(v, V_DT, EMULATE_BF16),
            factor, decay, unit, gain, momentum, keep, nesterov, out,
        )  # fmt: skip
        new_v = narrow(v, V_DT, EMULATE_BF16)
        tl.store(w_any + at + thread, narrow(w, W_DT, EMULATE_BF16), mask=mask)
        tl.store(v_any + at + thread, new_v, mask=mask & has_v)
        if COPY_DT is not None:
            tl.store(copy_any + at + thread, narrow(w, COPY_DT, EMULATE_BF16), mask=mask)
        done += THREADS
