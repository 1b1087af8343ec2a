"""The model of a launch of `lars_resident`, which holds w and g in shared memory.

Every number that comes out of here is a PREDICTION of a model, never a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.cache_model import Gpu, Traffic
from bench.launch_model import NOW, Geometry, Item, Launch, Timing, Wait
from lars_fused._engine.plan import Plan, chunk_count
from lars_fused.kernels.layout import NORM, UPDATE


@dataclass(frozen=True)
class Step:
    """A step of a program, by the walk of its machine code (`python -m bench.walk`, sm_90, fp32).

    Instructions of a warp, and cycles that pass beside them where no data is waited for.
    """

    norm: int = 339  # instructions, from the wait for a copy to the arrival
    sums: int = 445  # cycles of that beyond its instructions
    update: int = 304  # instructions, from there to the last store of the update
    end: int = 258  # instructions, from there to the next wait for a copy
    wait: int = 291  # exposed latency of the rows of the steps to come
    publish: int = 1274  # a tensor's last arrival is answered -> its ratio is published
    after: int = 150  # from there to the next step


HELD = Step()


def simulate_resident(
    plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int,
    timing: Timing = NOW,
) -> Traffic:  # fmt: skip
    """Run one step's items of order "resident" in fp32, by programs that hold `slots` chunks."""
    return _Resident(plan, numels, gpu, geometry, slots, timing).run()


class _Resident(Launch):
    """Each program goes through its items step by step."""

    def __init__(
        self, plan: Plan, numels: Sequence[int], gpu: Gpu, geometry: Geometry, slots: int,
        timing: Timing,
    ) -> None:  # fmt: skip
        super().__init__(plan, numels, gpu, geometry, timing)
        self.work, self.lag = list(self.items), slots - 1

    def program(self, number: int) -> Iterator[float | Wait]:
        t, held, us, sm = self.timing, HELD, self.us, number % self.gpu.multiprocessors
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
                n = self.blocks(*own[step][1:])[0][1]
                now = yield max(now, there[step]) + self.tail(n)
                now = yield self.compute(now, sm, held.norm, n)
                # The fence waits for whatever is on its way: measured (LOG.md, the rotated loop).
                on_its_way = [momentum, *there[step + 1 : step + 2]]
                now = yield max(now + (held.sums + t.fence) * us, *on_its_way)
                answer = now + t.arrive * us
            if old[0] & UPDATE:
                ((key, n),) = self.blocks(*old[1:])
                if not self.published[old[1]]:
                    now = yield "ratio", old[1]
                    now = yield now + t.poll / 2 * us
                now = yield max(now, momentum) + self.tail(n)
                now = yield self.compute(now, sm, held.update, n)
                self.move(now, key, n, "", "wv")
            now = yield self.compute(now, sm, held.end, 2048)
            if step + 2 < len(own):
                there.append(self._read(now, own[step + 2], "wg"))
            before = step + 1 - self.lag
            if 0 <= before < len(own) and own[before][0] & UPDATE:
                chunk = own[before]
                whole = self.blocks(*chunk[1:])[0][1] == self.block
                momentum = self._read(now, chunk, "v" if whole else "wgv")
            now = yield now + held.wait * us
            if kind & NORM:
                now = yield max(now, answer)
                self.to_come[tensor] -= 1
                if self.to_come[tensor] == 0:
                    batches = 1 + chunk_count(self.numels[tensor], self.chunk) // 1024
                    trip = batches * t.l2 * us
                    now = yield now + held.publish * self.cycle_us + trip
                    self.publish(tensor, now)
                    now = yield now + held.after * self.cycle_us
        yield now

    def _read(self, now: float, item: Item, operands: str) -> float:
        """Send for operands of an item's chunk: when they are there."""
        ((key, n),) = self.blocks(*item[1:])
        return self.move(now, key, n, operands, "")
