"""Many small tensors as rows of two matrices: norms and updates in a dozen calls.

A tensor takes one or more rows, in memory order, the last one padded with zeros. Its gradient's
rows become factor·d, so that one call of the SGD kernel updates every tensor, each with its own
trust ratio. Tensors that are not adapted have one factor: the kernel updates them where they are.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, repeat
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..options import Options
from . import sgd_kernel
from .rates import Rates
from .square_norms import PIECE

LARGEST = 1 << 14  # elements; beyond, separate calls are cheaper than the copies
ROOM = 1 << 16  # elements per matrix: both fit a core's second-level cache
ROWS = (16, 64, 512)  # lengths of a row, for tensors up to this size; the last for all others
ALIKE_ROW = 256  # of tensors up to a piece that are not adapted
_norm = torch.linalg.vector_norm


def numbers(values: Iterable[float], dtype: torch.dtype) -> Tensor:
    """Make a 1-d CPU tensor in a tenth of the time of `torch.tensor`."""
    return torch.frombuffer(_floats(dtype, values), dtype=dtype)


def _floats(dtype: torch.dtype, values: Iterable[float]) -> array[float]:
    return array("d" if dtype == torch.float64 else "f", values)


def row_length(numel: int, alike: bool) -> int:
    """The row length for a tensor of this many elements.

    `alike`: it is not adapted. Rows are then only read, so that one length will do for most.
    """
    if alike and numel <= PIECE:
        return ALIKE_ROW
    return next((row for row in ROWS if numel <= row), ROWS[-1])


class Run(NamedTuple):
    """Adjacent tensors that agree in options, and in having a buffer."""

    tensors: slice  # of the batch
    rows: slice
    at: int  # index of the first in the step's lists


class Scratch:
    """Memory for one batch at a time: W and D, one after the other, and, if requested, V."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.clean_for: Batch | None = None  # whose padding is zero
        self._held: dict[str, Tensor] = {}

    def flat(self, name: str, size: int) -> Tensor:
        """At least `size` elements at a stable address; `size` is at most 2·ROOM."""
        if name not in self._held:
            # Written in later steps, which may run outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._held[name] = torch.zeros(2 * ROOM, dtype=self.dtype, device="cpu")
        return self._held[name][:size]


class Column:
    """One number per row, in memory that the host writes."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._dtype, self._memory = dtype, _floats(dtype, [0.0] * size)
        self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(-1, 1)

    def write(self, values: Iterable[float]) -> None:
        """As many as there are rows."""
        self._memory[:] = _floats(self._dtype, values)


class Matrices(NamedTuple):
    """The rows of a batch, as matrices of the same length of row."""

    both: Tensor
    """W, and below it, D."""
    w: Tensor
    d: Tensor


class Batch:
    """The rows of some tensors.

    index: their positions in the step's lists.
    alike: none is adapted, and the kernel may update them where they are.
    """

    def __init__(
        self, index: list[int], row: int, alike: bool, scratch: Scratch, weights: Sequence[Tensor],
        buffers: Sequence[Tensor | None], kinds: Sequence[int],
    ):  # fmt: skip
        self.index, self.alike, self._scratch, dtype = index, alike, scratch, scratch.dtype
        n = len(index)
        counts = [max(1, -(-weights[i].numel() // row)) for i in index]
        self._padded = any(weights[i].numel() % row for i in index)
        first = [0, *accumulate(counts)]  # row of each tensor
        # How many rows each tensor has; None if each has one.
        self._counts = None if first[-1] == n else counts
        size = first[-1] * row
        flat = scratch.flat("WD", 2 * size)
        both = flat.view(-1, row)
        self._matrices = Matrices(both, both[: first[-1]], both[first[-1] :])
        starts = [k for k in range(n) if k == 0 or kinds[index[k]] != kinds[index[k - 1]]]
        self.runs = [
            Run(slice(a, b), slice(first[a], first[b]), index[a])
            for a, b in zip(starts, [*starts[1:], n], strict=True)
        ]
        # The rows of each tensor in W, and further on, in D.
        ends = [*accumulate(counts * 2)]
        self._spans = list(zip([0, *ends], ends, strict=False))
        self._factors = Column(first[-1], dtype)
        # What the kernel cannot update in place is updated in its row and copied back.
        held = [buffers[i] for i in index]
        self._wide_w = [k for k, i in enumerate(index) if weights[i].dtype != dtype]
        self._wide_v = [k for k, v in enumerate(held) if v is not None and v.dtype != dtype]
        memory = {"W": flat[:size], "D": flat[size:]}
        if self._wide_v:
            memory["V"] = scratch.flat("V", size)
        self._rows = {
            name: [
                t.as_strided(w.size(), w.stride(), t.storage_offset() + at * row)
                for at, w in zip(first, (weights[i] for i in index), strict=False)
            ]
            for name, t in memory.items()
        }
        self._rows["both"] = self._rows["W"] + self._rows["D"]

    def load(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        """W ← w, D ← g."""
        if self._padded and self._scratch.clean_for is not self:
            self._matrices.both.zero_()
        self._scratch.clean_for = self
        if weights[0].dtype == grads[0].dtype:
            torch._foreach_copy_(self._rows["both"], weights + grads)
        else:
            torch._foreach_copy_(self._rows["W"], weights)
            torch._foreach_copy_(self._rows["D"], grads)

    def decay(self, alphas: list[float]) -> None:
        """D ← D + alpha·W, one alpha per run."""
        _, w, d = self._matrices
        if len(set(alphas)) == 1:
            if alphas[0]:
                d.add_(w, alpha=alphas[0])
            return
        for run, alpha in zip(self.runs, alphas, strict=True):
            if alpha:
                d[run.rows].add_(w[run.rows], alpha=alpha)

    def squares(self) -> tuple[list[float], list[float]]:
        """The squared norms of each tensor in W, and in D."""
        found, n = self._squares(self._matrices.both, self._spans), len(self.index)
        return found[:n], found[n:]

    def squares_of_d(self) -> list[float]:
        """The squared norms in D only."""
        return self._squares(self._matrices.d, self._spans[: len(self.index)])

    def _squares(self, matrix: Tensor, spans: list[tuple[int, int]]) -> list[float]:
        # On the host: with cold caches an operator costs as much as a hundred of these numbers.
        squares = [norm * norm for norm in _norm(matrix, dim=1).tolist()]
        if self._counts is None:
            return squares
        return [squares[a] if b - a == 1 else sum(squares[a:b]) for a, b in spans]

    def undo_decay(self, k: int, g: Tensor) -> None:
        """D ← g in one tensor: the layer has a zero norm and must not decay."""
        self._rows["D"][k].copy_(g)

    def update_in_place(
        self, weights: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None],
        copies: list[Tensor | None], options: Sequence[Options], rates: Sequence[Rates],
        scale: float, left: set[int],
    ) -> bool:  # fmt: skip
        """Have the kernel update all tensors except `left` where they are, from their gradients.

        Args:
            weights: of the batch.
            grads: of the batch.
            buffers: a tensor if the options of its run have momentum, else None.
            copies: what else is set to the new weight.
            options: of each run.
            rates: of each run.
            scale: the loss scale.
            left: tensors that are not updated.

        Returns:
            False if the kernel cannot express it; then nothing was done.
        """
        calls: list[tuple[list[int], float, float, Options]] = []
        for run, o, own in zip(self.runs, options, rates, strict=True):
            some = range(run.tensors.start, run.tensors.stop)
            for factor in set(own.factors):  # that of a first step may be another
                share = factor / scale
                if o.nesterov or not sgd_kernel.expressible(share, self._scratch.dtype):
                    return False
                mine = [k for k, f in zip(some, own.factors, strict=True) if f == factor]
                calls.append(([k for k in mine if k not in left], share, own.out, o))
        for mine, share, out, o in calls:
            sgd_kernel.update(
                [weights[k] for k in mine], [grads[k] for k in mine], [buffers[k] for k in mine],
                share, o.weight_decay * scale, out, o,
            )  # fmt: skip
        for k, copy in enumerate(copies):
            if copy is not None and k not in left:
                copy.copy_(weights[k])
        return True

    def update(
        self, weights: list[Tensor], buffers: list[Tensor | None], copies: list[Tensor | None],
        options: Sequence[Options], outs: list[float], factors: list[float], left: set[int],
    ) -> None:  # fmt: skip
        """D ← factor·D, then the kernel on all tensors except `left`.

        Args:
            weights: of the batch; likewise `buffers` and `copies`.
            buffers: a tensor if the options of its run have momentum, else None.
            copies: what else is set to the new weight.
            options: of each run; likewise `outs`.
            outs: the factor of the momentum buffer in the update.
            factors: of each tensor.
            left: tensors that are not updated.
        """
        if not (math.isfinite(sum(factors)) and max(map(abs, factors)) < 3e38):
            self._scratch.clean_for = None  # the padding may hold 0 · inf
        by_row: Iterable[float] = factors
        if self._counts is not None:
            by_row = chain.from_iterable(map(repeat, factors, self._counts))
        self._factors.write(by_row)
        self._matrices.d.mul_(self._factors.tensor)
        kinds: dict[tuple[float, float, bool], list[int]] = {}
        for run, o, out in zip(self.runs, options, outs, strict=True):
            momentum = o.momentum if buffers[run.tensors.start] is not None else 0.0
            members = kinds.setdefault((out, momentum, o.nesterov), [])
            members.extend(range(run.tensors.start, run.tensors.stop))
        whole = len(kinds) == 1 and not left
        if not whole:
            kinds = {key: [k for k in some if k not in left] for key, some in kinds.items()}
        back: tuple[list[Tensor], list[Tensor]] = ([], [])
        targets, momenta = weights, buffers
        if self._wide_w or self._wide_v:
            targets, momenta = self._widened(weights, buffers, back)
        for (out, momentum, nesterov), some in kinds.items():
            w, d, v = targets, self._rows["D"], momenta
            if not whole:
                w, d, v = [w[k] for k in some], [d[k] for k in some], [v[k] for k in some]
            held = cast("list[Tensor]", v) if momentum else []
            sgd_kernel.run(
                w, d, held, keep=1.0, decay=0.0, momentum=momentum, lr=out,
                nesterov=nesterov,
            )  # fmt: skip
        if copies.count(None) < len(copies):
            for k, c in enumerate(copies):
                if c is not None:
                    back[0].append(c)
                    back[1].append(targets[k])
        if back[0]:
            torch._foreach_copy_(*back)

    def _widened(
        self, weights: list[Tensor], buffers: list[Tensor | None],
        back: tuple[list[Tensor], list[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Substitutes for tensors of other dtypes; `back`: pairs (destination, source) to copy."""
        targets, momenta = list(weights), list(buffers)
        for k in self._wide_w:
            targets[k] = self._rows["W"][k]
            back[0].append(weights[k])
            back[1].append(targets[k])
        for k in self._wide_v:
            if (v := buffers[k]) is not None:
                momenta[k] = row = self._rows["V"][k].copy_(v)
                back[0].append(v)
                back[1].append(row)
        return targets, momenta


def batches(
    index: Sequence[int], weights: Sequence[Tensor], buffers: Sequence[Tensor | None],
    kinds: Sequence[int], alike: Sequence[bool], scratch: Scratch,
) -> list[Batch]:  # fmt: skip
    """Split small tensors into batches of equal row length that fit the scratch memory.

    Args:
        index: positions of the small tensors in the step's lists, which follow.
        weights: of the step.
        buffers: of the step.
        kinds: of each; tensors of equal kind become adjacent and form a run.
        alike: whether it is not adapted and may be updated where it is; has its own batches.
        scratch: memory of their rows.
    """
    found: dict[tuple[bool, int], list[list[int]]] = {}
    room: dict[tuple[bool, int], int] = {}
    for i in sorted(index, key=kinds.__getitem__):
        row = row_length(weights[i].numel(), alike[i])
        key, needed = (alike[i], row), max(1, -(-weights[i].numel() // row)) * row
        if needed > room.get(key, 0):
            found.setdefault(key, []).append([])
            room[key] = ROOM
        found[key][-1].append(i)
        room[key] -= needed
    return [
        Batch(some, row, same, scratch, weights, buffers, kinds)
        for (same, row), lists in sorted(found.items())
        for some in lists
    ]
