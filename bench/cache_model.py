"""The cache simulation behind the traffic model: what a work list makes DRAM move.

Every number that comes out of here is a PREDICTION of a model, never a measurement.

The model. ``programs`` programs draw the items of a plan in ticket order and go through them by
granules of w and g (norm) or of w, g and v (update). All accesses go through one fully
associative, write-back, least-recently-used cache of 0.7 times the L2 size: a read that misses
fetches; a write covers whole lines and never fetches; a dirty granule is written to DRAM when it
leaves. The cache is cold at the start and written back at the end, so a perfect order costs
exactly 20 bytes a parameter in fp32.

Time is a rougher guess, good for ranking orders only: granules queue for DRAM and for L2, which
serve their bytes at fixed rates (L2 reads and writes go both ways at once), each then takes one
round trip, and a new item and a published ratio cost fixed latencies.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lars_fused.plan import BOTH, NORM, UPDATE, Plan, chunk_count, unpack_items

USABLE_L2 = 0.7
BLOCK = 2048  # elements of each array that one program has on the way at once
ROUND_TRIP_US = 0.75  # DRAM latency under load
ITEM_US = 1.2  # table -> group -> first data; ticket and item came during the item before
PUBLISH_US = 1.0  # last arrival -> ratio visible


@dataclass(frozen=True)
class Gpu:
    """L2 size, and the bandwidths that rank orders."""

    name: str
    l2_mb: int
    multiprocessors: int
    dram_tbps: float
    l2_tbps: float

    @property
    def capacity(self) -> int:
        return int(USABLE_L2 * self.l2_mb * 1e6)


# A100 and H200: published microbenchmarks, H200's DRAM a measured device-to-device copy; H100: its
# SXM DRAM rate is assumed.
GPUS = {
    "A100": Gpu("A100", 40, 108, 1.75, 5.4),
    "H100": Gpu("H100", 50, 132, 3.0, 7.0),
    "H200": Gpu("H200", 60, 132, 4.3, 9.7),
}


@dataclass(frozen=True)
class Traffic:
    """What one step is predicted to move and to take."""

    parameters: int
    read: int
    written: int
    us: float
    wait_us: float  # summed over programs

    @property
    def per_parameter(self) -> float:
        return (self.read + self.written) / max(1, self.parameters)


@dataclass(order=True)
class Program:
    """What one program is at: the next tile of its item, at ``time``."""

    time: float
    number: int
    kind: int = field(default=0, compare=False)
    tensor: int = field(default=0, compare=False)
    tiles: list[tuple[bool, int, int]] = field(default_factory=list, compare=False)
    done: int = field(default=0, compare=False)


class Cache:
    """Least recently used, write-back; what is marked ``early`` leaves before anything else."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self.read = self.written = 0
        self.lines: OrderedDict[int, tuple[int, bool]] = OrderedDict()
        self.early: OrderedDict[int, tuple[int, bool]] = OrderedDict()

    def touch(self, key: int, size: int, *, write: bool = False, early: bool = False) -> None:
        line = self.lines.pop(key, None) or self.early.pop(key, None)
        if line is None:
            if not write:
                self.read += size
            self.used += size
            while self.used > self.capacity and (self.early or self.lines):
                old_size, dirty = (self.early or self.lines).popitem(last=False)[1]
                self.used -= old_size
                if dirty:
                    self.written += old_size
        (self.early if early else self.lines)[key] = (size, write or (line is not None and line[1]))

    def flush(self) -> None:
        for lines in (self.lines, self.early):
            self.written += sum(size for size, dirty in lines.values() if dirty)
            lines.clear()
        self.used = 0


def simulate(
    plan: Plan,
    numels: Sequence[int],
    *,
    chunk: int,
    programs: int,
    capacity: int,
    granule: int = BLOCK,
    sizes: tuple[int, int, int] = (4, 4, 4),
    evict_first: bool = False,
    dram_tbps: float = 4.3,
    l2_tbps: float = 9.7,
) -> Traffic:
    """Run one step's items; ``sizes`` are the bytes of one element of w, g and v."""
    granule = min(granule, chunk)
    per_chunk = chunk_count(chunk, granule)
    base, bases = 0, []
    for n in numels:
        bases.append(base)
        base += chunk_count(n, chunk) * per_chunk
    to_come = [chunk_count(n, chunk) for n in numels]
    published = [math.inf] * len(numels)

    cache = Cache(capacity)
    w_size, g_size, v_size = sizes
    items = iter(zip(*(x.tolist() for x in unpack_items(plan.items)), strict=True))
    dram_free = l2_free = waited = end = 0.0
    waiting: dict[int, list[Program]] = {}

    def tiles(kind: int, tensor: int, index: int) -> list[tuple[bool, int, int]]:
        """(is an update, granule number, elements) in the order one program does them."""
        elements = min(numels[tensor] - index * chunk, chunk)
        first = bases[tensor] + index * per_chunk
        sizes = [min(granule, elements - at) for at in range(0, elements, granule)]
        norms = [(False, first + j, n) for j, n in enumerate(sizes)]
        updates = [(True, first + j, n) for j, n in enumerate(sizes)]
        if kind == BOTH:
            return norms + updates
        return norms if kind == NORM else updates

    programs_left = [Program(0.0, number) for number in range(programs)]
    while programs_left:
        program = heapq.heappop(programs_left)
        now = end = program.time
        if program.done == len(program.tiles):
            if program.kind == NORM:
                tensor = program.tensor
                to_come[tensor] -= 1
                if to_come[tensor] == 0:
                    published[tensor] = now + PUBLISH_US
                    for other in waiting.pop(tensor, []):
                        waited += published[tensor] - other.time
                        other.time = published[tensor]
                        heapq.heappush(programs_left, other)
            item = next(items, None)
            if item is not None:
                program.kind, program.tensor, _ = item
                program.tiles, program.done, program.time = tiles(*item), 0, now + ITEM_US
                heapq.heappush(programs_left, program)
            continue
        update, key, n = program.tiles[program.done]
        if program.kind == UPDATE and published[program.tensor] > now:
            if published[program.tensor] == math.inf:
                waiting.setdefault(program.tensor, []).append(program)
            else:
                waited += published[program.tensor] - now
                program.time = published[program.tensor]
                heapq.heappush(programs_left, program)
            continue
        before, early = cache.read + cache.written, evict_first and update
        cache.touch(3 * key, n * w_size, early=early)
        cache.touch(3 * key + 1, n * g_size, early=early)
        l2_read, l2_written = n * (w_size + g_size), 0
        if update:
            cache.touch(3 * key + 2, n * v_size, early=early)
            cache.touch(3 * key, n * w_size, write=True, early=early)
            cache.touch(3 * key + 2, n * v_size, write=True, early=early)
            l2_read, l2_written = l2_read + n * v_size, n * (w_size + v_size)
        dram_bytes = cache.read + cache.written - before
        dram_free = max(now, dram_free) + dram_bytes / dram_tbps * 1e-6
        l2_free = max(now, l2_free) + max(l2_read, l2_written) / l2_tbps * 1e-6
        program.done += 1
        program.time = max(dram_free, l2_free) + ROUND_TRIP_US
        heapq.heappush(programs_left, program)
    if waiting:
        raise RuntimeError(f"the work list waits for itself at tensors {sorted(waiting)}")
    before = cache.written
    cache.flush()
    end = max(end, dram_free) + (cache.written - before) / dram_tbps * 1e-6
    return Traffic(sum(numels), cache.read, cache.written, end, waited)
