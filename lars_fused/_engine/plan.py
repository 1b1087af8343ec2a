"""The ordered work list of one step: which chunk of which tensor is done when.

Pure data, computed once per list of tensors. One item is one 64-bit word (`kernels/layout.py`), and
programs take items in list order, each waiting for nothing but earlier items. Three kinds:

- ``NORM``: partial sums of one chunk of a tensor of several chunks;
- ``UPDATE``: the update of one such chunk, after *all* ``NORM`` items of its tensor;
- ``BOTH``: norm and update by one program, for a tensor of one chunk; and every chunk of a tensor
  with ``adapt=False``, whose update waits for no norm (its norms are only reported).

The second read of w and g is free when it still hits the L2 cache, so little may be read between a
chunk's NORM and its UPDATE; but an update must also come late enough (``lag`` items) that the last
norms of its tensor, in the hands of other programs, are done and its ratio is published. Orders:

``ahead``: the norms of all tensors in one stream, in the order of the list, which is mostly that of
memory. A tensor's updates are put into it all at once, ``lag`` items after its last norm: always
that far ahead and no further, but at the end, where the last lag of norms goes in at once. A chunk
waits in cache while at most its own tensor and the lag are read; what was updated meanwhile takes
up cache too unless the cache drops it first (``evict_first``).

``grouped``: norms of A, S1, S2, ...; updates of A, S1, S2, ...; next group. The norms of the
smaller S fill the time that A's updates would wait, A's updates do the same for S. A group of T
elements spans at most 12T bytes of fp32 w, g and v even if updated data stays in cache, but where
tensors are large a group is one tensor, and every program waits for its last norm.

``resident``: for programs that keep w and g in shared memory between sums and update, of which
program p takes items p, p + P, p + 2P, ... (`kernels/lars_resident.py`). Tensor after tensor: a
``BOTH`` item for each chunk that can be held until the tensor's last norm is done (``span``); for
those before them a ``NORM`` item, and an ``UPDATE`` item behind the rest.

Updates run backwards: the chunk read last is read again first, which saves what is still cached
where not all of it is.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.layout import (
    BOTH,
    CHUNK_SHIFT,
    MAX_CHUNKS,
    MAX_GROUPS,
    MAX_TENSORS,
    NORM,
    UPDATE,
    item_word,
    unpack_item,
)


@dataclass(frozen=True)
class Plan:
    """The work list of one list of tensors.

    ``items``: int64 words in ticket order. ``slots``: for each tensor of several chunks the
    index of its first chunk's partial sums; -1 for every other tensor.
    ``n_slots``: how many partial sums there are in all. ``finishes``: an item of each tensor of
    several chunks, in the order of their norms, which `resident` does tensor after tensor.
    """

    items: torch.Tensor
    slots: tuple[int, ...]
    n_slots: int
    n_tensors: int
    finishes: torch.Tensor


def chunk_count(numel: int, chunk: int) -> int:
    """Chunks of ``chunk`` elements that cover ``numel`` elements."""
    return -(-numel // chunk)


def unpack_items(items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kinds, tensor indices and chunk indices of packed items, each int64."""
    return unpack_item(items)


def make_plan(
    numels: Sequence[int],
    adapt: Sequence[bool],
    groups: Sequence[int] | None = None,
    *,
    chunk: int,
    window: int,
    lag: int,
    bytes_per_element: int,
    order: str = "ahead",
    span: int = 0,
) -> Plan:
    """Order the work of one step.

    ``groups``: parameter group of each tensor, all 0 by default. ``chunk``: elements of one item.
    ``window``: bytes of w and g that a group of ``grouped`` may span. ``lag``: items between the
    last norm of a tensor and its first update. ``bytes_per_element``: of w and g together.
    ``span``: chunks of one tensor that ``resident`` may hold. Empty tensors get no item.
    """
    groups = [0] * len(numels) if groups is None else groups
    _check(numels, adapt, groups, chunk, window, lag, bytes_per_element, order)
    counts = [chunk_count(n, chunk) for n in numels]
    slots, n_slots = [-1] * len(numels), 0
    for i, c in enumerate(counts):
        if c > 1:
            slots[i], n_slots = n_slots, n_slots + c
    multi = sorted((c, -i) for i, c in enumerate(counts) if c > 1 and adapt[i])
    # Largest first, so that the tiniest items even out the end of the launch.
    both = [i for i, c in enumerate(counts) if c == 1 or (c and not adapt[i])]
    both.sort(key=lambda i: (-numels[i], i))

    tape = _Tape(counts, groups, deque(both))
    if order == "resident":
        _resident(tape, sorted(-i for _, i in multi), span)
    elif order == "grouped":
        _grouped(tape, multi, window // (chunk * bytes_per_element), lag)
    else:
        _ahead(tape, sorted(-i for _, i in multi), lag)
    tape.fill(sum(counts))
    return Plan(tape.items(), tuple(slots), n_slots, len(numels), tape.finishes())


def _ahead(tape: _Tape, tensors: list[int], lag: int) -> None:
    # Behind the last norms comes nothing new: the updates that are due meanwhile are held back.
    first_held, held = len(tensors), 0
    while first_held and held < lag:
        first_held -= 1
        held += tape.counts[tensors[first_held]]
    pending: deque[tuple[int, int]] = deque()  # tensor, length of the tape at which it is due
    for at, i in enumerate(tensors):
        done, count = 0, tape.counts[i]
        while done < count:
            n = count - done
            if pending and at < first_held:
                n = min(n, pending[0][1] - tape.length)
            tape.add(NORM, i, done, n)
            done += n
            while pending and pending[0][1] <= tape.length and at < first_held:
                tape.add(UPDATE, pending.popleft()[0])
        pending.append((i, tape.length + lag))
    for i, due in pending:
        tape.fill(due - tape.length)
        tape.add(UPDATE, i)


def _resident(tape: _Tape, tensors: list[int], span: int) -> None:
    for i in tensors:
        held = min(tape.counts[i], span)
        twice = tape.counts[i] - held
        tape.add(NORM, i, 0, twice)
        tape.add(BOTH, i, twice, held)
        tape.add(UPDATE, i, 0, twice)


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
            tape.add(UPDATE, i)


class _Tape:
    """The list being written: runs of items, expanded to one word per chunk at the end."""

    def __init__(self, counts: list[int], groups: Sequence[int], fillers: deque[int]) -> None:
        self.counts, self.groups, self.fillers, self.length = counts, groups, fillers, 0
        self.runs: list[tuple[int, int, int, int]] = []

    def add(self, kind: int, tensor: int, first: int = 0, n: int | None = None) -> None:
        """``n`` chunks of a tensor from ``first`` on, or all; updates from the last one down."""
        n = self.counts[tensor] - first if n is None else n
        word = item_word(kind, tensor, self.groups[tensor])
        start, step = (first + n - 1, -1) if kind == UPDATE else (first, 1)
        self.runs.append((word, start, step, n))
        self.length += n

    def fill(self, lack: int) -> None:
        """Spend whole BOTH tensors until ``lack`` items are covered."""
        while lack > 0 and self.fillers:
            lack -= self.counts[self.fillers[0]]
            self.add(BOTH, self.fillers.popleft())

    def finishes(self) -> torch.Tensor:
        """An item of each tensor of several chunks, in the order of their norms."""
        words = {}
        for word, _, _, _ in self.runs:
            kind, tensor, _ = unpack_item(word)
            if kind & NORM and self.counts[tensor] > 1:
                words[tensor] = word
        return torch.tensor(list(words.values()), dtype=torch.int64, device="cpu")

    def items(self) -> torch.Tensor:
        if not self.runs:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        runs = torch.tensor(self.runs, dtype=torch.int64, device="cpu")
        word, start, step, n = runs.unbind(1)
        run = torch.repeat_interleave(n)
        inside = torch.arange(run.numel(), device="cpu") - (torch.cumsum(n, 0) - n)[run]
        items: torch.Tensor = word[run] | (start[run] + step[run] * inside) << CHUNK_SHIFT
        return items


@functools.lru_cache(maxsize=64)
def cached_plan(
    numels: tuple[int, ...], adapt: tuple[bool, ...], groups: tuple[int, ...], *, chunk: int,
    window: int, lag: int, span: int, bytes_per_element: int, order: str,
) -> Plan:  # fmt: skip
    """`make_plan`, once for equal tensors."""
    return make_plan(
        numels, adapt, groups, chunk=chunk, window=window, lag=lag, span=span,
        bytes_per_element=bytes_per_element, order=order,
    )  # fmt: skip


def _check(
    numels: Sequence[int],
    adapt: Sequence[bool],
    groups: Sequence[int],
    chunk: int,
    window: int,
    lag: int,
    bytes_per_element: int,
    order: str,
) -> None:
    if len(numels) != len(adapt):
        raise ValueError(f"make_plan: {len(numels)} tensors but {len(adapt)} adapt flags")
    if len(numels) != len(groups):
        raise ValueError(f"make_plan: {len(numels)} tensors but {len(groups)} groups")
    if groups and not 0 <= min(groups) <= max(groups) < MAX_GROUPS:
        raise ValueError(
            f"make_plan: a group must be in [0, {MAX_GROUPS}), got {min(groups)} to {max(groups)}"
        )
    if len(numels) > MAX_TENSORS:
        raise ValueError(
            f"make_plan: at most {MAX_TENSORS} tensors fit one plan, got {len(numels)}"
        )
    if order not in ("ahead", "grouped", "resident"):
        raise ValueError(
            f'make_plan: order must be "ahead", "grouped" or "resident", got {order!r}'
        )
    if min(chunk, bytes_per_element) < 1 or min(window, lag) < 0:
        raise ValueError(
            "make_plan: chunk and bytes_per_element must be at least 1, window and lag at least 0, "
            f"got {chunk}, {bytes_per_element}, {window} and {lag}"
        )
    for i, n in enumerate(numels):
        if not 0 <= n <= MAX_CHUNKS * chunk:
            raise ValueError(
                f"make_plan: tensor {i} must have 0 to {MAX_CHUNKS * chunk} elements "
                f"({MAX_CHUNKS} chunks of {chunk}), got {n}"
            )
