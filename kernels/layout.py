"""Where things lie in the tables that host and kernels share: plain integers, no triton, no torch.

The host writes these tables (`lars_fused/_engine/launch_tables.py`), jit code reads them. Jit code
may use constexpr globals alone, so each file of kernels wraps the names that it needs:
`_DECAY = tl.constexpr(layout.DECAY)`.

    items     int64 [n]                 kind | tensor << 2 | group << 24 | chunk << 40
    tensors   int64 [n, TENSOR_WORDS]   a tensor: addresses in bytes (0: there is none) and sizes
    groups    float64 [n, GROUP_WORDS]  a parameter group: its hyper-parameters
    sums      float64 [n, SUM_WORDS]    of a tensor, or of one of its chunks ("slot")
    ratios    float64 [n, RATIO_WORDS]  of a tensor, kept for layer_stats()
    counter   int64 [1]                 epoch << 32 | next ticket
    watch     int64 [2]                 last epoch whose first ticket was drawn; the one that lost
                                        work, or 0
    flags     int64 [n]                 epoch << 48 | the trust ratio's top 48 bits, once published
"""

from typing import Protocol, TypeVar


class _Bits(Protocol):
    """An int, or a tensor of them."""

    def __and__(self: "Word", other: int, /) -> "Word": ...
    def __rshift__(self: "Word", other: int, /) -> "Word": ...


Word = TypeVar("Word", bound=_Bits)

# A tensor's row.
W_AT, G_AT, V_AT, COPY_AT, NUMEL, SLOT, GROUP, FLAGS = range(8)
TENSOR_WORDS = 8
# SLOT: first slot for partial sums, of a tensor of several chunks. FLAGS, bits:
ALIGNED = 1  # every address allows 128-bit access
FRESH = 2  # no momentum yet: epoch 1 of this plan is the tensor's first step

# A group's row: float64, but for two int64. LR_AT: address of a learning rate that lives in device
# memory (0: there is none). KEEP: 1 - dampening. SWITCHES: everything that is not a number, as
# bits, so that an item reads it all by one load and holds it in one register.
LR, LR_AT, MOMENTUM, KEEP, DECAY, TRUST, EPS, SWITCHES = range(8)
GROUP_WORDS = 8
ADAPT, MAXIMIZE, NESTEROV, LR_IN_MOMENTUM, CLIP, DECAY_ZERO_NORM, LR_IS_FP64 = (
    1 << bit for bit in range(7)
)
DENOMINATORS = {"sum": 0, "decayed": 1 << 7, "gradient": 1 << 8}

# A slot of partial sums, and a row of the sums of all tensors: float64 sums of w², (s·g)² and d².
W2, G2, D2 = range(3)
SUM_WORDS = 3
RATIO, RATE = range(2)  # the trust ratio q, and the effective learning rate γq
RATIO_WORDS = 2

# Item kinds are two bits: a norm, an update, or both by one program.
NORM, UPDATE = 1, 2
BOTH = NORM | UPDATE

# An item: kind | tensor | group | chunk, from the lowest bit up. The group is part of it so that a
# tensor's row and its hyper-parameters are read at the same time.
TENSOR_SHIFT, GROUP_SHIFT, CHUNK_SHIFT = 2, 24, 40
MAX_TENSORS = 1 << (GROUP_SHIFT - TENSOR_SHIFT)
MAX_GROUPS = 1 << (CHUNK_SHIFT - GROUP_SHIFT)
MAX_CHUNKS = 1 << (63 - CHUNK_SHIFT)

WATCH_WORDS = 2
LAST_EPOCH, LOST_EPOCH = range(2)

TICKET_BITS = 32
RATIO_BITS = 48


def pack_item(kind: int, tensor: int, chunk: int, group: int = 0) -> int:
    """One item as a 64-bit word; ``ValueError`` where a field does not fit."""
    if kind not in (NORM, UPDATE, BOTH):
        raise ValueError(f"item kind must be NORM, UPDATE or BOTH (1, 2, 3), got {kind}")
    if not 0 <= tensor < MAX_TENSORS:
        raise ValueError(f"tensor index must be in [0, {MAX_TENSORS}), got {tensor}")
    if not 0 <= group < MAX_GROUPS:
        raise ValueError(f"group index must be in [0, {MAX_GROUPS}), got {group}")
    if not 0 <= chunk < MAX_CHUNKS:
        raise ValueError(f"chunk index must be in [0, {MAX_CHUNKS}), got {chunk}")
    return item_word(kind, tensor, group) | chunk << CHUNK_SHIFT


def item_word(kind: int, tensor: int, group: int) -> int:
    """The item of a tensor's first chunk, unchecked; each further chunk adds 1 << CHUNK_SHIFT."""
    return kind | tensor << TENSOR_SHIFT | group << GROUP_SHIFT


def unpack_item(item: Word) -> tuple[Word, Word, Word]:
    """Kind, tensor and chunk of an item: of an int, or elementwise of a tensor of items."""
    return item & BOTH, (item >> TENSOR_SHIFT) & (MAX_TENSORS - 1), item >> CHUNK_SHIFT
