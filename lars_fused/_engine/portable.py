"""The reference backend: `lars_fused.reference` applied in place, on any device and any strides.

In float64, piece by piece, each stored value rounded once. Besides parameters, gradients and state
it needs the memory of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..options import Options


def pieces(tensors: Sequence[Tensor | None], size: int | None) -> Iterator[list[Any]]:
    """Equal views of same-shaped tensors, each of at most `size` elements (or one row).

    `size` None: as much as stays in a CPU's cache, or is worth a launch on any other device.
    """
    first = next(t for t in tensors if t is not None)
    shape = first.shape
    if size is None:
        size = 1 << 13 if first.device.type == "cpu" else 1 << 20
    if shape.numel() <= size:
        yield list(tensors)
        return
    dim = max(range(len(shape)), key=shape.__getitem__)
    step = max(1, shape[dim] * size // shape.numel())
    for at in range(0, shape[dim], step):
        count = min(step, shape[dim] - at)
        yield from pieces([None if t is None else t.narrow(dim, at, count) for t in tensors], size)


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    scale: float | Tensor = 1.0, sums: Tensor | None = None, size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step on a list of tensors; returns their sums and trust ratios."""
    sums = square_sums_of(weights, grads, options, scale, size) if sums is None else sums
    ratios, decays = reference.trust_ratios(sums, options)
    for i, (w, g, v, c) in enumerate(zip(weights, grads, buffers, copies, strict=True)):
        for w_, g_, v_, c_ in pieces([w, g, v, c], size):
            v_wide = None if v_ is None else v_.to(sums.dtype)
            w_wide, g_wide = w_.to(sums.dtype), g_.to(sums.dtype)
            new_w, new_v = reference.update(
                w_wide, g_wide, v_wide, ratios[i], decays[i], first[i], options[i], scale
            )
            w_.copy_(new_w)
            if v_ is not None and new_v is not None:
                v_.copy_(new_v)
            if c_ is not None:
                c_.copy_(new_w)
    return sums, ratios


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: float | Tensor = 1.0, size: int | None = None,
) -> Tensor:  # fmt: skip
    """`reference.square_sums`, one row per tensor, accumulated piece by piece."""
    # MPS has no float64.
    wide = torch.float32 if weights[0].device.type == "mps" else torch.float64
    rows = []
    for w, g, o in zip(weights, grads, options, strict=True):
        parts = [
            reference.square_sums(a.to(wide), b.to(wide), o, scale) for a, b in pieces([w, g], size)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def squared_norm(t: Tensor, size: int | None = None) -> Tensor:
    """N(t)² of one tensor."""
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    parts = [torch.linalg.vector_norm(t_, dtype=wide) for (t_,) in pieces([t], size)]
    return torch.stack(parts).square().sum()
