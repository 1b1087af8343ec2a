"""How long a part of a run may still take, even if another process started it."""

from __future__ import annotations

import math
import os
import time

# When the part ends, on the clock shared by all processes of a machine, so that the time a process
# spends on importing torch counts too.
END_VARIABLE = "LARS_FUSED_BENCH_END"


class Budget:
    """Seconds that a part of a run may take; the rest is skipped, and reported as skipped."""

    def __init__(self, seconds: float = math.inf, start: float | None = None) -> None:
        self.end = (time.monotonic() if start is None else start) + seconds

    @classmethod
    def inherited(cls) -> Budget:
        """What the parent process left over; unlimited without a parent."""
        return cls(float(os.environ.get(END_VARIABLE, math.inf)), start=0.0)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def environment(self) -> dict[str, str]:
        """The environment that passes it on to a child process."""
        return {END_VARIABLE: repr(self.end)}
