"""The CPU backend: torch's fused SGD kernel with the trust ratio folded into its options.

    dampening ← 1 − factor, lr ← out:    v ← μv + factor·(g + βw),    w ← w − out·v

Norms come first, of a batch of small tensors (`small_batch`, one call for all) or of a window of
large ones (`large_tensor`); then the updates, the last first: the cache still holds most of it.
What the kernel cannot express or store (nesterov, other dtypes, factors that 1 − factor would
round) is passed as factor·d in place of the gradient. Tensors of extreme magnitude use the
reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import Options
from . import portable, sgd_kernel, validate
from .large_tensor import Large, Squares, Stage, Window, windows
from .rates import Rates, rates_of
from .small_batch import LARGEST, Batch, Scratch, batches
from .square_norms import PLAIN, RANGE, SQUARES, in_order, is_zero

# Beyond these, factor·d may leave the dtype's range although the float64 product does not.
_FACTORS = {torch.float32: (1e-30, 1e18), torch.float64: (1e-290, 1e140)}


def compute_dtype(w: Tensor) -> torch.dtype:
    """The dtype of a tensor's arithmetic, whatever its storage dtype."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def objection(
    w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None, _: Options | None = None
) -> str | None:
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


class Plan:
    """The batches of small tensors and windows of large ones. Holds none of the tensors.

    It serves every step of tensors like these, as long as those that share an `Options` object here
    go on sharing one, with whatever values but that of `adapt`.
    """

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor],
        buffers: Sequence[Tensor | None], options: Sequence[Options],
    ):  # fmt: skip
        self.dtypes = [compute_dtype(w) for w in weights]
        seen: dict[tuple[int, bool], int] = {}
        kinds, alike = [], []
        for w, g, v, o, dtype in zip(weights, grads, buffers, options, self.dtypes, strict=True):
            kinds.append(seen.setdefault((id(o), v is None), len(seen)))
            plain = w.dtype == g.dtype == dtype and (v is None or v.dtype == dtype)
            alike.append(plain and not o.adapt)
        small: dict[torch.dtype, list[int]] = {}
        large = []
        self._largest: dict[torch.dtype, int] = {}
        for i, (w, dtype) in enumerate(zip(weights, self.dtypes, strict=True)):
            if w.numel() > LARGEST:
                large.append(i)
                self._largest[dtype] = max(self._largest.get(dtype, 0), w.numel())
            else:
                small.setdefault(dtype, []).append(i)
        self.batches: list[Batch] = []
        for dtype, index in small.items():
            self.batches += batches(index, weights, buffers, kinds, alike, Scratch(dtype))
        self.windows = windows(large, weights, grads, self.dtypes, kinds)

    def stages(self) -> dict[torch.dtype, Stage]:
        """Of one step: memory in which large tensors of each compute dtype are widened."""
        return {dtype: Stage(dtype, size) for dtype, size in self._largest.items()}


class _Step:
    """The tensors of one step, and the results gathered for each on the way."""

    def __init__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
        options: Sequence[Options], first: Sequence[bool], scale: float | Tensor,
        sums: Tensor | None, plan: Plan,
    ):  # fmt: skip
        self.w, self.g, self.v, self.o, self.first = weights, grads, buffers, options, first
        self.scale = float(scale)
        self.plan, self.stages = plan, plan.stages()
        self.measured = sums is not None
        self.sums: list[Sequence[float]] = [()] * len(weights) if sums is None else sums.tolist()
        self.ratios = [1.0] * len(weights)
        self.extreme: set[int] = set()  # for the reference

    def alpha(self, i: int) -> float:
        """The alpha for which d is (g + alpha·w) / scale, up to its sign."""
        o = self.o[i]
        return (-o.weight_decay if o.maximize else o.weight_decay) * self.scale

    def note(self, index: Sequence[int], found: Squares) -> None:
        """Store the squared norms of w, g and g + alpha·w, in float64 if they are out of range."""
        low, high = SQUARES[self.plan.dtypes[index[0]]]
        d = () if math.isnan(found.d[0]) else found.d
        every = (*found.w, *found.g, *d)
        rows = list(zip(*found, strict=True))
        if self.scale != 1:
            s2 = self.scale * self.scale
            rows = [(w, g / s2, d / s2) for w, g, d in rows]
        if low <= min(every) and max(every) <= high and math.isfinite(sum(every)):
            for i, row in zip(index, rows, strict=True):
                self.sums[i] = row
            return
        for i, row, *squares in zip(index, rows, *found, strict=True):
            if self._in_range(i, *squares):
                self.sums[i] = row
            else:
                one = [self.w[i]], [self.g[i]], [self.o[i]]
                self.sums[i] = portable.square_sums_of(*one, self.scale)[0].tolist()
                self.extreme.add(i)

    def _in_range(self, i: int, w: float, g: float, d: float) -> bool:
        low, high = SQUARES[self.plan.dtypes[i]]
        for square, t in ((w, self.w[i]), (g, self.g[i])):
            # Zeros are common: biases at initialisation, gradients of unused parameters.
            if not low <= square <= high and not (square == 0 and is_zero(t)):
                return False
        exact = self.o[i].denominator == "decayed"
        return not exact or low <= d <= high or (w, g, d) == (0.0, 0.0, 0.0)

    def rates(self, index: Sequence[int]) -> Rates:
        """How to update tensors that share options; some may turn out to be extreme."""
        i = index[0]
        o, has_buffer = self.o[i], self.v[i] is not None
        column = 2 if o.denominator == "decayed" else 1
        sums = [self.sums[k] for k in index]
        w_norms = [math.sqrt(row[0]) for row in sums]
        norms = [math.sqrt(row[column]) for row in sums]
        first = [self.first[k] for k in index] if o.dampening else ()
        rates = rates_of(w_norms, norms, o, float(o.lr), first, has_buffer)
        dtype = self.plan.dtypes[i]
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

    def measure_batch(self, batch: Batch, weights: list[Tensor], grads: list[Tensor]) -> bool:
        """The norms of a batch. Returns whether its D is g + alpha·w by now, instead of g."""
        batch.load(weights, grads)
        w, g = batch.squares()
        alphas = [self.alpha(run.at) for run in batch.runs]
        decayed = any(alphas) and any(self.o[run.at].denominator == "decayed" for run in batch.runs)
        d = g
        if decayed:
            batch.decay(alphas)
            d = batch.squares_of_d()
        elif any(alphas):
            d = [math.nan] * len(g)
        self.note(batch.index, Squares(w, g, d))
        return decayed

    def measure_window(self, window: Window, tensors: Sequence[Large]) -> None:
        """The norms of a window."""
        i = window.index[0]
        exact = self.o[i].denominator == "decayed"
        stage = self.stages[tensors[0].dtype]
        self.note(window.index, window.squares(tensors, self.alpha(i), exact, stage))

    def tensor(self, i: int, copy: Tensor | None = None) -> Large:
        """Contiguous views of tensor i."""
        v = self.v[i]
        return Large(
            in_order(self.w[i]), in_order(self.g[i]), None if v is None else in_order(v),
            None if copy is None else in_order(copy), self.plan.dtypes[i],
        )  # fmt: skip


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    scale: float | Tensor, sums: Tensor | None, plan: Plan,
) -> tuple[Tensor | list[Sequence[float]], list[float]]:  # fmt: skip
    """One step on a list of CPU tensors; see `torch_step.step_`. Returns rows and ratios."""
    step = _Step(weights, grads, buffers, options, first, scale, sums, plan)
    if True in first:
        new = [v for v, f in zip(buffers, first, strict=True) if f and v is not None]
        if new:  # may be uninitialised, and torch's kernel is not told that they are new
            torch._foreach_zero_(new)
    for batch in plan.batches:
        _step_batch(step, batch, copies)
    for window in plan.windows:
        _step_window(step, window, [step.tensor(i, copies[i]) for i in window.index])
    for i in sorted(step.extreme):
        one = None if sums is None else sums[i : i + 1]
        found = portable.step_(
            [weights[i]], [grads[i]], [buffers[i]], [copies[i]], [options[i]], [first[i]], scale,
            one,
        )  # fmt: skip
        step.sums[i], step.ratios[i] = found[0][0].tolist(), float(found[1][0])
    return step.sums if sums is None else sums, step.ratios


def _step_batch(step: _Step, batch: Batch, copies: Sequence[Tensor | None]) -> None:
    index, scale = batch.index, step.scale
    w, g, v = [step.w[i] for i in index], [step.g[i] for i in index], [step.v[i] for i in index]
    decayed = not step.measured and step.measure_batch(batch, w, g)
    rates = [step.rates(index[run.tensors]) for run in batch.runs]
    left = {k for k, i in enumerate(index) if i in step.extreme} if step.extreme else set()
    if len(left) == len(index):
        return
    c, options = [copies[i] for i in index], [step.o[run.at] for run in batch.runs]
    if batch.alike and batch.update_in_place(w, g, v, c, options, rates, scale, left):
        return
    if step.measured:
        batch.load(w, g)
    if not decayed:
        batch.decay([step.alpha(run.at) for run in batch.runs])
    factors = []
    for run, o, own in zip(batch.runs, options, rates, strict=True):
        sign = (-1.0 if o.maximize else 1.0) / scale
        factors += [sign * factor for factor in own.factors]
        if not o.decay_zero_norm:
            for k, decay in enumerate(own.decays, run.tensors.start):
                if decay != o.weight_decay:
                    batch.undo_decay(k, g[k])
    batch.update(w, v, c, options, [own.out for own in rates], factors, left)


def _step_window(step: _Step, window: Window, tensors: Sequence[Large]) -> None:
    if not step.measured:
        step.measure_window(window, tensors)
    rates, o = step.rates(window.index), step.o[window.index[0]]
    stage = step.stages[tensors[0].dtype]
    window.update(tensors, rates, o, step.scale, step.extreme, stage)


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: float | Tensor, plan: Plan,
) -> Tensor:  # fmt: skip
    """`reference.square_sums`, one row per tensor. `plan`: for tensors without buffers."""
    n = len(weights)
    step = _Step(weights, grads, [None] * n, options, [False] * n, scale, None, plan)
    for batch in plan.batches:
        some = batch.index
        step.measure_batch(batch, [weights[i] for i in some], [grads[i] for i in some])
    for window in plan.windows:
        step.measure_window(window, [step.tensor(i) for i in window.index])
    return torch.tensor(step.sums, dtype=torch.float64, device="cpu")
