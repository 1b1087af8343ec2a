"""The step without our own kernels: each tensor uses the first backend that supports it.

`fused` on a CPU: torch's fused SGD kernel, each tensor's norms computed just before. `foreach`
elsewhere: a fixed number of foreach operations, no synchronisation. The reference (`portable`) for
tensors that neither supports: float64, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from ..reference import scalar
from . import foreach, fused, portable, square_norms
from .small_batch import numbers

REFERENCE = "reference"
BACKENDS: dict[str, Any] = {"fused": fused, "foreach": foreach, REFERENCE: portable}


def partition(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    backend: str | None = None,
) -> dict[str, list[int]]:  # fmt: skip
    """Which tensors each backend updates. `backend`: tried instead of the device's default."""
    found: dict[str, list[int]] = {}
    for i, w in enumerate(weights):
        offered = backend or ("fused" if w.device.type == "cpu" else "foreach")
        this = w, grads[i], buffers[i], copies[i], options[i], first[i]
        taken = BACKENDS[offered].objection(*this) is None
        found.setdefault(offered if taken else REFERENCE, []).append(i)
    return found


class Found(NamedTuple):
    """What a step measured. On a CPU these are numbers: tables are only made if somebody asks."""

    parts: dict[str, list[int]]
    measured: list[tuple[Any, Any]]

    def tables(self) -> tuple[Tensor, Tensor]:
        """Squared norms and trust ratios, float64 (float32 if the device lacks it).

        Returns:
            [n, 3]: N(w)², N(g)², N(d)² with gradients divided by the loss scale, NaN for what the
            step did not need; and [n]: trust ratios.
        """
        sums, ratios = zip(*self.measured, strict=True)
        return _in_order(self.parts, sums), _in_order(self.parts, ratios)


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    scale: Any = 1.0, sums: Tensor | None = None, found_inf: Tensor | None = None,
    backend: str | None = None, memo: dict[Any, Any] | None = None,
) -> Found:  # fmt: skip
    """One step on a list of tensors of one device, in place.

    Args:
        weights: parameters or their masters.
        grads: one each; never written.
        buffers: momentum; None where μ = 0.
        copies: what else is set to the new weight (the parameter of a master weight), or None.
        options: hyper-parameters of each.
        first: whether it is the tensor's first step; its buffer is then overwritten.
        scale: divisor of the gradients; 1.0 or a 0-dim tensor.
        sums: squared norms [n, 3] of whole layers, if each tensor is part of one. NaN in an
            unknown column.
        found_inf: a non-zero value skips the step. On a CPU the caller has already checked it.
        backend: "fused", "foreach" or "reference" for all tensors that it supports; the reference
            updates the others.
        memo: a cache, to be kept for as long as the lists have tensors of the same shapes,
            strides, dtypes and devices; saves partitioning and preparing them again.

    Returns:
        What was measured on the way.
    """
    memo = {} if memo is None else memo
    parts = _parts(memo, weights, grads, buffers, copies, options, first, backend)
    found = []
    for name, index in parts.items():
        whole = len(index) == len(weights)
        lists = (weights, grads, buffers, copies, options, first)
        chosen: Any = lists if whole else [[column[i] for i in index] for column in lists]
        part = sums if sums is None or whole else sums[index]
        if name == REFERENCE:
            found.append(_reference(scale, part, found_inf, *chosen))
        else:
            own = memo.setdefault(name, {})
            found.append(BACKENDS[name].step_(*chosen, scale, part, found_inf, own))
    return Found(parts, found)


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: Any = 1.0, backend: str | None = None, memo: dict[Any, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Only the first result of `step_`, for tensors that are parts of layers."""
    n = len(weights)
    memo = {} if memo is None else memo.setdefault("norms", {})
    none, no = [None] * n, [False] * n
    parts = _parts(memo, weights, grads, none, none, options, no, backend)
    found: list[Tensor] = []
    for name, index in parts.items():
        lists: Any = [[column[i] for i in index] for column in (weights, grads, options)]
        if name == REFERENCE:
            found.append(BACKENDS[name].square_sums_of(*lists, scale))
        else:
            found.append(BACKENDS[name].square_sums_of(*lists, scale, memo.setdefault(name, {})))
    return _in_order(parts, found)


def learning_rates(options: Sequence[Options], like: Tensor) -> Tensor:
    """The learning rate of each tensor, in the dtype and on the device of `like`."""
    distinct = {id(o.lr): o.lr for o in options}
    if not any(isinstance(lr, Tensor) for lr in distinct.values()):
        return numbers([o.lr for o in options], torch.float64).to(like)
    at = {key: k for k, key in enumerate(distinct)}
    values = torch.stack([scalar(lr, like) for lr in distinct.values()])
    return values[torch.tensor([at[id(o.lr)] for o in options], device="cpu").to(like.device)]


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """N(t)² of each tensor of one device; float64 (float32 if the device lacks it)."""
    if tensors[0].device.type == "cpu":
        return square_norms.of(tensors)
    if all(foreach.readable(t) for t in tensors):
        return foreach.norms(list(tensors)).square()
    return torch.stack([portable.squared_norm(t) for t in tensors])


def _parts(memo: dict[Any, Any], weights: Sequence[Tensor], *rest: Any) -> dict[str, list[int]]:
    key = "partition", rest[-1]
    if key not in memo:
        memo[key] = partition(weights, *rest)
    parts: dict[str, list[int]] = memo[key]
    return parts


def _in_order(parts: dict[str, list[int]], found: Sequence[Any]) -> Tensor:
    """Join the rows of several parts into one table in the order of the tensors."""
    rows = [r if isinstance(r, Tensor) else torch.tensor(r, dtype=torch.float64, device="cpu")
            for r in found]  # fmt: skip
    if len(rows) == 1:
        return rows[0]
    index = [i for part in parts.values() for i in part]
    table = torch.cat([row.to(rows[0]) for row in rows])
    order = sorted(range(len(index)), key=index.__getitem__)
    return table[torch.tensor(order, device="cpu").to(table.device)]


def _reference(
    scale: Any, sums: Tensor | None, found_inf: Tensor | None, *lists: Any
) -> tuple[Tensor, Tensor]:
    step: Any = portable.step_
    taken: tuple[Tensor, Tensor]
    if found_inf is None:
        taken = step(*lists, scale, sums)
        return taken
    # Without reading it: what the step wrote is exchanged for the previous values.
    weights, _, buffers, copies = lists[:4]
    written = [t for t in (*weights, *buffers, *copies) if t is not None]
    before = [t.clone() for t in written]
    taken = step(*lists, scale, sums)
    skipped = found_inf.to(written[0].device).reshape(()) != 0
    for t, old in zip(written, before, strict=True):
        t.copy_(torch.where(skipped, old, t))
    return taken
