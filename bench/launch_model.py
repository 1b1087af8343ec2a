"""A discrete-event model of one launch: what a work list costs on a GPU, before there is one.

Every number that comes out of here is a PREDICTION of a model, never a measurement.

Programs draw the items of a plan in ticket order. An item goes through the stages that the machine
code has: a prologue of dependent loads up to its first data load, blocks of w and g (norm) or of w,
g and v (update), reductions, arrival, publication, polling. Data goes through `cache_model.Cache`,
queues for DRAM and for L2, which serve bytes at fixed rates, and takes their latency; instructions
queue for the issue slots of their multiprocessor. Times rank designs; bytes come from the cache.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.cache_model import Cache, Gpu, Traffic
from lars_fused._engine.plan import Plan, chunk_count, unpack_items
from lars_fused.kernels.layout import BOTH, NORM, UPDATE


@dataclass(frozen=True)
class Timing:
    """Latencies of one kernel, in cycles, each with its origin.

    *walk*: `python -m bench.walk` of the kernel for sm_90 with fp32 tensors, triton 3.7.1; there is
    a figure of the same name. *counted*: instructions of a loop in that machine code. Both are held
    to what is compiled (`tests/kernels/test_walk.py`). *published*: gpu-benches (te42kyfo),
    latencies of an H100, clock of an H200. *assumed*: between figures of the other kinds.
    """

    ghz: float = 1.755  # published
    dram: int = 1140  # published: 650 ns
    l2: int = 386  # published: 220 ns, between the near and the far half
    start: int = 1900  # assumed: found_inf, grad_scale, first ticket, its item: five round trips
    norm_first: int = 866  # walk: top of an item -> first data load of a norm
    update_first: int = 583  # walk: top of an item -> first data load of an update
    prefetch: bool = True  # the first block of an update is loaded before its ratio is polled for
    ratio_wanted: int = 444  # walk: an update's first data load -> its first poll
    poll: int = 978  # walk: a poll, ticket and next item's word behind it -> data that is there
    reduce: int = 539  # walk: last block of a norm -> arrival atomic issued, without the fence
    fence: int = 500  # assumed: the arrival's, before its atomic
    arrive: int = 700  # assumed: the atomic
    publish: int = 2257  # walk: last arrival -> ratio published, 513 to 1,024 chunks
    both: int = 963  # walk: ratio of a chunk that waits for nobody
    update_end: int = 48  # walk: last block -> next item
    norm_block: int = 211  # counted: a warp, 2,048 elements
    update_block: int = 297  # counted
    tail_turns: int = 8  # turns of a tail whose loads are in flight together
    next_item: int = 0  # walk: exposed latency of the next item's word, in a norm


# The kernel of commit 2d9ca03: row, sign and decay one after the other, everything before the data.
BEFORE = Timing(
    norm_first=1362, update_first=3120, prefetch=False, ratio_wanted=0, poll=530, reduce=1470,
    arrive=1200, publish=4200, both=2600, update_end=60, norm_block=210, update_block=265,
    tail_turns=1, next_item=386,
)  # fmt: skip
NOW = Timing()


@dataclass(frozen=True)
class Geometry:
    """How a launch cuts its work, as a row of `kernels/tuning.py` does."""

    chunk: int
    block: int
    per_sm: int
    """Programs a multiprocessor."""
    threads: int = 128
    evict_first: bool = True
    """Whether the hardware honours the hint that an update's lines leave the cache first."""
    sizes: tuple[int, int, int] = (4, 4, 4)
    """Bytes of one element of w, g and v."""


def simulate(
    plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, timing: Timing = NOW
) -> Traffic:
    """Run one step's items."""
    return Launch(plan, numels, gpu, geometry, timing).run()


def simulate_dynamic(
    plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, timing: Timing = NOW
) -> Traffic:
    """The same items from two queues: an update if its ratio is published, else a norm.

    Not a kernel: an order that was considered (`tests/kernels/ticket_model.py` has its protocol).
    Drawing is taken to cost nothing, so that the time is the least that it could reach.
    """
    return _Dynamic(plan, numels, gpu, geometry, timing).run()


PLACE = {"w": 0, "g": 1, "v": 2}
Item = tuple[int, int, int]
Wait = tuple[str, int]  # ("ratio" or "sums", tensor)


class Launch:
    """One launch under way: the queue of programs by the time at which each goes on."""

    def __init__(
        self, plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, timing: Timing
    ) -> None:
        self.items = iter(zip(*(x.tolist() for x in unpack_items(plan.items)), strict=True))
        self.numels, self.gpu, self.geometry, self.timing = numels, gpu, geometry, timing
        self.chunk, self.block = geometry.chunk, min(geometry.block, geometry.chunk)
        self.programs = geometry.per_sm * gpu.multiprocessors
        self.cache = Cache(gpu.capacity)
        # Bytes of one element of the operands that are moved together.
        self.width = {
            operands: sum(geometry.sizes[PLACE[name]] for name in operands)
            for operands in ("", "w", "g", "v", "wg", "wv", "wgv")
        }
        self.to_come = [chunk_count(n, self.chunk) for n in numels]
        self.published = [False] * len(numels)
        self.asleep: dict[Wait, list[tuple[float, int]]] = {}
        self.first_key = [0]
        for count in self.to_come:
            self.first_key.append(self.first_key[-1] + count * chunk_count(self.chunk, self.block))
        self.dram_free = self.l2_free = self.waited = 0.0
        self.issue_free = [0.0] * gpu.multiprocessors
        self.cycle_us = 1e-3 / timing.ghz
        self.us = gpu.loaded * self.cycle_us  # of a cycle of latency
        self.queue: list[tuple[float, int]] = []

    def run(self) -> Traffic:
        programs = [self.program(n) for n in range(self.programs)]
        self.queue = [(0.0, n) for n in range(self.programs)]
        now = 0.0
        for program in programs:
            next(program)
        while self.queue:
            now, n = heapq.heappop(self.queue)
            try:
                after = programs[n].send(now)
            except StopIteration:
                continue
            if isinstance(after, tuple):
                self.asleep.setdefault(after, []).append((now, n))
            else:
                heapq.heappush(self.queue, (after, n))
        if self.asleep:
            raise RuntimeError(f"the work list waits for itself at {sorted(self.asleep)}")
        self.cache.flush()  # counted, though DRAM may take it after the kernel has ended
        return Traffic(sum(self.numels), self.cache.read, self.cache.written, now, self.waited)

    def publish(self, tensor: int, now: float) -> None:
        self.published[tensor] = True
        self.waited += self.wake(("ratio", tensor), now)

    def wake(self, what: Wait, now: float) -> float:
        """Let those go on that sleep until this: how long they slept, summed."""
        asleep = self.asleep.pop(what, [])
        for _, n in asleep:
            heapq.heappush(self.queue, (now, n))
        return sum(now - since for since, _ in asleep)

    def access(self, now: float, key: int, n: int, update: bool) -> float:
        """When the data of one block is there."""
        return self.move(now, key, n, "wgv" if update else "wg", "wv" if update else "")

    def move(self, now: float, key: int, n: int, reads: str, writes: str) -> float:
        """Read some operands of a block and write some: when what was read is there."""
        cache, gpu, width, us = self.cache, self.gpu, self.width, self.latency(now)
        early = self.geometry.evict_first and writes != ""
        read, written = cache.read, cache.written
        for name in reads:
            cache.touch(3 * key + PLACE[name], n * width[name], early=early)
        missed = cache.read > read
        for name in writes:
            cache.touch(3 * key + PLACE[name], n * width[name], write=True, early=early)
        moved = cache.read - read + cache.written - written
        through_l2 = n * max(width[reads], width[writes])
        self.dram_free = max(now, self.dram_free) + moved / gpu.dram_tbps * 1e-6
        self.l2_free = max(now, self.l2_free) + through_l2 / gpu.l2_tbps * 1e-6
        arrival = self.l2_free + self.timing.l2 * us
        return max(arrival, self.dram_free + self.timing.dram * us) if missed else arrival

    def latency(self, now: float) -> float:
        """Microseconds of a cycle of latency."""
        return self.us

    def compute(self, now: float, sm: int, instructions: int, n: int) -> float:
        took = instructions * n / 2048 * self.cycle_us
        self.issue_free[sm] = max(now, self.issue_free[sm]) + took
        return self.issue_free[sm]

    def blocks(self, tensor: int, index: int) -> list[tuple[int, int]]:
        """(granule, elements) of a chunk."""
        elements = min(self.numels[tensor] - index * self.chunk, self.chunk)
        first = self.first_key[tensor] + index * chunk_count(self.chunk, self.block)
        starts = range(0, elements, self.block)
        return [(first + j, min(self.block, elements - at)) for j, at in enumerate(starts)]

    def tail(self, n: int, now: float) -> float:
        """Round trips of a partial block beyond its first."""
        if n == self.block:
            return 0.0
        steps = -(-n // (self.geometry.threads * self.timing.tail_turns))
        return (steps - 1) * self.timing.l2 * self.latency(now)

    def _drawn(self) -> Iterator[Item]:
        """What a program draws, one item after the other."""
        return self.items

    def program(self, number: int) -> Iterator[float | Wait]:
        t, us, sm = self.timing, self.us, number % self.gpu.multiprocessors
        now = yield 0.0
        now = yield now + t.start * us
        for kind, tensor, index in self._drawn():
            blocks = self.blocks(tensor, index)
            if kind & NORM:
                now = yield now + t.norm_first * us
                for key, n in blocks:
                    now = yield self.access(now, key, n, False) + self.tail(n, now)
                    now = yield self.compute(now, sm, t.norm_block, n)
                now = yield now + (t.reduce + t.next_item) * us
            if kind == NORM:
                now = yield now + (t.fence + t.arrive) * us
                self.to_come[tensor] -= 1
                if self.to_come[tensor] == 0:
                    now = yield now + t.publish * us
                    self.publish(tensor, now)
            elif kind == BOTH:
                now = yield now + t.both * us
            if kind & UPDATE:
                now = yield from self._update(now, sm, kind, tensor, blocks)
        yield now

    def _update(
        self, now: float, sm: int, kind: int, tensor: int, blocks: list[tuple[int, int]]
    ) -> Iterator[float | Wait]:
        t, us = self.timing, self.us
        prefetched = None
        if kind == UPDATE:
            now = yield now + t.update_first * us
            if t.prefetch and blocks[0][1] == self.block:
                prefetched = self.access(now, *blocks[0], True)
            now = yield now + t.ratio_wanted * us
            if not self.published[tensor]:
                now = yield "ratio", tensor
                now = yield now + t.poll / 2 * us
            elif t.prefetch:
                now = yield now + t.poll * us
        for key, n in blocks:
            if prefetched is None:
                there = self.access(now, key, n, True) + self.tail(n, now)
            else:
                there, prefetched = max(now, prefetched), None
            now = yield there
            now = yield self.compute(now, sm, t.update_block, n)
        return (yield now + t.update_end * us)


class _Dynamic(Launch):
    """A launch with two queues, each in the order of the list."""

    def run(self) -> Traffic:
        items = list(self.items)
        self.norms = deque(item for item in items if item[0] != UPDATE)
        self.updates = deque(item for item in items if item[0] == UPDATE)
        return super().run()

    def _drawn(self) -> Iterator[Item]:
        while self.norms or self.updates:
            ready = self.updates and self.published[self.updates[0][1]]
            # Behind the last norm there is nothing but to wait for a ratio, which others will send.
            yield (self.updates if ready or not self.norms else self.norms).popleft()
