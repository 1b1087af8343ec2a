"""Many small tensors as rows of two matrices: norms and updates in a dozen calls.

A row holds one tensor in memory order, padded with zeros. The gradient's row becomes factor·d, so
that one call of the SGD kernel updates every tensor, each with its own trust ratio.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from . import sgd_kernel
from .square_norms import PIECE

LARGEST = 1 << 14  # elements; beyond, separate calls are cheaper than the copies
ROOM = 1 << 16  # elements per matrix: both fit a core's second-level cache
_norm = torch.linalg.vector_norm


def numbers(values: Any, dtype: torch.dtype) -> Tensor:
    """Make a 1-d CPU tensor in a tenth of the time of `torch.tensor`."""
    code = "d" if dtype == torch.float64 else "f"
    return torch.frombuffer(array(code, values), dtype=dtype)


def width(numel: int) -> int:
    """The row length for a tensor of this many elements."""
    if numel > PIECE:
        return -(-numel // PIECE) * PIECE
    return 1 << max(4, (numel - 1).bit_length())


class Run(NamedTuple):
    """Adjacent rows whose tensors agree in options, in first step, and in having a buffer."""

    rows: slice
    at: int  # index of the first in the step's lists


class Scratch:
    """Memory for the rows of one batch at a time: W, D and, if requested, V."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.clean_for: Batch | None = None  # whose padding is zero
        self._held: dict[str, Tensor] = {}

    def flat(self, name: str, size: int) -> Tensor:
        """At least `size` elements at a stable address; `size` is at most ROOM."""
        if name not in self._held:
            # Written in later steps, which may run outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._held[name] = torch.zeros(ROOM, dtype=self.dtype, device="cpu")
        return self._held[name][:size]


class Batch:
    """The rows of some tensors. `index`: their positions in the step's lists."""

    def __init__(
        self, index: list[int], row: int, scratch: Scratch, weights: Sequence[Tensor],
        buffers: Sequence[Tensor | None], kinds: Sequence[Any],
    ):  # fmt: skip
        self.index, self.dtype, self._scratch = index, scratch.dtype, scratch
        n, size = len(index), len(index) * row
        starts = [k for k in range(n) if k == 0 or kinds[index[k]] != kinds[index[k - 1]]]
        self.runs = [
            Run(slice(a, b), index[a]) for a, b in zip(starts, [*starts[1:], n], strict=True)
        ]
        flat = {name: scratch.flat(name, size) for name in "WD"}
        pieces = (n, row) if row <= PIECE else (n, row // PIECE, PIECE)
        self._w, self._d = flat["W"], flat["D"]
        self._pieces = {name: t.view(pieces) for name, t in flat.items()}
        self._matrix = {name: t.view(n, row) for name, t in flat.items()}
        # What the kernel cannot update in place is updated in its row and copied back.
        self._wide_w = [weights[i].dtype != self.dtype for i in index]
        held = [buffers[i] for i in index]
        self._wide_v = [v is not None and v.dtype != self.dtype for v in held]
        self._wide = any(self._wide_w) or any(self._wide_v)
        if any(self._wide_v):
            flat["V"] = scratch.flat("V", size)
        self._rows = {
            name: [
                t.as_strided(w.size(), w.stride(), t.storage_offset() + at * row)
                for at, w in enumerate(weights[i] for i in index)
            ]
            for name, t in flat.items()
        }

    def load(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        """W ← w, D ← g."""
        if self._scratch.clean_for is not self:
            self._w.zero_()
            self._d.zero_()
        self._scratch.clean_for = self
        torch._foreach_copy_(self._rows["W"], weights)
        torch._foreach_copy_(self._rows["D"], grads)

    def decay(self, alphas: list[float]) -> None:
        """D ← D + alpha·W, one alpha per run."""
        if len(set(alphas)) == 1:
            self._decay(self._d, self._w, alphas[0])
            return
        d, w = self._matrix["D"], self._matrix["W"]
        for run, alpha in zip(self.runs, alphas, strict=True):
            self._decay(d[run.rows], w[run.rows], alpha)

    def _decay(self, d: Tensor, w: Tensor, alpha: float) -> None:
        if not alpha:
            return
        # An FMA rounds once, so d is accurate to an ulp even if g and βw cancel; but β would be
        # rounded first, and cancellation exposes that.
        rounded = array("d" if self.dtype == torch.float64 else "f", [alpha])[0]
        d.add_(w, alpha=rounded)
        if alpha != rounded:
            d.add_(w, alpha=alpha - rounded)

    def undo_decay(self, k: int, g: Tensor) -> None:
        """D ← g in one row: the layer has a zero norm and must not decay."""
        self._rows["D"][k].copy_(g)

    def norms(self, name: str) -> list[float]:
        """The norm of each row of W or D."""
        found = _norm(self._pieces[name], dim=-1)
        if found.dim() > 1:
            found = _norm(found, dim=1, dtype=torch.float64)
        norms: list[float] = found.tolist()
        return norms

    def update(
        self, weights: list[Tensor], buffers: list[Any], copies: list[Tensor | None],
        options: Sequence[Options], outs: list[float], factors: list[float], left: set[int],
    ) -> None:  # fmt: skip
        """D ← factor·D, then the kernel on all rows except `left`.

        Args:
            weights: the tensors of the rows; likewise `buffers` and `copies`.
            buffers: a tensor if the options of its run have momentum, else None.
            copies: what else is set to the new weight.
            options: of each run; likewise `outs`.
            outs: the factor of the momentum buffer in the update.
            factors: of each row.
            left: rows that are not updated.
        """
        if not all(-3e38 < f < 3e38 for f in factors):
            self._scratch.clean_for = None  # the padding may hold 0 · inf
        self._matrix["D"].mul_(numbers(factors, self.dtype).unsqueeze(1))
        kinds: dict[tuple[float, float, bool], list[int]] = {}
        for run, o, out in zip(self.runs, options, outs, strict=True):
            momentum = o.momentum if buffers[run.rows.start] is not None else 0.0
            rows = kinds.setdefault((out, momentum, o.nesterov), [])
            rows.extend(range(run.rows.start, run.rows.stop))
        whole = len(kinds) == 1 and not left
        if not whole:
            kinds = {key: [k for k in rows if k not in left] for key, rows in kinds.items()}
        back: tuple[list[Tensor], list[Tensor]] = ([], [])
        targets, momenta = weights, buffers
        if self._wide:
            targets, momenta = self._widened(weights, buffers, back)
        for (out, momentum, nesterov), rows in kinds.items():
            w, d, v = targets, self._rows["D"], momenta
            if not whole:
                w, d, v = ([column[k] for k in rows] for column in (w, d, v))
            sgd_kernel.run(
                w, d, v if momentum else [], keep=1.0, decay=0.0, momentum=momentum, lr=out,
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
        self, weights: list[Tensor], buffers: list[Any], back: tuple[list[Tensor], list[Tensor]]
    ) -> tuple[list[Tensor], list[Any]]:
        """Substitutes for tensors of other dtypes; `back`: pairs (destination, source) to copy."""
        targets, momenta = list(weights), list(buffers)
        for k in range(len(weights)):
            if self._wide_w[k]:
                targets[k] = self._rows["W"][k]
                back[0].append(weights[k])
                back[1].append(targets[k])
            if self._wide_v[k]:
                momenta[k] = self._rows["V"][k].copy_(buffers[k])
                back[0].append(buffers[k])
                back[1].append(momenta[k])
        return targets, momenta


def batches(
    index: Sequence[int], weights: Sequence[Tensor], buffers: Sequence[Tensor | None],
    kinds: Sequence[Any], scratch: Scratch,
) -> list[Batch]:  # fmt: skip
    """Split small tensors into batches of equal row length that fit the scratch memory.

    `kinds`: tensors of equal kind become adjacent and form a run.
    """
    seen: dict[Any, int] = {}
    place = [seen.setdefault(kind, len(seen)) for kind in kinds]
    by_width: dict[int, list[int]] = {}
    for i in sorted(index, key=place.__getitem__):
        by_width.setdefault(width(weights[i].numel()), []).append(i)
    return [
        Batch(same[at : at + ROOM // row], row, scratch, weights, buffers, place)
        for row, same in sorted(by_width.items())
        for at in range(0, len(same), ROOM // row)
    ]
