"""The model of a launch of `lars_resident`, which holds w and g in shared memory.

Every number that comes out of here is a PREDICTION of a model, never a measurement. It is good for
long lists: what a tensor costs by itself it leaves out (GoogLeNet 37 us, measured 48).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.cache_model import Gpu, Traffic
from bench.launch_model import NOW, Geometry, Item, Launch, Timing, Wait
from lars_fused._engine.plan import Plan, unpack_items
from lars_fused.kernels.layout import NORM, UPDATE


@dataclass(frozen=True)
class Step:
    """A step of a worker, by the walk of its machine code (`python -m bench.walk`, sm_90, fp32).

    Instructions of a warp, and cycles that pass beside them where no data is waited for.
    """

    norm: int = 350  # instructions, from the wait for a copy to the store of the sums
    sums: int = 455  # cycles of that beyond its instructions
    update: int = 301  # instructions, from there to the last store of the update
    end: int = 255  # instructions, from there to the next wait for a copy
    wait: int = 3  # exposed latency of the rows of the steps to come
    publish: int = 1409  # a finisher's last slots are there -> their ratio is published


HELD = Step()


def simulate_resident(
    plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int, finishers: int,
    timing: Timing = NOW,
) -> Traffic:  # fmt: skip
    """One step's items of order "resident" in fp32: workers hold `slots` chunks, others finish."""
    return _Resident(plan, numels, gpu, geometry, slots, finishers, timing).run()


class _Resident(Launch):
    """Workers go through their items step by step, finishers through their tensors."""

    def __init__(
        self, plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int,
        finishers: int, timing: Timing,
    ) -> None:  # fmt: skip
        super().__init__(plan, numels, gpu, geometry, timing)
        self.work, self.lag, self.finishers = list(self.items), slots - 1, finishers
        self.finishes = unpack_items(plan.finishes)[1].tolist()
        self.single = {i for i, chunks in enumerate(self.to_come) if chunks == 1}

    def program(self, number: int) -> Iterator[float | Wait]:
        if number < self.finishers:
            return self._finisher(self.finishes[number :: self.finishers])
        workers = self.programs - self.finishers
        sm = number % self.gpu.multiprocessors
        return self._worker(self.work[number - self.finishers :: workers], sm)

    def _finisher(self, tensors: Sequence[int]) -> Iterator[float | Wait]:
        now = yield 0.0
        for tensor in tensors:
            if self.to_come[tensor]:
                now = yield "sums", self._sums(tensor)
            # A slot is read over and over: on average half a trip passes, and one brings it.
            now = yield now + 1.5 * self.timing.l2 * self.us
            now = yield now + HELD.publish * self.cycle_us
            self.publish(tensor, now)

    def _sums(self, tensor: int) -> int:
        """What a finisher that waits for the sums of a tensor is asleep at: no tensor's number."""
        return -1 - tensor

    def _worker(self, own: Sequence[Item], sm: int) -> Iterator[float | Wait]:
        t, held, us = self.timing, HELD, self.us
        now = yield 0.0
        now = yield now + t.start * us
        momentum = now
        there = [self._read(now, item, "wg") for item in own[:2]]
        for step in range(len(own) + self.lag if own else 0):
            kind, tensor, _ = own[step] if step < len(own) else (0, 0, 0)
            old = own[step - self.lag] if step >= self.lag else (0, 0, 0)
            # Sent for into L2, and by the copy and the load at the end of this step from there.
            coming = self._read(now, own[step + 2], "wg") if step + 2 < len(own) else None
            before = step + 1 - self.lag
            chunk = own[before] if 0 <= before < len(own) else (0, 0, 0)
            if chunk[0] & UPDATE:
                whole = self.blocks(*chunk[1:])[0][1] == self.block
                momentum_1 = self._read(now, chunk, "v" if whole else "wgv")
            if kind & NORM:
                n = self.blocks(*own[step][1:])[0][1]
                now = yield max(now, there[step]) + self.tail(n)
                now = yield self.compute(now, sm, held.norm, n)
                now = yield now + held.sums * self.cycle_us
                self.to_come[tensor] -= 1
                if self.to_come[tensor] == 0:
                    if tensor in self.single:
                        now = yield now + t.both * self.cycle_us
                        self.publish(tensor, now)
                    else:
                        self.wake(self._sums(tensor), now + t.l2 * us)
            if old[0] & UPDATE:
                ((key, n),) = self.blocks(*old[1:])
                if not self.published[old[1]]:
                    now = yield "ratio", old[1]
                    now = yield now + t.poll / 2 * us
                now = yield max(now, momentum) + self.tail(n)
                now = yield self.compute(now, sm, held.update, n)
                self.move(now, key, n, "", "wv")
            now = yield self.compute(now, sm, held.end, 2048)
            near = now + t.l2 * us
            if coming is not None:
                there.append(max(coming, near))
            if chunk[0] & UPDATE:
                momentum = max(momentum_1, near)
            now = yield now + held.wait * self.us
        yield now

    def _read(self, now: float, item: Item, operands: str) -> float:
        """Send for operands of an item's chunk: when they are there."""
        ((key, n),) = self.blocks(*item[1:])
        return self.move(now, key, n, operands, "")
