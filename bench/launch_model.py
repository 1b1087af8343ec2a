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

    *walk*: `python -m bench.walk` of the kernel for sm_90 with fp32 tensors, triton 3.7.1.
    *counted*: instructions of a loop in that machine code. *published*: gpu-benches (te42kyfo),
    latencies of an H100, clock of an H200. *assumed*: between figures of the other kinds.
    *fitted*: to steps of ViT-B/16 measured on an H200 with five launch geometries (LOG.md).
    """

    ghz: float = 1.755  # published
    loaded: float = 1.5  # fitted: latencies in a busy memory system over those below
    dram: int = 1140  # published: 650 ns
    l2: int = 386  # published: 220 ns, between the near and the far half
    start: int = 1900  # assumed: found_inf, grad_scale, first ticket, its item: five round trips
    norm_first: int = 872  # walk: top of an item -> first data load of a norm
    update_first: int = 585  # walk: top of an item -> first data load of an update
    prefetch: bool = True  # the first block of an update is loaded before its ratio is polled for
    ratio_wanted: int = 414  # walk: an update's first data load -> its first poll
    poll: int = 800  # walk: a poll, the ticket's receipt and the next item's word behind it
    reduce: int = 625  # walk: last data of a norm -> arrival atomic issued, without the fence
    arrive: int = 1200  # assumed: fence 500, atomic 700
    publish: int = 2269  # walk: last arrival -> ratio published, 513 to 1,024 chunks
    both: int = 1000  # walk: ratio of a chunk that waits for nobody
    update_end: int = 60  # walk: last stores -> next item
    norm_block: int = 165  # counted: a warp, 2,048 elements
    update_block: int = 265  # counted
    tail_turns: int = 8  # turns of a tail whose loads are in flight together
    next_item: int = 0  # walk: exposed latency of the next item's word
    # lars_resident, all by the walk of a step: instructions of a warp, and cycles without loads.
    held_norm: int = 339  # from the wait for a copy to the arrival
    held_sums: int = 445  # cycles of that beyond its instructions
    held_update: int = 304  # from there to the last store of the update
    held_end: int = 258  # from there to the next wait for a copy
    held_wait: int = 291  # exposed latency of the rows of the steps to come
    held_publish: int = 1274  # a tensor's last arrival is answered -> its ratio is published
    held_after: int = 150  # from there to the next step
    fence: int = 500  # assumed


# The kernel of commit 2d9ca03: row, sign and decay one after the other, everything before the data.
BEFORE = Timing(
    norm_first=1362, update_first=3120, prefetch=False, ratio_wanted=0, poll=530, reduce=1470,
    arrive=1700, publish=4200, both=2600, norm_block=210, tail_turns=1, next_item=386,
)  # fmt: skip
NOW = Timing()


def simulate_resident(
    plan: Plan, numels: Sequence[int], gpu: Gpu, *, chunk: int, per_sm: int, slots: int,
    timing: Timing = NOW,
) -> Traffic:  # fmt: skip
    """Run one step's items of order "resident" in fp32, by programs that hold `slots` chunks."""
    return _Resident(plan, numels, gpu, chunk, per_sm, slots, timing).run()


def simulate(
    plan: Plan,
    numels: Sequence[int],
    gpu: Gpu,
    *,
    chunk: int,
    block: int,
    per_sm: int,
    threads: int = 128,
    evict_first: bool = True,
    sizes: tuple[int, int, int] = (4, 4, 4),
    timing: Timing = NOW,
) -> Traffic:
    """Run one step's items; ``sizes`` are the bytes of one element of w, g and v."""
    launch = _Launch(plan, numels, gpu, chunk, block, per_sm, threads, evict_first, sizes, timing)
    return launch.run()


def simulate_dynamic(
    plan: Plan, numels: Sequence[int], gpu: Gpu, *, chunk: int, block: int, per_sm: int,
    evict_first: bool = True, timing: Timing = NOW,
) -> Traffic:  # fmt: skip
    """The same items from two queues: an update if its ratio is published, else a norm.

    Not a kernel: an order that was considered (`tests/kernels/ticket_model.py` has its protocol).
    Drawing is taken to cost nothing, so that the time is the least that it could reach.
    """
    sizes = 4, 4, 4
    return _Dynamic(plan, numels, gpu, chunk, block, per_sm, 128, evict_first, sizes, timing).run()


Item = tuple[int, int, int]
Wait = tuple[str, int]  # ("ratio", tensor)


class _Launch:
    """One launch under way: the queue of programs by the time at which each goes on."""

    def __init__(
        self,
        plan: Plan,
        numels: Sequence[int],
        gpu: Gpu,
        chunk: int,
        block: int,
        per_sm: int,
        threads: int,
        evict_first: bool,
        sizes: tuple[int, int, int],
        timing: Timing,
    ) -> None:
        self.items = iter(zip(*(x.tolist() for x in unpack_items(plan.items)), strict=True))
        self.numels, self.gpu, self.chunk, self.block = numels, gpu, chunk, min(block, chunk)
        self.threads, self.evict, self.sizes, self.timing = threads, evict_first, sizes, timing
        self.programs = per_sm * gpu.multiprocessors
        self.cache = Cache(gpu.capacity)
        self.to_come = [chunk_count(n, chunk) for n in numels]
        self.published = [False] * len(numels)
        self.asleep: dict[int, list[tuple[float, int]]] = {}
        self.first_key = [0]
        for count in self.to_come:
            self.first_key.append(self.first_key[-1] + count * chunk_count(chunk, self.block))
        self.dram_free = self.l2_free = self.waited = 0.0
        self.issue_free = [0.0] * gpu.multiprocessors
        self.cycle_us = 1e-3 / timing.ghz
        self.us = timing.loaded * self.cycle_us  # of a cycle of latency
        self.queue: list[tuple[float, int]] = []

    def run(self) -> Traffic:
        programs = [self._program(n) for n in range(self.programs)]
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
                self.asleep.setdefault(after[1], []).append((now, n))
            else:
                heapq.heappush(self.queue, (after, n))
        if self.asleep:
            raise RuntimeError(f"the work list waits for itself at tensors {sorted(self.asleep)}")
        self.cache.flush()  # counted, though DRAM may take it after the kernel has ended
        return Traffic(sum(self.numels), self.cache.read, self.cache.written, now, self.waited)

    def _publish(self, tensor: int, now: float) -> None:
        self.published[tensor] = True
        for since, n in self.asleep.pop(tensor, ()):
            self.waited += now - since
            heapq.heappush(self.queue, (now, n))

    def _access(self, now: float, key: int, n: int, update: bool) -> float:
        """When the data of one block is there."""
        return self._move(now, key, n, "wgv" if update else "wg", "wv" if update else "")

    def _move(self, now: float, key: int, n: int, reads: str, writes: str) -> float:
        """Read some operands of a block and write some: when what was read is there."""
        cache, early = self.cache, self.evict and bool(writes)
        size = {name: n * each for name, each in zip("wgv", self.sizes, strict=True)}
        before, read_before = cache.read + cache.written, cache.read
        for name in reads:
            cache.touch(3 * key + "wgv".index(name), size[name], early=early)
        missed = cache.read > read_before
        for name in writes:
            cache.touch(3 * key + "wgv".index(name), size[name], write=True, early=early)
        through_l2 = max(sum(size[name] for name in x) for x in (reads, writes))
        moved = cache.read + cache.written - before
        self.dram_free = max(now, self.dram_free) + moved / self.gpu.dram_tbps * 1e-6
        self.l2_free = max(now, self.l2_free) + through_l2 / self.gpu.l2_tbps * 1e-6
        arrival = self.l2_free + self.timing.l2 * self.us
        return max(arrival, self.dram_free + self.timing.dram * self.us) if missed else arrival

    def _compute(self, now: float, sm: int, instructions: int, n: int) -> float:
        took = instructions * n / 2048 * self.cycle_us
        self.issue_free[sm] = max(now, self.issue_free[sm]) + took
        return self.issue_free[sm]

    def _blocks(self, tensor: int, index: int) -> list[tuple[int, int]]:
        """(granule, elements) of a chunk."""
        elements = min(self.numels[tensor] - index * self.chunk, self.chunk)
        first = self.first_key[tensor] + index * chunk_count(self.chunk, self.block)
        starts = range(0, elements, self.block)
        return [(first + j, min(self.block, elements - at)) for j, at in enumerate(starts)]

    def _tail(self, n: int) -> float:
        """Round trips of a partial block beyond its first."""
        if n == self.block:
            return 0.0
        steps = -(-n // (self.threads * self.timing.tail_turns))
        return (steps - 1) * self.timing.l2 * self.us

    def _drawn(self) -> Iterator[Item]:
        """What a program draws, one item after the other."""
        return self.items

    def _program(self, number: int) -> Iterator[float | Wait]:
        t, us, sm = self.timing, self.us, number % self.gpu.multiprocessors
        now = yield 0.0
        now = yield now + t.start * us
        for kind, tensor, index in self._drawn():
            blocks = self._blocks(tensor, index)
            if kind & NORM:
                now = yield now + t.norm_first * us
                for key, n in blocks:
                    now = yield self._access(now, key, n, False) + self._tail(n)
                    now = yield self._compute(now, sm, t.norm_block, n)
                now = yield now + (t.reduce + t.next_item) * us
            if kind == NORM:
                now = yield now + t.arrive * us
                self.to_come[tensor] -= 1
                if self.to_come[tensor] == 0:
                    now = yield now + t.publish * us
                    self._publish(tensor, now)
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
                prefetched = self._access(now, *blocks[0], True)
            now = yield now + t.ratio_wanted * us
            if not self.published[tensor]:
                now = yield "ratio", tensor
                now = yield now + t.poll / 2 * us
            elif t.prefetch:
                now = yield now + t.poll * us
        for key, n in blocks:
            if prefetched is None:
                there = self._access(now, key, n, True) + self._tail(n)
            else:
                there, prefetched = max(now, prefetched), None
            now = yield there
            now = yield self._compute(now, sm, t.update_block, n)
        return (yield now + t.update_end * us)


class _Dynamic(_Launch):
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


class _Resident(_Launch):
    """A launch of `lars_resident`: each program goes through its items step by step."""

    def __init__(
        self, plan: Plan, numels: Sequence[int], gpu: Gpu, chunk: int, per_sm: int, slots: int,
        timing: Timing,
    ) -> None:  # fmt: skip
        super().__init__(plan, numels, gpu, chunk, chunk, per_sm, 128, True, (4, 4, 4), timing)
        self.work, self.lag = list(self.items), slots - 1

    def _program(self, number: int) -> Iterator[float | Wait]:
        t, us, sm = self.timing, self.us, number % self.gpu.multiprocessors
        own = self.work[number :: self.programs]
        now = yield 0.0
        now = yield now + t.start * us
        momentum = now
        there = [self._read(now, item, "wg") for item in own[:2]]
        for step in range(len(own) + self.lag if own else 0):
            kind, tensor, _ = own[step] if step < len(own) else (0, 0, 0)
            old = own[step - self.lag] if step >= self.lag else (0, 0, 0)
            answer = now
            if kind & NORM:
                n = self._blocks(*own[step][1:])[0][1]
                now = yield max(now, there[step]) + self._tail(n)
                now = yield self._compute(now, sm, t.held_norm, n)
                # The fence waits for whatever is on its way: measured (LOG.md, the rotated loop).
                on_its_way = [momentum, *there[step + 1 : step + 2]]
                now = yield max(now + (t.held_sums + t.fence) * us, *on_its_way)
                answer = now + (t.arrive - t.fence) * us
            if old[0] & UPDATE:
                ((key, n),) = self._blocks(*old[1:])
                if not self.published[old[1]]:
                    now = yield "ratio", old[1]
                    now = yield now + t.poll / 2 * us
                now = yield max(now, momentum) + self._tail(n)
                now = yield self._compute(now, sm, t.held_update, n)
                self._move(now, key, n, "", "wv")
            now = yield self._compute(now, sm, t.held_end, 2048)
            if step + 2 < len(own):
                there.append(self._read(now, own[step + 2], "wg"))
            before = step + 1 - self.lag
            if 0 <= before < len(own) and own[before][0] & UPDATE:
                chunk = own[before]
                whole = self._blocks(*chunk[1:])[0][1] == self.block
                momentum = self._read(now, chunk, "v" if whole else "wgv")
            now = yield now + t.held_wait * us
            if kind & NORM:
                now = yield max(now, answer)
                self.to_come[tensor] -= 1
                if self.to_come[tensor] == 0:
                    batches = 1 + chunk_count(self.numels[tensor], self.chunk) // 1024
                    trip = batches * t.l2 * us
                    now = yield now + t.held_publish * self.cycle_us + trip
                    self._publish(tensor, now)
                    now = yield now + t.held_after * self.cycle_us
        yield now

    def _read(self, now: float, item: Item, operands: str) -> float:
        """Send for operands of an item's chunk: when they are there."""
        ((key, n),) = self._blocks(*item[1:])
        return self._move(now, key, n, operands, "")
