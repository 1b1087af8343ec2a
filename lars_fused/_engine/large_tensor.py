"""One large tensor on a CPU, as 1-d views: its norms, immediately followed by its update.

Blocks are updated last first: the norms have just left the tail of w and g in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import sgd_kernel
from .square_norms import STAGE, joined, partials

BLOCK = 1 << 18  # elements per call without conversion: w and g fit the last-level cache
# 1 − (1 − factor) is off by at most 2^-54: from here up, 2 ulp of float64, 1/4 ulp of float32.
LEAST_FACTOR = {torch.float32: 2.0**-28, torch.float64: 2.0**-3}


class Rate(NamedTuple):
    """The factors of one update."""

    factor: float
    decay: float
    out: float


class Large(NamedTuple):
    """Flat views of one tensor's weight, gradient, momentum and copy; its compute dtype."""

    w: Tensor
    g: Tensor
    v: Tensor | None
    copy: Tensor | None
    dtype: torch.dtype


def _blocks(n: int, size: int) -> Iterator[slice]:
    for at in range(0, n, size):
        yield slice(at, min(at + size, n))


def _reversed(x: Tensor) -> list[Tensor]:
    """Blocks of a 1-d tensor, the last one first."""
    if x.numel() <= BLOCK:
        return [x]
    return [x[at] for at in _blocks(x.numel(), BLOCK)][::-1]


def _stage(dtype: torch.dtype, n: int) -> Tensor:
    return torch.empty(min(STAGE, n), dtype=dtype, device="cpu")


def norms(t: Large, alpha: float, exact: bool) -> tuple[float, float, float]:
    """N(w), N(g), N(g + alpha·w).

    Args:
        t: the tensor.
        alpha: the multiple of w that is added to g.
        exact: compute g + alpha·w itself. Otherwise its squared norm is
            N(g)² + 2·alpha·⟨w, g⟩ + alpha²·N(w)² with the dot product in the tensor's dtype within
            a block: good enough for statistics, not for a denominator.
    """
    wide_w, wide_g = t.w.dtype != t.dtype, t.g.dtype != t.dtype
    n = t.w.numel()
    if n <= BLOCK and not (wide_w or wide_g or exact):
        w_norm, g_norm = joined(partials(t.w), partials(t.g))
        return _with_decayed(w_norm, g_norm, alpha, float(torch.dot(t.w, t.g)) if alpha else 0.0)
    w_stage, g_stage, d_stage = (
        _stage(t.dtype, n) if needed else None for needed in (wide_w, wide_g, exact)
    )
    parts: tuple[list[Tensor], ...] = ([], [], [])
    product = 0.0
    for at in _blocks(n, STAGE if wide_w or wide_g or exact else BLOCK):
        w, g = t.w[at], t.g[at]
        if w_stage is not None:
            w = w_stage[: w.numel()].copy_(w)
        if g_stage is not None:
            g = g_stage[: g.numel()].copy_(g)
        parts[0].extend(partials(w))
        parts[1].extend(partials(g))
        if d_stage is not None:
            d = torch.add(g, w, alpha=alpha, out=d_stage[: w.numel()])
            parts[2].extend(partials(d))
        elif alpha:
            product += float(torch.dot(w, g))
    if exact:
        w_norm, g_norm, d_norm = joined(*parts)
        return w_norm, g_norm, d_norm
    w_norm, g_norm = joined(*parts[:2])
    return _with_decayed(w_norm, g_norm, alpha, product)


def _with_decayed(
    w_norm: float, g_norm: float, alpha: float, product: float
) -> tuple[float, float, float]:
    """N(w), N(g), and N(g + alpha·w) from ⟨w, g⟩."""
    if not alpha:
        return w_norm, g_norm, g_norm
    square = g_norm * g_norm + 2 * alpha * product + (alpha * w_norm) ** 2
    return w_norm, g_norm, math.sqrt(square) if square > 0 else 0.0


def _expressible(factor: float, dtype: torch.dtype) -> bool:
    """Whether the kernel can have the factor as its 1 − dampening."""
    return factor == 0 or factor >= LEAST_FACTOR[dtype]


def update(
    t: Large, rate: Rate, momentum: float, nesterov: bool, maximize: bool, scale: float
) -> None:
    """One update: v ← μv + factor·d, w ← w − out·v with d = ±g/scale + decay·w."""
    held = t.v if momentum else None
    factor = rate.factor / scale
    if (
        not nesterov
        and _expressible(factor, t.dtype)
        and t.copy is None
        and t.w.dtype == t.g.dtype == t.dtype == (t.dtype if held is None else held.dtype)
    ):
        w, g = _reversed(t.w), _reversed(t.g)
        if held is None:
            # Without a buffer the kernel has no dampening, so the factor goes into its lr.
            sgd_kernel.run(
                w, g, [], keep=1.0, decay=rate.decay * scale, momentum=0.0,
                lr=rate.out * factor, maximize=maximize,
            )  # fmt: skip
        else:
            sgd_kernel.run(
                w, g, _reversed(held), keep=factor, decay=rate.decay * scale,
                momentum=momentum, lr=rate.out, maximize=maximize,
            )  # fmt: skip
        return
    _update_widened(t, held, rate, factor, momentum, nesterov, maximize, scale)


def _update_widened(
    t: Large, held: Tensor | None, rate: Rate, factor: float, momentum: float, nesterov: bool,
    maximize: bool, scale: float,
) -> None:  # fmt: skip
    n = t.w.numel()
    fold = held is not None and not nesterov and _expressible(factor, t.dtype)
    d_stage = _stage(t.dtype, n)
    w_stage = _stage(t.dtype, n) if t.w.dtype != t.dtype else None
    v_stage = _stage(t.dtype, n) if held is not None and held.dtype != t.dtype else None
    alpha = (-rate.decay if maximize else rate.decay) * scale
    for at in reversed([*_blocks(n, STAGE)]):
        stored = w = t.w[at]
        size = w.numel()
        if w_stage is not None:
            w = w_stage[:size].copy_(w)
        d = d_stage[:size].copy_(t.g[at])
        if not fold:
            if alpha:
                d.add_(w, alpha=alpha)
            d.mul_(-factor if maximize else factor)
        kept = v = None if held is None else held[at]
        if v_stage is not None and kept is not None:
            v = v_stage[:size].copy_(kept)
        sgd_kernel.run(
            [w], [d], [] if v is None else [v], keep=factor if fold else 1.0,
            decay=rate.decay * scale if fold else 0.0, momentum=momentum, lr=rate.out,
            nesterov=nesterov, maximize=maximize and fold,
        )  # fmt: skip
        if w_stage is not None:
            stored.copy_(w)
        if v_stage is not None and kept is not None and v is not None:
            kept.copy_(v)
        if t.copy is not None:
            t.copy[at].copy_(w)
