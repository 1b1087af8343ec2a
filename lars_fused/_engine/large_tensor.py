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
    block_sizes,
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
        self, index: list[int], weights: Sequence[Tensor], grads: Sequence[Tensor],
        dtype: torch.dtype, plain: bool,
    ):  # fmt: skip
        """Prepare for tensors like these. `plain`: none needs to be widened."""
        self.index, self._plain = index, plain
        self._dims = [own_pieces(w) if plain else () for w in weights]
        counts = []
        for w, g in zip(weights, grads, strict=True):
            counts += _pieces(w, g, dtype)
        # Written in later steps, which may run outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._table = torch.zeros(len(counts), max(counts), dtype=dtype, device="cpu")
        rows = [row[:count] for row, count in zip(self._table, counts, strict=True)]
        self._rows = list(zip(rows[::2], rows[1::2], strict=True))

    def squares(self, tensors: Sequence[Large], alpha: float, exact: bool, stage: Stage) -> Squares:
        """The squared norms of its tensors.

        Args:
            tensors: in the order of `index`.
            alpha: the multiple of w that is added to g.
            exact: whether N(g + alpha·w) is needed.
            stage: for what must be widened.
        """
        if exact and alpha:
            each = [_squares_in_stages(t, alpha, stage) for t in tensors]
            return Squares(*map(list, zip(*each, strict=True)))
        for t, dims, (w, g) in zip(tensors, self._dims, self._rows, strict=True):
            if dims:
                norm(t.w, 2, dims, out=w)
                norm(t.g, 2, dims, out=g)
            else:
                _norms(t.w, w, stage)
                _norms(t.g, g, stage)
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
            stage: for what must be widened.
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
        w, g, dtype = weights[i], grads[i], dtypes[i]
        plain = w.dtype == g.dtype == dtype
        same = found.setdefault((kinds[i], dtype, plain), [_Filling()])
        most = max(_pieces(w, g, dtype))
        if not same[-1].take(i, w.numel(), most):
            same.append(_Filling())
            same[-1].take(i, w.numel(), most)
    return [
        Window(
            each.index, [weights[i] for i in each.index], [grads[i] for i in each.index], dtype,
            plain,
        )
        for (_, dtype, plain), same in found.items()
        for each in same
    ]  # fmt: skip


class _Filling:
    """A window to which tensors are added."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self._elements = self._most = 0

    def take(self, i: int, elements: int, pieces: int) -> bool:
        """Add one more, if it fits; the first one always does."""
        elements, most = self._elements + elements, max(self._most, pieces)
        if self.index and (elements > WINDOW or 2 * (len(self.index) + 1) * most > TABLE):
            return False
        self.index.append(i)
        self._elements, self._most = elements, most
        return True


def _pieces(w: Tensor, g: Tensor, dtype: torch.dtype) -> list[int]:
    """How many norms `Window.squares` takes of a tensor, and of its gradient."""
    if w.dtype == g.dtype == dtype and own_pieces(w):
        return [len(w)] * 2
    n = w.numel()
    widened = sum(map(piece_count, block_sizes(n, 2 * STAGE)))
    return [piece_count(n) if t.dtype == dtype else widened for t in (w, g)]


class Stage:
    """Memory in which blocks are widened: one of 2·STAGE elements, or two of STAGE.

    Made when needed, for one step. largest: no tensor has more elements.
    """

    def __init__(self, dtype: torch.dtype, largest: int) -> None:
        self._size, self._dtype = min(STAGE, largest), dtype
        self._memory: Tensor | None = None
        # Blocks have few sizes, and making a view costs as much as half a conversion.
        self._ones: dict[int, Tensor] = {}
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def one(self, size: int) -> Tensor:
        """Memory for one block."""
        if self._memory is None:
            self._memory = torch.empty(2 * self._size, dtype=self._dtype, device="cpu")
        if size not in self._ones:
            self._ones[size] = self._memory[:size]
        return self._ones[size]

    def pair(self, size: int) -> tuple[Tensor, Tensor]:
        """Memory for two blocks of this size."""
        if size not in self._pairs:
            both = self.one(2 * size)
            self._pairs[size] = both[:size], both[size:]
        return self._pairs[size]


def _norms(x: Tensor, out: Tensor, stage: Stage) -> None:
    """The norms of the pieces of x."""
    if x.dtype == out.dtype:
        piece_norms(x, out)
        return
    at = 0
    for block in blocks(x, 2 * STAGE):
        count = piece_count(block.numel())
        piece_norms(stage.one(block.numel()).copy_(block), out[at : at + count])
        at += count


def _squares_in_stages(t: Large, alpha: float, stage: Stage) -> tuple[float, float, float]:
    """N(w)², N(g)² and N(g + alpha·w)²."""
    parts: tuple[list[float], ...] = [], [], []
    for w, g in zip(blocks(t.w, STAGE), blocks(t.g, STAGE), strict=True):
        first, second = stage.pair(w.numel())
        wide_w = w if w.dtype == t.dtype else first.copy_(w)
        wide_g = g if g.dtype == t.dtype else second.copy_(g)
        # One by one: each core then finds what it has just widened in its own cache.
        parts[0].extend(piece_norms(wide_w).tolist())
        parts[1].extend(piece_norms(wide_g).tolist())
        parts[2].extend(piece_norms(torch.add(wide_g, wide_w, alpha=alpha, out=second)).tolist())
    w2, g2, d2 = map(joint_square, parts)
    return w2, g2, d2


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
    for w, g, v, copy in zip_longest(*lists):
        assert w is not None
        assert g is not None
        first, second = stage.pair(w.numel())
        wide_w = w if w.dtype == t.dtype else first.copy_(w)
        d = g if g.dtype == t.dtype else second.copy_(g)
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
