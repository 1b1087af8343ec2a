"""Launch constants, one row an architecture, each with the record that chose it."""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """Launch constants of one architecture."""

    chunk: int
    """Elements of a work item."""
    block: int
    """Elements that a program handles at a time; divides `chunk`."""
    threads: int
    """Threads of a program, num_warps of them: elements at a time where access is element by
    element, and partial sums of a chunk. Divides `block`."""
    lanes: int
    """Partial sums that the last program of a tensor adds at a time."""
    num_warps: int
    programs: int
    """Programs a multiprocessor."""
    order: str
    """Of the work list (`lars_fused/_engine/plan.py`): "ahead" or "grouped" for `lars_step`,
    "resident" for `lars_resident`, where a block is a whole chunk."""
    lag: float
    """Items between the last norm of a tensor and its first update, as a multiple of the programs
    of all multiprocessors."""
    window: int | None
    """Bytes of w and g that a group of order "grouped" may span; None for the share of the device's
    L2 that leaves room for v as well."""
    hold: str
    """Eviction policy of w and g in the norm pass, which the update reads again."""
    evict: str
    """Eviction policy of that second read, and of what the update writes. The momentum is read
    without one: its lines are written a moment later, and a hint cost 2 % of large tensors."""
    finishers: int
    """Programs of `lars_resident` that add up the sums of the others, and do nothing else."""
    ring: int
    """Bytes of shared memory in which a program of `lars_resident` holds chunks of w and g."""
    poll_atomic: bool
    """Poll with an atomic read instead of a volatile load."""
    backoff: int
    """Nanoseconds that a program sleeps between two polls; 0 where it cannot."""
    launches: int
    """1: norms and updates in one launch; 2: norms, then updates."""
    step_registers: int | None
    """Registers a thread that the compiler may take in `lars_step`. On sm_90, with more (128
    fit) ptxas hoists until it spills a register or two; with fewer than 106 an update waits 109
    cycles or more for the next item's word, with 106 it waits 74 (compiled, walked)."""
    mixed_registers: int | None
    """Likewise where a tensor is not fp32: with 104, fp32 beside fp16 gradients spills on sm_90."""
    update_registers: int | None
    """Likewise in `lars_update`. `l2norm` is left alone."""
    record: str
    """What chose these numbers."""


_PREDICTED = "bench/results/traffic and bench/results/codegen (predictions); not yet measured"
_MEASURED = (
    "bench/results/tuning (one H200: sweep, policies and orders; 106 registers are as fast as 104 "
    "there); not measured: other NVIDIA GPUs"
)

# 0.7 of an L2 can be used, and w and g are two thirds of what a group of tensors spans with v.
WINDOW_SHARE = 0.47

_SM = Row(
    chunk=4096, block=2048, threads=128, lanes=128, num_warps=4, programs=4,
    order="ahead", lag=1.0, window=None, hold="evict_last", evict="evict_first",
    finishers=0, ring=0, poll_atomic=False, backoff=200,
    launches=1, step_registers=106, mixed_registers=102, update_registers=64,
    record=_MEASURED,
)  # fmt: skip

ROWS = {
    # The longest prefix of an architecture's name wins.
    "sm": _SM,
    # With fewer than 112 registers ptxas for sm_80 has an update wait for most of the next item's
    # word; no case spills (compiled, walked).
    "sm_8": _SM._replace(step_registers=112, mixed_registers=112, record=_PREDICTED),
    # ptxas for sm_100 spills with blocks of 2,048 at every cap that four programs leave room for.
    # With blocks of 1,024 and a cap of 112 no case does (compiled).
    "sm_10": _SM._replace(
        block=1024, step_registers=112, mixed_registers=112, record=_PREDICTED,
    ),
    # Spinning in a loop has known compiler bugs on AMD (README, "Two launches").
    "gfx": Row(
        chunk=4096, block=2048, threads=256, lanes=128, num_warps=4, programs=4,
        order="grouped", lag=1.0, window=None, hold="", evict="", finishers=0, ring=0,
        poll_atomic=True, backoff=0, launches=2, step_registers=None, mixed_registers=None,
        update_registers=None,
        record=_PREDICTED,
    ),
    # The interpreter's cost is per operation: few, large blocks. Three programs: more than one.
    "interpreter": Row(
        chunk=8192, block=4096, threads=1024, lanes=256, num_warps=4, programs=3,
        order="ahead", lag=1.0, window=1_000_000, hold="", evict="", finishers=0, ring=0,
        poll_atomic=False, backoff=0, launches=1, step_registers=None, mixed_registers=None,
        update_registers=None,
        record="test time on a CPU",
    ),
}  # fmt: skip

# Rows of `lars_resident`, where there is one: for lists that suit it (`suits_rings`). Two programs
# fill a multiprocessor's shared memory: 228 KB, of which 1 KB goes to each program.
RESIDENT_ROWS = {
    "sm_9": _SM._replace(
        chunk=2048, programs=2, order="resident", finishers=4, ring=7 << 14,
        record="bench/results/tuning/resident.csv (one H200)",
    ),
}  # fmt: skip

# What a list must be for `lars_resident` to be faster than `lars_step` (one H200,
# bench/results/tuning/lists.csv): rings that hold at least this share of its elements,
# and are filled this many times.
LEAST_HELD = 0.5
LEAST_FILLS = 2


def compile_options(kernel: str, row: Row, mixed: bool) -> dict[str, int | bool]:
    """Triton's compile options for a kernel; `mixed`: not every tensor is fp32."""
    # FMA contraction is disabled: ptxas would decide it per kernel, and one launch and two could
    # then differ in the last bit.
    options: dict[str, int | bool] = {"num_warps": row.num_warps, "enable_fp_fusion": False}
    step = row.mixed_registers if mixed else row.step_registers
    cap = {"lars_step": step, "lars_update": row.update_registers}.get(kernel)
    if cap is not None:
        options["maxnreg"] = cap
    if kernel == "lars_resident":  # its programs wait for one another
        options["launch_cooperative_grid"] = True
    return options


def slots(row: Row, bytes_per_element: int) -> int:
    """Chunks of w and g that the ring of a program of `lars_resident` has room for."""
    return row.ring // (row.chunk * bytes_per_element)


def held_steps(row: Row, bytes_per_element: int) -> int:
    """Steps over which the chunks of one tensor may be summed, so that all can be held.

    A worker's chunk is updated `slots` - 1 steps after it was summed, and by then the whole tensor
    must have been summed in steps before that one.
    """
    return max(0, slots(row, bytes_per_element) - 2)


def suits_rings(numels: Sequence[int], row: Row, workers: int, bytes_per_element: int) -> bool:
    """Whether a list of tensors is faster with `lars_resident`, on a device with so many workers.

    Not where most of it lies in tensors that rings cannot hold, which are read twice by either
    kernel, nor where it is short: rings are filled and emptied once more than they are used.
    """
    held = workers * held_steps(row, bytes_per_element) * row.chunk
    fill = workers * (slots(row, bytes_per_element) - 1) * row.chunk
    total = sum(numels)
    in_rings = sum(min(n, held) for n in numels)
    return in_rings >= LEAST_HELD * total and total >= LEAST_FILLS * fill


def resident_row_for(architecture: str) -> Row | None:
    """The row of `lars_resident` of an architecture, if it has one."""
    return _longest_prefix(RESIDENT_ROWS, architecture)


def row_for(architecture: str) -> Row:
    """The row of an architecture: "sm_90", "gfx942", "interpreter", or a relative of one."""
    row = _longest_prefix(ROWS, architecture)
    if row is not None:
        return row
    raise KeyError(f"no launch constants for architecture {architecture!r}; known: {list(ROWS)}")


def _longest_prefix(rows: dict[str, Row], architecture: str) -> Row | None:
    lengths = range(len(architecture), 0, -1)
    return next((rows[architecture[:n]] for n in lengths if architecture[:n] in rows), None)
