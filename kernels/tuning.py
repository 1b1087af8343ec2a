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
    window: int
    """Bytes of w and g that may lie between a norm item and its update item."""
    evict: str
    """Eviction policy of the update pass, which uses everything for the last time."""
    poll_atomic: bool
    """Poll with an atomic read instead of a volatile load."""
    launches: int
    """1: norms and updates in one launch; 2: norms, then updates."""
    record: str
    """What chose these numbers."""


_PREDICTED = "bench/results/traffic and bench/results/codegen (predictions); not yet measured"

# The window leaves room in 0.7 of the L2 for v as well: 0.47 of the L2's size (traffic model).
ROWS = {
    # The longest prefix of an architecture's name wins.
    "sm_80": Row(4096, 1024, 128, 128, 4, 4, 18_800_000, "evict_first", False, 1, _PREDICTED),
    "sm_90": Row(4096, 1024, 128, 128, 4, 4, 28_200_000, "evict_first", False, 1, _PREDICTED),
    "sm_100": Row(4096, 1024, 128, 128, 4, 4, 58_000_000, "evict_first", False, 1, _PREDICTED),
    "sm": Row(4096, 1024, 128, 128, 4, 4, 2_800_000, "evict_first", False, 1, _PREDICTED),
    # Spinning in a loop has known compiler bugs on AMD (README, "Two launches").
    "gfx": Row(4096, 1024, 256, 128, 4, 4, 2_800_000, "", True, 2, _PREDICTED),
    # The interpreter's cost is per operation: few, large blocks. Three programs: more than one.
    "interpreter": Row(8192, 4096, 1024, 256, 4, 3, 1_000_000, "", False, 1, "test time on a CPU"),
}


def row_for(architecture: str) -> Row:
    """The row of an architecture: "sm_90", "gfx942", "interpreter", or a relative of one."""
    for length in range(len(architecture), 0, -1):
        if architecture[:length] in ROWS:
            return ROWS[architecture[:length]]
    raise KeyError(f"no launch constants for architecture {architecture!r}; known: {list(ROWS)}")
