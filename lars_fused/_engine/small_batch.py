"""Many small tensors as rows of two matrices: norms and updates in a dozen calls.

A tensor takes one or more rows, in memory order, the last one padded with zeros. Its gradient's
rows become factor·d, so that one call of the SGD kernel updates every tensor, each with its own
trust ratio.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..options import Options
from . import sgd_kernel

LARGEST = 1 << 14  # elements; beyond, separate calls are cheaper than the copies
ROOM = 1 << 16  # elements per matrix: both fit a core's second-level cache
ROWS = (16, 64, 512)  # lengths of a row, for tensors up to this size; the last for all others
_norm = torch.linalg.vector_norm


def numbers(values: Iterable[float], dtype: torch.dtype) -> Tensor:
    """Make a 1-d CPU tensor in a tenth of the time of `torch.tensor`."""
    code = "d" if dtype == torch.float64 else "f"
    return torch.frombuffer(array(code, values), dtype=dtype)


def row_length(numel: int) -> int:
    """The row length for a tensor of this many elements."""
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


class Batch:
    """The rows of some tensors. `index`: their positions in the step's lists."""

    def __init__(
        self, index: list[int], row: int, scratch: Scratch, weights: Sequence[Tensor],
        buffers: Sequence[Tensor | None], kinds: Sequence[int],
    ):  # fmt: skip
        self.index, self.dtype, self._scratch = index, scratch.dtype, scratch
        n = len(index)
        self._counts = counts = [max(1, -(-weights[i].numel() // row)) for i in index]
        first = [0, *accumulate(counts)]  # row of each tensor
        size = first[-1] * row
        self._flat = scratch.flat("WD", 2 * size)
        self._w, self._d = self._flat.view(2, first[-1], row)
        starts = [k for k in range(n) if k == 0 or kinds[index[k]] != kinds[index[k - 1]]]
        self.runs = [
            Run(slice(a, b), slice(first[a], first[b]), index[a])
            for a, b in zip(starts, [*starts[1:], n], strict=True)
        ]
        # The tensor of each row; None if each has one row.
        owners = torch.tensor([k for k in range(n) for _ in range(counts[k])], device="cpu")
        self._owners = owners if max(counts) > 1 else None
        # What the kernel cannot update in place is updated in its row and copied back.
        held = [buffers[i] for i in index]
        self._wide_w = [k for k, i in enumerate(index) if weights[i].dtype != self.dtype]
        self._wide_v = [k for k, v in enumerate(held) if v is not None and v.dtype != self.dtype]
        matrices = {"W": self._flat[:size], "D": self._flat[size:]}
        if self._wide_v:
            matrices["V"] = scratch.flat("V", size)
        self._rows = {
            name: [
                t.as_strided(w.size(), w.stride(), t.storage_offset() + at * row)
                for at, w in zip(first, (weights[i] for i in index), strict=False)
            ]
            for name, t in matrices.items()
        }
        self._rows["both"] = self._rows["W"] + self._rows["D"]

    def load(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        """W ← w, D ← g."""
        if self._scratch.clean_for is not self:
            self._flat.zero_()
        self._scratch.clean_for = self
        if weights[0].dtype == grads[0].dtype:
            torch._foreach_copy_(self._rows["both"], weights + grads)
        else:
            torch._foreach_copy_(self._rows["W"], weights)
            torch._foreach_copy_(self._rows["D"], grads)

    def decay(self, alphas: list[float]) -> None:
        """D ← D + alpha·W, one alpha per run."""
        if len(set(alphas)) == 1:
            self._decay(self._d, self._w, alphas[0])
            return
        for run, alpha in zip(self.runs, alphas, strict=True):
            self._decay(self._d[run.rows], self._w[run.rows], alpha)

    def _decay(self, d: Tensor, w: Tensor, alpha: float) -> None:
        if not alpha:
            return
        # An FMA rounds once, so d is accurate to an ulp even if g and βw cancel; but β would be
        # rounded first, and cancellation exposes that.
        rounded = array("d" if self.dtype == torch.float64 else "f", [alpha])[0]
        d.add_(w, alpha=rounded)
        if alpha != rounded:
            d.add_(w, alpha=alpha - rounded)

    def squares(self, name: str) -> list[float]:
        """The squared norms of each tensor's rows in W or D."""
        # On the host: with cold caches an operator costs as much as a hundred of these numbers.
        norms = _norm(self._w if name == "W" else self._d, dim=1).tolist()
        squares = [norm * norm for norm in norms]
        if self._owners is None:
            return squares
        rest = iter(squares)
        return [sum(islice(rest, count)) for count in self._counts]

    def undo_decay(self, k: int, g: Tensor) -> None:
        """D ← g in one tensor: the layer has a zero norm and must not decay."""
        self._rows["D"][k].copy_(g)

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
        if not all(-3e38 < f < 3e38 for f in factors):
            self._scratch.clean_for = None  # the padding may hold 0 · inf
        column = numbers(factors, self.dtype)
        if self._owners is not None:
            column = column[self._owners]
        self._d.mul_(column.unsqueeze(1))
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
        if any(c is not None for c in copies):
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
    kinds: Sequence[int], scratch: Scratch,
) -> list[Batch]:  # fmt: skip
    """Split small tensors into batches of equal row length that fit the scratch memory.

    `kinds`: tensors of equal kind become adjacent and form a run.
    """
    by_row: dict[int, list[list[int]]] = {}
    room: dict[int, int] = {}
    for i in sorted(index, key=kinds.__getitem__):
        row = row_length(weights[i].numel())
        needed = max(1, -(-weights[i].numel() // row)) * row
        if needed > room.get(row, 0):
            by_row.setdefault(row, []).append([])
            room[row] = ROOM
        by_row[row][-1].append(i)
        room[row] -= needed
    return [
        Batch(some, row, scratch, weights, buffers, kinds)
        for row, found in sorted(by_row.items())
        for some in found
    ]
