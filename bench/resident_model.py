"""The model of a launch of `lars_resident`, which holds w and g in shared memory.

Every number that comes out of here is a PREDICTION of a model, never a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.cache_model import Gpu, Traffic
from bench.launch_model import NOW, PLACE, Geometry, Item, Launch, Timing, Wait
from lars_fused._engine.plan import Plan, chunk_count, unpack_items
from lars_fused.kernels.layout import NORM, UPDATE


@dataclass(frozen=True)
class Step:
    """A step of a worker, and what a finisher does: cycles, and instructions of a warp.

    *walk*: `python -m bench.walk`, sm_90, fp32; cycles pass beside instructions, where no data is
    waited for. *assumed*: what a launch reads once comes from DRAM. Were it in L2, the model would
    have 79 % of the time that an H200 took for GoogLeNet.
    """

    start: int = 4 * NOW.dram  # assumed: found_inf, its number, items and rows, all cold
    norm: int = 350  # walk: instructions, from the wait for a copy to the tagged store
    norm_waits: int = 456  # walk
    update: int = 301  # walk: instructions, from there to the last store of the update
    update_waits: int = 126  # walk
    end: int = 255  # walk: instructions, from there to the next wait for a copy
    end_waits: int = 388  # walk, of words in L2
    cold: int = NOW.dram - NOW.l2  # assumed: every step is the first to read its words
    publish: int = 1427  # walk: a finisher has a tensor's last slots -> its ratio is published
    turn: int = 255  # walk: a finisher has other slots -> the next ones are sent for


HELD = Step()
_LANES = 128  # slots of a finisher's turn
_NOTHING: Item = (0, 0, 0)


def simulate_resident(
    plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int, finishers: int,
    timing: Timing = NOW,
) -> Traffic:  # fmt: skip
    """Run one step's items of order "resident" in fp32, by workers that hold `slots` chunks."""
    return _Resident(plan, numels, gpu, geometry, slots, finishers, timing).run()


class _Resident(Launch):
    """Each worker goes through its items step by step, each finisher through its tensors."""

    def __init__(
        self, plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int,
        finishers: int, timing: Timing,
    ) -> None:  # fmt: skip
        super().__init__(plan, numels, replace(gpu, dram_tbps=gpu.held_tbps), geometry, timing)
        self.work, self.lag, self.finishers = list(self.items), slots - 1, finishers
        self.finishes = unpack_items(plan.finishes)[1].tolist()

    def latency(self, now: float) -> float:
        """Microseconds of a cycle of latency: memory that nobody waits for answers sooner."""
        return self.us if self.dram_free > now else self.cycle_us

    def program(self, number: int) -> Iterator[float | Wait]:
        """A finisher or a worker."""
        return self._finish(number) if number < self.finishers else self._work(number)

    def _finish(self, number: int) -> Iterator[float | Wait]:
        t, held, us = self.timing, HELD, self.us
        now = yield 0.0
        now = yield now + held.start * self.latency(now)
        for tensor in self.finishes[number :: self.finishers]:
            now = yield now + t.l2 * us  # its row
            slots = chunk_count(self.numels[tensor], self.chunk)
            # All but the last turn are added while other sums are still to come.
            now = yield now + (-(-slots // _LANES) - 1) * (t.l2 * us + held.turn * self.cycle_us)
            if self.to_come[tensor]:
                now = yield "sums", tensor
                now = yield now + t.l2 * us  # the store's way, and half of a poll's
            now = yield now + t.l2 * us + held.publish * self.cycle_us
            self.publish(tensor, now)

    def _work(self, number: int) -> Iterator[float | Wait]:
        t, held, cycle, sm = self.timing, HELD, self.cycle_us, number % self.gpu.multiprocessors
        own = self.work[number - self.finishers :: self.programs - self.finishers]
        now = yield 0.0
        now = yield now + held.start * self.latency(now)
        momentum = now
        there = [self._copy(now, item, now) for item in own[:2]]

        def item_of(step: int) -> Item:
            return own[step] if 0 <= step < len(own) else _NOTHING

        for step in range(len(own) + self.lag if own else 0):
            item, old, next_old = (item_of(step - n) for n in (0, self.lag, self.lag - 1))
            if step < len(own):
                now = yield max(now, there[step])
            # ptxas leaves the prefetches behind the wait for this step's copies.
            momentum_near = self._prefetch(now, next_old, "v") if next_old[0] & UPDATE else now
            near = self._prefetch(now, own[step + 2], "wg") if step + 2 < len(own) else now
            if item[0] & NORM:
                now = yield from self._sum(now, sm, item)
            if old[0] & UPDATE:
                ((key, n),) = self.blocks(*old[1:])
                if not self.published[old[1]]:
                    now = yield "ratio", old[1]
                    now = yield now + t.poll / 2 * self.us
                now = yield max(now, momentum)
                if not self._is_whole(old):
                    now = yield self._read(now, old, "wgv")
                now = yield self.compute(now, sm, held.update, n)
                now = yield now + held.update_waits * cycle
                self.move(now, key, n, "", "wv")
            now = yield self.compute(now, sm, held.end, 2048)
            if step + 2 < len(own):
                there.append(self._copy(now, own[step + 2], near))
            if next_old[0] & UPDATE and self._is_whole(next_old):
                momentum = max(momentum_near, self._read(now, next_old, "v"))
            now = yield now + held.end_waits * cycle + held.cold * self.latency(now)
        yield now

    def _sum(self, now: float, sm: int, item: Item) -> Iterator[float | Wait]:
        """A norm; of a tensor's only chunk its ratio too."""
        ((_, n),) = self.blocks(*item[1:])
        if not self._is_whole(item):
            now = yield self._read(now, item, "wg")
        now = yield self.compute(now, sm, HELD.norm, n)
        now = yield now + HELD.norm_waits * self.cycle_us
        tensor = item[1]
        self.to_come[tensor] -= 1
        if chunk_count(self.numels[tensor], self.chunk) == 1:
            now = yield now + HELD.publish * self.cycle_us
            self.publish(tensor, now)
        elif self.to_come[tensor] == 0:
            self.wake(("sums", tensor), now)
        return now

    def _is_whole(self, item: Item) -> bool:
        return self.blocks(*item[1:])[0][1] == self.block

    def _copy(self, now: float, item: Item, near: float) -> float:
        """Send for w and g of a whole chunk, which are in L2 at `near`: when they are there."""
        return max(near, self._read(now, item, "wg")) if self._is_whole(item) else now

    def _read(self, now: float, item: Item, operands: str) -> float:
        """Send for operands of an item's chunk: when they are there."""
        ((key, n),) = self.blocks(*item[1:])
        return self.move(now, key, n, operands, "") + self.tail(n, now)

    def _prefetch(self, now: float, item: Item, operands: str) -> float:
        """Send for operands of a whole chunk into L2: when DRAM has answered."""
        if not self._is_whole(item):
            return now
        ((key, n),) = self.blocks(*item[1:])
        cache, us = self.cache, self.latency(now)
        before = cache.read + cache.written
        for name in operands:
            cache.touch(3 * key + PLACE[name], n * self.width[name])
        moved = cache.read + cache.written - before
        self.dram_free = max(now, self.dram_free) + moved / self.gpu.dram_tbps * 1e-6
        return self.dram_free + self.timing.dram * us if moved else now
