"""Launch constants, one row an architecture, each with the record that chose it."""

from typing import NamedTuple


class Row(NamedTuple):
    """Launch constants of one architecture."""

    chunk: int
    """Elements of a work item."""
    block: int
    """Elements that a program handles at a time; divides `chunk`."""
    tail: int
    """Elements at a time where access is element by element: one a thread, so that loads and
    stores share a layout."""
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
    max_registers: int | None
    """Registers that the compiler may take in `lars_step` and `l2norm`. Left alone, ptxas aims for
    64 and spills a few bytes; None leaves it alone."""
    record: str
    """What chose these numbers."""


_PREDICTED = "bench/results/traffic and bench/results/codegen (predictions); not yet measured"

# 0.7 of an L2 can be used, and w and g are two thirds of what a group of tensors spans with v.
WINDOW_SHARE = 0.47

ROWS = {
    # The longest prefix of an architecture's name wins.
    "sm": Row(4096, 1024, 128, 128, 4, 4, None, "evict_first", False, 1, 80, _PREDICTED),
    # Spinning in a loop has known compiler bugs on AMD (README, "Two launches").
    "gfx": Row(4096, 2048, 256, 128, 4, 4, None, "", True, 2, None, _PREDICTED),
    # The interpreter's cost is per operation: few, large blocks. Three programs: more than one.
    "interpreter": Row(
        8192, 4096, 1024, 256, 4, 3, 1_000_000, "", False, 1, None, "test time on a CPU"
    ),
}


def compile_options(kernel: str, row: Row) -> dict[str, int]:
    """Triton's compile options for a kernel."""
    options = {"num_warps": row.num_warps}
    # lars_update alone takes fewer registers when it is left alone.
    if row.max_registers is not None and kernel != "lars_update":
        options["maxnreg"] = row.max_registers
    return options


def row_for(architecture: str) -> Row:
    """The row of an architecture: "sm_90", "gfx942", "interpreter", or a relative of one."""
    for length in range(len(architecture), 0, -1):
        if architecture[:length] in ROWS:
            return ROWS[architecture[:length]]
    raise KeyError(f"no launch constants for architecture {architecture!r}; known: {list(ROWS)}")
