"""The CPU backend: torch's fused SGD kernel with the trust ratio folded into its options.

    dampening ← 1 − factor, lr ← out:    v ← μv + factor·(g + βw),    w ← w − out·v

A tensor's norms are computed just before its update, so that the second read hits the cache. Many
small tensors share one call (`small_batch`); a large one takes several (`large_tensor`). What the
kernel cannot express or store (nesterov, other dtypes, factors that 1 − factor would round) is
passed as factor·d in place of the gradient. Tensors of extreme magnitude use the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import large_tensor, portable, sgd_kernel, validate
from .large_tensor import Large, Rate
from .rates import Rates, rates_of
from .small_batch import LARGEST, Batch, Scratch, batches, numbers
from .square_norms import PLAIN, RANGE, flat, is_zero

# Beyond these, factor·d may leave the dtype's range although the float64 product does not.
_FACTORS = {torch.float32: (1e-30, 1e18), torch.float64: (1e-290, 1e140)}
_PLAN = "plan"


def compute_dtype(w: Tensor) -> torch.dtype:
    """The dtype of a tensor's arithmetic, whatever its storage dtype."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def objection(
    w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None,
    options: Options | None = None, first: bool = False,
) -> str | None:  # fmt: skip
    """Why this backend cannot update a tensor; None if it can, with any options."""
    if w.device.type != "cpu":
        return f"it is on {w.device}"
    dtype = compute_dtype(w)
    if not sgd_kernel.trusted(dtype):
        return f"PyTorch's fused SGD kernel is wrong or missing for {dtype}"
    for what, t in (
        ("the tensor", w), ("its gradient", g), ("its momentum", v), ("its copy", copy),
    ):  # fmt: skip
        if t is None:
            continue
        if type(t) not in PLAIN:
            return f"{what} is a {type(t).__name__}"
        if t.dtype == torch.float64 and dtype != torch.float64:
            return f"{what} is float64, the tensor {w.dtype}"
        if t is not w and not validate.same_layout(t, w):
            return f"{what} has strides {t.stride()}, the tensor {w.stride()}"
    if not validate.dense(w):
        return "its elements are not adjacent in memory"
    return None


class _Plan:
    """The batches of small tensors, and the large ones. Holds none of the step's tensors."""

    def __init__(
        self, weights: Sequence[Tensor], buffers: Sequence[Tensor | None],
        options: Sequence[Options], first: Sequence[bool],
    ):  # fmt: skip
        small: dict[torch.dtype, list[int]] = {}
        self.large: list[int] = []
        for i, w in enumerate(weights):
            if w.numel() > LARGEST:
                self.large.append(i)
            else:
                small.setdefault(compute_dtype(w), []).append(i)
        kinds = [
            (id(o), f, v is None) for o, f, v in zip(options, first, buffers, strict=True)
        ]  # fmt: skip
        self.batches: list[Batch] = []
        for dtype, index in small.items():
            self.batches += batches(index, weights, buffers, kinds, Scratch(dtype))


class _Step:
    """The tensors of one step, and the results gathered for each on the way."""

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
        options: Sequence[Options], first: Sequence[bool], scale: Any, sums: Tensor | None,
        memo: dict[Any, Any] | None,
    ):  # fmt: skip
        self.w, self.g, self.v, self.o, self.first = weights, grads, buffers, options, first
        self.scale = float(scale)
        memo = {} if memo is None else memo
        some = True in first
        if some or (_PLAN, some) not in memo:
            memo[_PLAN, some] = _Plan(weights, buffers, options, first)
        self.plan: _Plan = memo[_PLAN, some]
        self.measured = sums is not None
        self.sums: list[Any] = [()] * len(weights) if sums is None else sums.tolist()
        self.ratios = [1.0] * len(weights)
        self.extreme: set[int] = set()  # for the reference

    def alpha(self, i: int) -> float:
        """The alpha for which d is (g + alpha·w) / scale, up to its sign."""
        o = self.o[i]
        return (-o.weight_decay if o.maximize else o.weight_decay) * self.scale

    def note(self, i: int, norms: tuple[float, float, float]) -> None:
        """Store the norms of w, g and g + alpha·w, retaken in float64 if not trustworthy."""
        if self._safe(i, norms):
            s = self.scale
            self.sums[i] = (norms[0] ** 2, (norms[1] / s) ** 2, (norms[2] / s) ** 2)
        else:
            w, g, o = self.w[i], self.g[i], self.o[i]
            self.sums[i] = portable.square_sums_of([w], [g], [o], self.scale)[0].tolist()
            self.extreme.add(i)

    def _safe(self, i: int, norms: tuple[float, float, float]) -> bool:
        low, high = RANGE[compute_dtype(self.w[i])]
        for norm, t in zip(norms, (self.w[i], self.g[i]), strict=False):
            # Zeros are common: biases at initialisation, gradients of unused parameters.
            if not low <= norm <= high and not (norm == 0 and is_zero(t)):
                return False
        exact = self.o[i].denominator == "decayed"
        return not exact or low <= norms[2] <= high or norms == (0.0, 0.0, 0.0)

    def rates(self, index: Sequence[int]) -> Rates:
        """How to update tensors that share options; some may turn out to be extreme."""
        i = index[0]
        o, has_buffer = self.o[i], self.v[i] is not None
        column = 2 if o.denominator == "decayed" else 1
        w_norms = [math.sqrt(self.sums[k][0]) for k in index]
        norms = [math.sqrt(self.sums[k][column]) for k in index]
        rates = rates_of(w_norms, norms, o, float(o.lr), self.first[i], has_buffer)
        dtype = compute_dtype(self.w[i])
        low, high = (x * self.scale for x in _FACTORS[dtype])
        top = RANGE[dtype][1]
        if has_buffer and o.momentum == 0:  # the kernel would not store the buffer
            self.extreme.update(index)
        elif not (
            low <= min(rates.factors) and max(rates.factors) <= high
            and max(w_norms) <= top and max(norms) <= top
            and math.isfinite(sum(rates.factors) + sum(w_norms) + sum(norms))
        ):  # fmt: skip
            for k, w, x, factor in zip(index, w_norms, norms, rates.factors, strict=True):
                fits = low <= factor <= high or factor == 0
                if not (fits and w <= top and x <= top):
                    self.extreme.add(k)
        for k, ratio in zip(index, rates.ratios, strict=True):
            self.ratios[k] = ratio
        return rates

    def tensor(self, i: int, copy: Tensor | None = None) -> Large:
        """Flat views of tensor i."""
        v = self.v[i]
        return Large(
            flat(self.w[i]), flat(self.g[i]), None if v is None else flat(v),
            None if copy is None else flat(copy), compute_dtype(self.w[i]),
        )  # fmt: skip

    def measure_batch(self, batch: Batch) -> None:
        """For a batch, D = g + alpha·w and its norms, unless norms were passed in."""
        index = batch.index
        batch.load([self.w[i] for i in index], [self.g[i] for i in index])
        alphas = [self.alpha(run.at) for run in batch.runs]
        if self.measured:
            batch.decay(alphas)
            return
        w_norms, g_norms = batch.norms("W"), batch.norms("D")
        batch.decay(alphas)
        d_norms = batch.norms("D") if any(alphas) else g_norms
        low, high = RANGE[batch.dtype]
        every = (*w_norms, *g_norms, *d_norms)
        s2 = self.scale * self.scale
        if low <= min(every) and max(every) <= high and math.isfinite(sum(every)):
            for i, w, g, d in zip(index, w_norms, g_norms, d_norms, strict=True):
                self.sums[i] = (w * w, g * g / s2, d * d / s2)
        else:
            for i, *norms in zip(index, w_norms, g_norms, d_norms, strict=True):
                self.note(i, tuple(norms))  # type: ignore[arg-type]

    def measure_large(self, i: int, t: Large) -> None:
        if not self.measured:
            exact = self.o[i].denominator == "decayed"
            self.note(i, large_tensor.norms(t, self.alpha(i), exact))


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    scale: Any = 1.0, sums: Tensor | None = None, found_inf: Tensor | None = None,
    memo: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step on a list of CPU tensors; see `torch_step.step_`."""
    step = _Step(weights, grads, buffers, options, first, scale, sums, memo)
    if True in first:
        new = [v for v, f in zip(buffers, first, strict=True) if f and v is not None]
        if new:  # may be uninitialised, and torch's kernel is not told that they are new
            torch._foreach_zero_(new)
    for batch in step.plan.batches:
        step.measure_batch(batch)
        _update_batch(step, batch, copies)
    for i in step.plan.large:
        t = step.tensor(i, copies[i])
        step.measure_large(i, t)
        rates, o = step.rates([i]), options[i]
        if i not in step.extreme:
            rate = Rate(rates.factors[0], rates.decays[0], rates.out)
            large_tensor.update(t, rate, o.momentum, o.nesterov, o.maximize, step.scale)
    for i in sorted(step.extreme):
        one = None if sums is None else sums[i : i + 1]
        found = portable.step_(
            [weights[i]], [grads[i]], [buffers[i]], [copies[i]], [options[i]], [first[i]], scale,
            one,
        )  # fmt: skip
        step.sums[i], step.ratios[i] = found[0][0].tolist(), float(found[1][0])
    return _table(step) if sums is None else sums, numbers(step.ratios, torch.float64)


def _update_batch(step: _Step, batch: Batch, copies: Sequence[Tensor | None]) -> None:
    index = batch.index
    factors: list[float] = []
    outs, options, scale = [], [step.o[run.at] for run in batch.runs], step.scale
    for run, o in zip(batch.runs, options, strict=True):
        rates = step.rates(index[run.rows])
        sign = -1.0 / scale if o.maximize else 1.0 / scale
        factors += [sign * f for f in rates.factors]
        outs.append(rates.out)
        if not o.decay_zero_norm:
            for k, decay in enumerate(rates.decays, run.rows.start):
                if decay != o.weight_decay:
                    batch.undo_decay(k, step.g[index[k]])
    left = {k for k, i in enumerate(index) if i in step.extreme} if step.extreme else set()
    if len(left) < len(index):
        batch.update(
            [step.w[i] for i in index], [step.v[i] for i in index], [copies[i] for i in index],
            options, outs, factors, left,
        )  # fmt: skip


def _table(step: _Step) -> Tensor:
    return numbers(chain.from_iterable(step.sums), torch.float64).view(-1, 3)


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: Any = 1.0, memo: dict[Any, Any] | None = None,
) -> Tensor:  # fmt: skip
    """`reference.square_sums`, one row per tensor."""
    n = len(weights)
    # Separate batches: those of a step also have rows for its buffers.
    memo = None if memo is None else memo.setdefault("fused, norms", {})
    step = _Step(weights, grads, [None] * n, options, [False] * n, scale, None, memo)
    for batch in step.plan.batches:
        step.measure_batch(batch)
    for i in step.plan.large:
        step.measure_large(i, step.tensor(i))
    return _table(step)
