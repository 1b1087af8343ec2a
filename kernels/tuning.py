"""Launch constants, one row an architecture, each with the record that chose it."""

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
    window: int | None
    """Bytes of w and g that may lie between a norm item and its update item; None for the share of
    the device's L2 that leaves room for v as well."""
    evict: str
    """Eviction policy of the update pass, which uses everything for the last time."""
    poll_atomic: bool
    """Poll with an atomic read instead of a volatile load."""
    launches: int
    """1: norms and updates in one launch; 2: norms, then updates."""
    step_registers: int | None
    """Registers a thread that the compiler may take in `lars_step`. Left alone (None), ptxas aims
    for 64 or 80 and spills a few bytes."""
    update_registers: int | None
    """Likewise in `lars_update`. `l2norm` is left alone."""
    record: str
    """What chose these numbers."""


_PREDICTED = "bench/results/traffic and bench/results/codegen (predictions); not yet measured"

# 0.7 of an L2 can be used, and w and g are two thirds of what a group of tensors spans with v.
WINDOW_SHARE = 0.47

ROWS = {
    # The longest prefix of an architecture's name wins.
    "sm": Row(4096, 2048, 128, 128, 4, 4, None, "evict_first", False, 1, 96, 64, _PREDICTED),
    # Spinning in a loop has known compiler bugs on AMD (README, "Two launches").
    "gfx": Row(4096, 2048, 256, 128, 4, 4, None, "", True, 2, None, None, _PREDICTED),
    # The interpreter's cost is per operation: few, large blocks. Three programs: more than one.
    "interpreter": Row(
        8192, 4096, 1024, 256, 4, 3, 1_000_000, "", False, 1, None, None, "test time on a CPU"
    ),
}


def compile_options(kernel: str, row: Row) -> dict[str, int]:
    """Triton's compile options for a kernel."""
    # Without contraction: whether a product and a sum become one rounding would be the compiler's
    # choice, in each kernel anew, and one launch and two are to round alike.
    options = {"num_warps": row.num_warps, "enable_fp_fusion": False}
    cap = {"lars_step": row.step_registers, "lars_update": row.update_registers}.get(kernel)
    if cap is not None:
        options["maxnreg"] = cap
    return options


def row_for(architecture: str) -> Row:
    """The row of an architecture: "sm_90", "gfx942", "interpreter", or a relative of one."""
    for length in range(len(architecture), 0, -1):
        if architecture[:length] in ROWS:
            return ROWS[architecture[:length]]
    raise KeyError(f"no launch constants for architecture {architecture!r}; known: {list(ROWS)}")
