"""Large tensors on a CPU: the norms of a window of them, followed by its updates.

What the kernel cannot express or store is widened block by block into scratch memory (`Stage`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from . import sgd_kernel
from .rates import Rates
from .square_norms import (
    STAGE,
    blocks,
    joined,
    joint_square,
    norm,
    own_pieces,
    piece_count,
    piece_norms,
)

# A change from norms to updates costs the host 0.1 ms, since data has driven its code out of the
# caches: more than a short window saves by finding w and g there again.
WINDOW = 1 << 25  # elements
TABLE = 1 << 19  # numbers: a row for each w and g, as long as the most pieces of one


class Large(NamedTuple):
    """One tensor's weight, gradient, momentum and copy, contiguous; its compute dtype."""

    w: Tensor
    g: Tensor
    v: Tensor | None
    copy: Tensor | None
    dtype: torch.dtype

    def kernel_fits(self, o: Options) -> bool:
        """Whether the kernel can update it in place; its w and g have the compute dtype."""
        v_fits = self.v is None or self.v.dtype == self.dtype or not o.momentum
        return v_fits and self.copy is None and not o.nesterov


class Squares(NamedTuple):
    """N(w)², N(g)² and N(g + alpha·w)² of each tensor; NaN for the last if it is not known."""

    w: Sequence[float]
    g: Sequence[float]
    d: Sequence[float]


class Window:
    """Adjacent large tensors of one kind: all norms first, then all updates.

    index: their positions in the step's lists.
    """

    def __init__(
        self, index: list[int], weights: Sequence[Tensor], dtype: torch.dtype, plain: bool
    ):
        """Prepare for tensors like these. `plain`: none needs to be widened."""
        self.index, self._plain = index, plain
        self._dims = [own_pieces(w) for w in weights]
        counts = [_pieces(w) for w in weights]
        if plain:
            # Written in later steps, which may run outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._table = torch.zeros(2 * len(index), max(counts), dtype=dtype, device="cpu")
            rows = [row[: counts[k // 2]] for k, row in enumerate(self._table)]
            self._rows = list(zip(rows[::2], rows[1::2], strict=True))

    def squares(self, tensors: Sequence[Large], alpha: float, exact: bool, stage: Stage) -> Squares:
        """The squared norms of its tensors.

        Args:
            tensors: in the order of `index`.
            alpha: the multiple of w that is added to g.
            exact: whether N(g + alpha·w) is needed.
            stage: for what must be widened; `update` takes the same one.
        """
        if not self._plain or (exact and alpha):
            each = [_squares_in_stages(t, alpha, exact, stage) for t in tensors]
            return Squares(*map(list, zip(*each, strict=True)))
        for t, dims, (w, g) in zip(tensors, self._dims, self._rows, strict=True):
            if dims:
                norm(t.w, 2, dims, out=w)
                norm(t.g, 2, dims, out=g)
            else:
                piece_norms(t.w, w)
                piece_norms(t.g, g)
        found = joined(self._table)
        w, g = found[::2], found[1::2]
        return Squares(w, g, [math.nan] * len(tensors) if alpha else g)

    def update(
        self, tensors: Sequence[Large], rates: Rates, o: Options, scale: float, left: set[int],
        stage: Stage,
    ) -> None:  # fmt: skip
        """Update its tensors, the last one first: it has just left the most in the cache.

        Args:
            tensors: in the order of `index`.
            rates: the factors of each.
            o: their options.
            scale: the loss scale.
            left: indices that are not updated.
            stage: the one that `squares` was given.
        """
        each = list(zip(self.index, tensors, rates.factors, rates.decays, strict=True))
        for i, t, factor, decay in reversed(each):
            if i in left:
                continue
            factor /= scale
            if self._plain and t.kernel_fits(o) and sgd_kernel.expressible(factor, t.dtype):
                sgd_kernel.update([t.w], [t.g], [t.v], factor, decay * scale, rates.out, o)
            else:
                _update_in_stages(t, factor, decay * scale, rates.out, o, stage)


def windows(
    index: Sequence[int], weights: Sequence[Tensor], grads: Sequence[Tensor],
    dtypes: Sequence[torch.dtype], kinds: Sequence[int],
) -> list[Window]:  # fmt: skip
    """Split large tensors into windows.

    `dtypes`: in which each is computed. `kinds`: only tensors of equal kind share a window.
    """
    found: dict[tuple[int, torch.dtype, bool], list[_Filling]] = {}
    for i in index:
        w, plain = weights[i], weights[i].dtype == grads[i].dtype == dtypes[i]
        same = found.setdefault((kinds[i], dtypes[i], plain), [])
        # What is widened goes alone: its last block is then still there for the update.
        if not (same and plain and same[-1].take(i, w)):
            same.append(_Filling(i, w))
    return [
        Window(each.index, [weights[i] for i in each.index], dtype, plain)
        for (_, dtype, plain), same in found.items()
        for each in same
    ]


class _Filling:
    """A window to which tensors are added."""

    def __init__(self, i: int, w: Tensor):
        self.index, self._elements, self._most = [i], w.numel(), _pieces(w)

    def take(self, i: int, w: Tensor) -> bool:
        """Add one more, if it fits."""
        elements, most = self._elements + w.numel(), max(self._most, _pieces(w))
        if elements > WINDOW or 2 * (len(self.index) + 1) * most > TABLE:
            return False
        self.index.append(i)
        self._elements, self._most = elements, most
        return True


def _pieces(t: Tensor) -> int:
    return len(t) if own_pieces(t) else piece_count(t.numel())


class Stage:
    """Memory in which one block of w and g is widened; made when needed, for one step.

    largest: no tensor has more elements.
    """

    def __init__(self, dtype: torch.dtype, largest: int) -> None:
        self._size, self._dtype = min(STAGE, largest), dtype
        self._memory: Tensor | None = None
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._held = 0  # the address of the block of w that is widened

    def widened(self, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks in the compute dtype: themselves, or what the memory holds or now receives."""
        first, second = self.pair(w.numel())
        known, self._held = self._held == w.data_ptr(), w.data_ptr()
        if w.dtype != self._dtype:
            w = first if known else first.copy_(w)
        if g.dtype != self._dtype:
            g = second if known else second.copy_(g)
        return w, g

    def pair(self, size: int) -> tuple[Tensor, Tensor]:
        """Memory for two blocks of this size."""
        if self._memory is None:
            self._memory = torch.empty(2 * self._size, dtype=self._dtype, device="cpu")
        if size not in self._views:  # of whole blocks, and of each tensor's last
            self._views[size] = self._memory[:size], self._memory[size : 2 * size]
        return self._views[size]

    def spend(self, size: int) -> tuple[Tensor, Tensor]:
        """The same, to be written to."""
        self._held = 0
        return self.pair(size)


def _squares_in_stages(
    t: Large, alpha: float, exact: bool, stage: Stage
) -> tuple[float, float, float]:
    """N(w)², N(g)², and if `exact`, N(g + alpha·w)². Leaves the last block in the stage."""
    parts: tuple[list[float], ...] = [], [], []
    for block in zip(blocks(t.w, STAGE), blocks(t.g, STAGE), strict=True):
        w, g = stage.widened(*block)
        # One by one: each core then finds what it has just widened in its own cache.
        parts[0].extend(piece_norms(w).tolist())
        parts[1].extend(piece_norms(g).tolist())
        if exact:
            d = torch.add(g, w, alpha=alpha, out=stage.spend(w.numel())[1])
            parts[2].extend(piece_norms(d).tolist())
    w2, g2, d2 = map(joint_square, parts)
    return w2, g2, d2 if exact else math.nan if alpha else g2


def _update_in_stages(
    t: Large, factor: float, alpha: float, out: float, o: Options, stage: Stage
) -> None:
    """Update what the kernel cannot express or store: nesterov, a copy, other dtypes."""
    held = t.v if o.momentum else None
    fold = held is not None and not o.nesterov and sgd_kernel.expressible(factor, t.dtype)
    sign = -1.0 if o.maximize else 1.0
    v_stage = None
    if held is not None and held.dtype != t.dtype:
        v_stage = torch.empty(min(STAGE, held.numel()), dtype=t.dtype, device="cpu")
    lists = [[None] if x is None else blocks(x, STAGE) for x in (t.w, t.g, held, t.copy)]
    for w, g, v, copy in reversed([*zip_longest(*lists)]):
        assert w is not None
        assert g is not None
        wide_w, d = stage.widened(w, g)
        _, second = stage.spend(w.numel())
        wide_v = v if v is None or v_stage is None else v_stage[: v.numel()].copy_(v)
        if not fold:
            if alpha:
                d = torch.add(d, wide_w, alpha=sign * alpha, out=second)
            d = torch.mul(d, sign * factor, out=second)
        sgd_kernel.run(
            [wide_w], [d], [] if wide_v is None else [wide_v], keep=factor if fold else 1.0,
            decay=alpha if fold else 0.0, momentum=0.0 if held is None else o.momentum, lr=out,
            nesterov=o.nesterov, maximize=fold and o.maximize,
        )  # fmt: skip
        if wide_w is not w:
            w.copy_(wide_w)
        if v is not None and wide_v is not None and wide_v is not v:
            v.copy_(wide_v)
        if copy is not None:
            copy.copy_(wide_w)
