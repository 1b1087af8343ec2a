"""How a sample is taken: cold caches, a full queue, rotating order.

GPU time is measured by events around one step. A spinning kernel is queued first, so that the host
has enqueued everything before the GPU reaches the first event; samples where the host fell behind
are discarded and repeated. Variants with so many launches that the queue overflows are captured and
replayed. Variants that can do neither, because they wait for the GPU, are marked `host_bound`:
their time includes the host's.

The L2 is made cold by rewriting a buffer of several times its size, outside the timed region. It is
then full of dirty lines, which the step evicts while leaving its own behind: all of a step's DRAM
traffic falls within its time, as in a training loop.

Host time is the duration of the call, measured separately. Every round takes one sample of each
variant, in rotating order.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from bench.budget import Budget as Budget
from bench.variants import Variant

_LONGEST_HOLD_US = 20_000


class Clock:
    """A clock that only advances when told to."""

    __name__ = "bench.CLOCK"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def host_us(step: Callable[[], object], device: torch.device) -> float:
    """Time of the call alone: the device is idle before, and not waited for after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - start) / 1e3


def per_call_us(step: Callable[[], object], calls: int) -> float:
    """Mean time of some calls on an idle host."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        step()
    return (time.perf_counter_ns() - start) / 1e3 / calls


class CpuTimer:
    """Wall time of a step on a CPU after its caches were filled with other data."""

    kind = "host"

    def __init__(self, flush_bytes: int = 1 << 28) -> None:
        self.flush = torch.empty(flush_bytes // 4)

    def ready(self, variant: Variant) -> Callable[[], float]:
        if variant.chained:
            return _chained(variant.chained)

        def sample() -> float:
            if variant.prepare:
                variant.prepare()
            self.flush.add_(1)
            return host_us(variant.step, self.flush.device)

        return sample


class CudaTimer:
    """GPU time of a step, the L2 cold, the queue full."""

    kind = "gpu"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.flush = torch.zeros(l2, device=device)  # fp32: four times the L2
        self.cycles_per_us = self._clock()

    def _clock(self) -> float:
        """Cycles of the spinning kernel in a microsecond."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for cycles in (1_000_000, 10_000_000):  # the first one loads the kernel
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize(self.device)
        return cycles / (start.elapsed_time(end) * 1e3)

    def ready(self, variant: Variant) -> Callable[[], float]:
        if variant.chained:
            return _chained(variant.chained)
        step = variant.step
        if variant.graph:
            step = self._captured(variant) or step
        enqueue_us = median([host_us(step, self.device) for _ in range(3)])

        def sample() -> float:
            nonlocal enqueue_us
            while not variant.host_bound:
                hold_us = 2 * enqueue_us + 200
                late, us = self._once(variant, step, hold_us)
                if not late:
                    return us
                enqueue_us *= 2
                variant.host_bound = hold_us > _LONGEST_HOLD_US
            return self._once(variant, step, 0)[1]

        return sample

    def _once(
        self, variant: Variant, step: Callable[[], object], hold_us: float
    ) -> tuple[bool, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if variant.prepare:
            variant.prepare()
        torch.cuda._sleep(int(hold_us * self.cycles_per_us))
        self.flush.add_(1)
        start.record()
        step()
        end.record()
        late = start.query()
        end.synchronize()
        return late, start.elapsed_time(end) * 1e3

    def _captured(self, variant: Variant) -> Callable[[], object] | None:
        """The step as a graph; None if it cannot be captured (it waits for the device)."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph):
                variant.step()
        except Exception:  # each way to wait or allocate raises its own error
            # A capture that fails to end leaves its stream current.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize(self.device)
            return None
        return graph.replay


def _chained(run: Callable[[int], object], more: int = 10) -> Callable[[], float]:
    """Microseconds of one of several steps that run as one program."""

    def us(n: int) -> float:
        start = time.perf_counter_ns()
        run(n)
        return (time.perf_counter_ns() - start) / 1e3

    us(1), us(1 + more)  # each length is compiled once
    return lambda: (us(1 + more) - us(1)) / more


@contextlib.contextmanager
def all_cores() -> Iterator[int]:
    """Let PyTorch use every core within the block, as it does by default; yields their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    samplers: dict[str, Callable[[], float]], rounds: int, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """One sample of each in turn, `rounds` times or until the time is up.

    As in `timeit`, without the garbage collector, which could run during any variant's sample.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    names, end = list(samplers), time.monotonic() + seconds
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            if i >= least and time.monotonic() > end:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                taken[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return taken
