"""What a call costs: the operations it dispatches, their bytes, and its time beside another's.

Whatever else runs on the machine only ever adds to a time, so the best of many samples approaches
the true price from above. `least_ratio` therefore keeps sampling until the ratio is met: noise
makes a test take longer, but only a price that is truly too high makes it fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.timers import interleave

ROUNDS = 20


class Dispatches(TorchDispatchMode):
    """All operations but views, with the bytes of the tensors that each reads or writes.

    A tensor that an operation both reads and writes counts once. `forbidden`: names of operations
    that fail the test.
    """

    def __init__(self, forbidden: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0
        self._forbidden = forbidden

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        assert name.split(".")[0] not in self._forbidden, f"{name} is not allowed here"
        found = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace == "aten":
            self.names.append(name)
            tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
            sizes = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
            self.bytes += sum(sizes.values())
        return found


def thread_time(call: Callable[[], object]) -> float:
    """Seconds of one call, without those in which other processes had the core."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def best_of(
    samples: int, ours: Callable[[], float], others: Callable[[], float]
) -> tuple[float, float]:
    """The best of some interleaved samples of each."""
    found = interleave({"ours": ours, "others": others}, samples, math.inf)
    return min(found["ours"]), min(found["others"])


def least_ratio(bound: float, best: Callable[[], tuple[float, float]]) -> float:
    """Our best time over that of the others, from up to `ROUNDS` rounds of samples.

    Args:
        bound: no further round is taken once the ratio is at most this.
        best: takes one round of samples and returns the best time of ours and of the others.
    """
    ours = others = math.inf
    for _ in range(ROUNDS):
        mine, theirs = best()
        ours, others = min(ours, mine), min(others, theirs)
        if ours <= bound * others:
            break
    return ours / others
