"""The tensors of one step: what the host reads of them, and which of them the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import checks

_DTYPE = attrgetter("dtype")


@dataclass
class Batch:
    """The tensors of one step, index by index.

    `weights`: parameters, or their fp32 masters; `copies`: then the parameters, else None.
    `buffers`: None where the group has no momentum. `groups`: index of each tensor's options.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor | None]
    copies: list[Tensor | None]
    groups: list[int]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies in memory; 0 for none."""
    try:
        # A None among them raises TypeError, which is quicker than asking each.
        return list(map(torch.Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # some are None
        return [0 if t is None else t.data_ptr() for t in tensors]


def facts(grads: Sequence[Tensor]) -> list[Any]:
    """What must not change of gradients, which may be other tensors at every step.

    With the addresses, this is most of the host's time: a twentieth of a microsecond for an entry.
    So strides are read only where "contiguous" does not fix them. A shape cannot change without an
    address: PyTorch holds `p.grad` to the shape of `p`.
    """
    plain = list(map(torch.Tensor.is_contiguous, grads))
    strides = [] if all(plain) else [g.stride() for g, p in zip(grads, plain, strict=True) if not p]
    return [plain, strides, list(map(_DTYPE, grads))]


def places(batch: Batch) -> list[Any]:
    """What must not change of any tensor; read when an address has changed."""
    return [
        t
        if t is None
        else (t.device, t.dtype, t.size(), t.stride(), t.untyped_storage().nbytes() == 0)
        for tensors in (batch.weights, batch.buffers, batch.copies)
        for t in tensors
    ] + [(g.device, g.size(), g.untyped_storage().nbytes() == 0) for g in batch.grads]


def kernel_objection(w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None) -> str | None:
    """Why the kernels do not take a tensor, and what would help; None where they do."""
    for what, t in (
        ("the tensor", w),
        ("its gradient", g),
        ("its momentum", v),
        ("its copy", copy),
    ):
        if t is not None and t.dtype not in checks.STORAGE_DTYPES:
            return f"{what} is {t.dtype}; the kernels take float32, float16 and bfloat16"
    if not checks.dense(w):
        return "its elements are not adjacent in memory; use a contiguous parameter"
    for what, t in (("its gradient", g), ("its momentum", v), ("its copy", copy)):
        if t is not None and not checks.same_layout(t, w):
            return f"{what} has strides {t.stride()}, the tensor {w.stride()}; use equal strides"
    return None
