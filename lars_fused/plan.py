"""The ordered work list of one step: which chunk of which tensor is done when.

Pure data, computed once per list of tensors. One item is one 64-bit word

    kind | tensor << 2 | chunk << 32

and programs take items in list order, each waiting for nothing but earlier items. Three kinds:

- ``NORM``: partial sums of one chunk of a tensor of several chunks;
- ``UPDATE``: the update of one such chunk, after *all* ``NORM`` items of its tensor;
- ``BOTH``: norm and update by one program, for a tensor of one chunk; and every chunk of a tensor
  with ``adapt=False``, whose update waits for no norm (its norms are only reported).

The second read of w and g is free when it still hits the L2 cache, so little may be read between a
chunk's NORM and its UPDATE; but an update must also come late enough (``in_flight`` items) that the
last norms of its tensor, in the hands of other programs, are done. Two orders, both from the
largest tensor to the smallest:

``grouped``: norms of A, S1, S2, ...; updates of A, S1, S2, ...; next group. The norms of the
smaller S fill the time that A's updates would wait, A's updates do the same for S. A group of T
elements spans at most 12T bytes of fp32 w, g and v under least-recently-used replacement.

``sliding``: one norm item, one update item, in turn. Reads and writes mix all the time and nobody
waits, but finished updates take up cache too: 20T bytes, where T is a tensor and half the lag.
If the cache drops finished updates first (``evict_first``) it is 8T, and this the better order.

Updates of a tensor beyond the window, and all in ``grouped``, run backwards: the chunk read last is
read again first, which saves what is still cached and costs nothing where all of it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NORM, UPDATE, BOTH = 1, 2, 3

MAX_TENSORS = 1 << 30
MAX_CHUNKS = 1 << 31


@dataclass(frozen=True)
class Plan:
    """The work list of one list of tensors.

    ``items``: int64 words in ticket order. ``slots``: for each tensor of several chunks the
    index of its first chunk's partial sums; -1 for every other tensor.
    ``n_slots``: how many partial sums there are in all.
    """

    items: torch.Tensor
    slots: tuple[int, ...]
    n_slots: int
    n_tensors: int


def chunk_count(numel: int, chunk: int) -> int:
    """Chunks of ``chunk`` elements that cover ``numel`` elements."""
    return -(-numel // chunk)


def pack_item(kind: int, tensor: int, chunk: int) -> int:
    """One item as a 64-bit word; ``ValueError`` where a field does not fit."""
    if kind not in (NORM, UPDATE, BOTH):
        raise ValueError(f"item kind must be NORM, UPDATE or BOTH (1, 2, 3), got {kind}")
    if not 0 <= tensor < MAX_TENSORS:
        raise ValueError(f"tensor index must be in [0, 2**30), got {tensor}")
    if not 0 <= chunk < MAX_CHUNKS:
        raise ValueError(f"chunk index must be in [0, 2**31), got {chunk}")
    return kind | tensor << 2 | chunk << 32


def unpack_items(items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kinds, tensor indices and chunk indices of packed items, each int64."""
    return items & 3, (items >> 2) & (MAX_TENSORS - 1), items >> 32


def make_plan(
    numels: Sequence[int],
    adapt: Sequence[bool],
    *,
    chunk: int,
    window: int,
    in_flight: int,
    bytes_per_element: int,
    order: str = "grouped",
) -> Plan:
    """Order the work of one step.

    ``chunk``: elements of one item. ``window``: bytes of w and g that may lie between the two
    reads of a chunk. ``in_flight``: programs at work at the same time.
    ``bytes_per_element``: of w and g together. Empty tensors get no item.
    """
    _check(numels, adapt, chunk, window, in_flight, bytes_per_element, order)
    counts = [chunk_count(n, chunk) for n in numels]
    slots, n_slots = [-1] * len(numels), 0
    for i, c in enumerate(counts):
        if c > 1:
            slots[i], n_slots = n_slots, n_slots + c
    multi = sorted((c, -i) for i, c in enumerate(counts) if c > 1 and adapt[i])
    # Largest first, so that the tiniest items even out the end of the launch.
    both = [i for i, c in enumerate(counts) if c == 1 or (c and not adapt[i])]
    both.sort(key=lambda i: (-numels[i], i))

    tape = _Tape(counts, deque(both))
    room = window // (chunk * bytes_per_element)
    (_grouped if order == "grouped" else _sliding)(tape, multi, room, in_flight)
    tape.fill(sum(counts))
    return Plan(tape.items(), tuple(slots), n_slots, len(numels))


def _grouped(tape: _Tape, ascending: list[tuple[int, int]], room: int, lag: int) -> None:
    """``ascending``: (chunks, -index) of each tensor, sorted; consumed."""
    groups: list[list[int]] = []
    last_free = 0
    while ascending:
        largest, index = ascending.pop()
        group, free, need = [-index], room - largest, lag
        while need > 0 and ascending and ascending[0][0] <= free:
            # The largest that neither overfills the group nor overshoots the lag; if every one
            # overshoots, the smallest.
            at = max(bisect_right(ascending, (min(free, need), 0)) - 1, 0)
            count, index = ascending.pop(at)
            group.append(-index)
            free, need = free - count, need - count
        if groups and not ascending and need > 0 and room - free <= last_free:
            groups[-1] += group  # what is left cannot cover its own wait
        else:
            groups.append(group)
            last_free = free
    for group in groups:
        for i in group:
            tape.add(NORM, i)
        tape.fill(lag - sum(tape.counts[i] for i in group[1:]))
        for i in group:
            tape.add(UPDATE, i, reverse=True)


def _sliding(tape: _Tape, ascending: list[tuple[int, int]], room: int, lag: int) -> None:
    pending: deque[list[int]] = deque()  # tensor, updates emitted, position from which it is ready
    for count, index in reversed(ascending):
        done = 0
        while done < count:
            if pending and tape.length >= pending[0][2]:
                i, first, _ = pending[0]
                n = min(count - done, tape.counts[i] - first)
                tape.alternate(-index, done, i, first, n)
                pending[0][1] += n
                if pending[0][1] == tape.counts[i]:
                    pending.popleft()
            else:
                n = min(count - done, pending[0][2] - tape.length if pending else count)
                tape.run(NORM | -index << 2, done, n)
                tape.length += n
            done += n
        # Two items of lag, a norm and an update, push one more chunk between the two reads.
        ready = tape.length + max(0, min(lag, 2 * (room - count)))
        pending.append([-index, 0, ready])
        if count > room or index == ascending[0][1]:
            for i, first, ready in pending:
                tape.fill(ready - tape.length)
                tape.add(UPDATE, i, first, reverse=tape.counts[i] > room)
            pending.clear()


class _Tape:
    """The list being written: runs of items, expanded to one word per chunk at the end."""

    def __init__(self, counts: list[int], fillers: deque[int]) -> None:
        self.counts, self.fillers, self.length = counts, fillers, 0
        self.runs: list[tuple[int, int, int, int, int, int]] = []

    def run(
        self, word: int, first: int, n: int, step: int = 1, at: int = 0, stride: int = 1
    ) -> None:
        """Chunks first, first + step, ... at the places length + at, length + at + stride, ..."""
        self.runs.append((word, first, step, n, self.length + at, stride))

    def add(self, kind: int, tensor: int, first: int = 0, *, reverse: bool = False) -> None:
        """All chunks of a tensor, or those from ``first`` on."""
        n = self.counts[tensor] - first
        self.run(kind | tensor << 2, first + n - 1 if reverse else first, n, -1 if reverse else 1)
        self.length += n

    def alternate(self, norm: int, norm_first: int, update: int, update_first: int, n: int) -> None:
        self.run(NORM | norm << 2, norm_first, n, stride=2)
        self.run(UPDATE | update << 2, update_first, n, at=1, stride=2)
        self.length += 2 * n

    def fill(self, lack: int) -> None:
        """Spend whole BOTH tensors until ``lack`` items are covered."""
        while lack > 0 and self.fillers:
            lack -= self.counts[self.fillers[0]]
            self.add(BOTH, self.fillers.popleft())

    def items(self) -> torch.Tensor:
        if not self.runs:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        runs = torch.tensor(self.runs, dtype=torch.int64, device="cpu")
        word, start, step, n, at, stride = runs.unbind(1)
        run = torch.repeat_interleave(n)
        inside = torch.arange(run.numel(), device="cpu") - (torch.cumsum(n, 0) - n)[run]
        items = torch.empty_like(run)
        items[at[run] + stride[run] * inside] = word[run] | (start[run] + step[run] * inside) << 32
        return items


def _check(
    numels: Sequence[int],
    adapt: Sequence[bool],
    chunk: int,
    window: int,
    in_flight: int,
    bytes_per_element: int,
    order: str,
) -> None:
    if len(numels) != len(adapt):
        raise ValueError(f"{len(numels)} tensors but {len(adapt)} adapt flags")
    if len(numels) > MAX_TENSORS:
        raise ValueError(f"at most 2**30 tensors fit one plan, got {len(numels)}")
    if order not in ("grouped", "sliding"):
        raise ValueError(f'order must be "grouped" or "sliding", got {order!r}')
    if min(chunk, in_flight, bytes_per_element) < 1 or window < 0:
        raise ValueError(
            "chunk, in_flight and bytes_per_element must be at least 1 and window at least 0, "
            f"got {chunk}, {in_flight}, {bytes_per_element} and {window}"
        )
    for i, n in enumerate(numels):
        if not 0 <= n <= MAX_CHUNKS * chunk:
            raise ValueError(
                f"tensor {i} must have 0 to {MAX_CHUNKS * chunk} elements "
                f"(2**31 chunks of {chunk}), got {n}"
            )
