"""The step without our own kernels: each tensor uses the first backend that supports it.

`fused` on a CPU: torch's fused SGD kernel, each tensor's norms computed just before. `foreach`
elsewhere: a fixed number of foreach operations, no synchronisation. The reference (`portable`) for
tensors that neither supports: float64, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from . import foreach, fused, portable, square_norms
from .small_batch import numbers

REFERENCE = "reference"
Column = Sequence[Tensor | None]
_Objection = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Options], str | None]
_OBJECTIONS: dict[str, _Objection] = {
    "fused": fused.objection,
    "foreach": foreach.objection,
    REFERENCE: lambda *_: None,  # it can update every tensor
}
Table = Tensor | Sequence[Sequence[float]]
"""Squared norms by tensor, on the host as numbers or on the device."""


class Division(NamedTuple):
    """Which backend updates which tensors of one device, and why."""

    offered: str
    """The backend that comes before the reference."""
    parts: dict[str, list[int]]
    reasons: dict[int, str]
    """Why it does not update each of those that it leaves to the reference."""


def divide(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Column, copies: Column,
    options: Sequence[Options], backend: str | None = None,
) -> Division:  # fmt: skip
    """Assign every tensor to a backend. `backend`: offered to instead of the device's own."""
    offered = backend or ("fused" if weights[0].device.type == "cpu" else "foreach")
    parts: dict[str, list[int]] = {}
    reasons: dict[int, str] = {}
    objection = _OBJECTIONS[offered]
    for i, w in enumerate(weights):
        reason = objection(w, grads[i], buffers[i], copies[i], options[i])
        if reason is not None:
            reasons[i] = reason
        parts.setdefault(offered if reason is None else REFERENCE, []).append(i)
    return Division(offered, parts, reasons)


class Prepared(NamedTuple):
    """What steps of tensors like some that were shown can share. Holds none of the tensors.

    It serves as long as shapes, strides, dtypes, devices, `adapt` and `foreach.expressible` stay
    the same, and tensors that share an `Options` object go on sharing one.
    """

    division: Division
    plans: dict[str, fused.Plan | foreach.Layout | None]
    """By backend; the reference needs none."""


def prepare(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Column, copies: Column,
    options: Sequence[Options], backend: str | None = None,
) -> Prepared:  # fmt: skip
    """Divide a list of tensors of one device between the backends, and plan the work of each."""
    division = divide(weights, grads, buffers, copies, options, backend)
    plans: dict[str, fused.Plan | foreach.Layout | None] = {}
    for name, index in division.parts.items():
        w = [weights[i] for i in index]
        if name == "fused":
            g, v, o = [grads[i] for i in index], [buffers[i] for i in index], options
            plans[name] = fused.Plan(w, g, v, [o[i] for i in index])
        else:
            plans[name] = foreach.Layout(w) if name == "foreach" else None
    return Prepared(division, plans)


def prepare_norms(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    backend: str | None = None,
) -> Prepared:  # fmt: skip
    """The same for `square_sums_of`, which does without buffers and copies."""
    none: Column = [None] * len(weights)
    return prepare(weights, grads, none, none, options, backend)


class Found(NamedTuple):
    """What a step measured. On a CPU these are numbers: tables are only made if somebody asks."""

    parts: dict[str, list[int]]
    sums: list[Table]
    """Of each part."""
    ratios: list[Tensor | list[float]]

    def tables(self) -> tuple[Tensor, Tensor]:
        """Squared norms and trust ratios, float64 (float32 if the device lacks it).

        Returns:
            [n, 3]: N(w)², N(g)², N(d)² with gradients divided by the loss scale, NaN for what the
            step did not need; and [n]: trust ratios.
        """
        return _in_order(self.parts, self.sums), _in_order(self.parts, self.ratios)


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Column, copies: Column,
    options: Sequence[Options], first: Sequence[bool], scale: float | Tensor = 1.0,
    sums: Tensor | None = None, found_inf: Tensor | None = None, *,
    prepared: Prepared | None = None, backend: str | None = None,
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
        prepared: by `prepare`, for tensors like these; None to prepare this step alone.
        backend: "fused", "foreach" or "reference" for all tensors that it supports, where the step
            is prepared here; the reference updates the others.

    Returns:
        What was measured on the way.
    """
    if prepared is None:
        prepared = prepare(weights, grads, buffers, copies, options, backend)
    parts = prepared.division.parts
    found = Found(parts, [], [])
    for name, index in parts.items():
        part = sums
        lists = weights, grads, buffers, copies, options, first
        if len(index) < len(weights):
            lists = (
                [weights[i] for i in index], [grads[i] for i in index],
                [buffers[i] for i in index], [copies[i] for i in index],
                [options[i] for i in index], [first[i] for i in index],
            )  # fmt: skip
            part = None if sums is None else sums[index]
        plan = prepared.plans[name]
        rows: Table
        ratios: Tensor | list[float]
        if isinstance(plan, fused.Plan):
            rows, ratios = fused.step_(*lists, scale, part, plan)
        elif isinstance(plan, foreach.Layout):
            rows, ratios = foreach.step_(*lists, scale, part, found_inf, plan)
        else:
            rows, ratios = _reference(*lists, scale, part, found_inf)
        found.sums.append(rows)
        found.ratios.append(ratios)
    return found


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: float | Tensor = 1.0, *, prepared: Prepared | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Only the first result of `step_`, for tensors that are parts of layers.

    `prepared`: by `prepare_norms`.
    """
    if prepared is None:
        prepared = prepare_norms(weights, grads, options, backend)
    found: list[Tensor] = []
    for name, index in prepared.division.parts.items():
        w, g, o = [weights[i] for i in index], [grads[i] for i in index], options
        lists = w, g, [o[i] for i in index], scale
        plan = prepared.plans[name]
        if isinstance(plan, fused.Plan):
            found.append(fused.square_sums_of(*lists, plan))
        elif isinstance(plan, foreach.Layout):
            found.append(foreach.square_sums_of(*lists, plan))
        else:
            found.append(portable.square_sums_of(*lists))
    return _in_order(prepared.division.parts, found)


def learning_rates(options: Sequence[Options], like: Tensor) -> Tensor:
    """The learning rate of each tensor, in the dtype and on the device of `like`."""

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        # Exact for places in a list too, which are whole numbers.
        return numbers(values, torch.float64).to(like.device, dtype)

    return foreach.learning_rates(options, like, column)


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """N(t)² of each tensor of one device; float64 (float32 if the device lacks it)."""
    if tensors[0].device.type == "cpu":
        return square_norms.of(tensors)
    if all(foreach.readable(t) for t in tensors):
        return foreach.norms(list(tensors)).square()
    return torch.stack([portable.squared_norm(t) for t in tensors])


def _in_order(parts: dict[str, list[int]], found: Sequence[Table | list[float]]) -> Tensor:
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
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Column, copies: Column,
    options: Sequence[Options], first: Sequence[bool], scale: float | Tensor, sums: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = weights, grads, buffers, copies, options, first
    if found_inf is None:
        return portable.step_(*lists, scale, sums)
    # Without reading it: what the step wrote is exchanged for the previous values.
    written = [t for t in (*weights, *buffers, *copies) if t is not None]
    before = [t.clone() for t in written]
    taken = portable.step_(*lists, scale, sums)
    skipped = found_inf.to(written[0].device).reshape(()) != 0
    for t, old in zip(written, before, strict=True):
        t.copy_(torch.where(skipped, old, t))
    return taken
