"""PyTorch's fused SGD kernel on a CPU: one pass over memory for momentum, decay and update.

    v ← μv + keep·(±g + decay·w),    w ← w − lr·v        nesterov: w ← w − lr·(±g + decay·w + μv)

The kernel walks each tensor as linear memory, so all tensors must be dense and have the same
layout. It is never told of a first step or a gradient scale: it would read an uninitialised buffer
for the one and write to the gradients for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ..options import Options

# 1 − (1 − factor) is off by at most 2^-54: from here up, 2 ulp of float64, 1/4 ulp of float32.
LEAST_FACTOR = {torch.float32: 2.0**-28, torch.float64: 2.0**-3}

# The operator beneath `sgd(..., fused=True)`: calling it costs the host a quarter as much.
_private: Callable[..., None] | None = getattr(torch, "_fused_sgd_", None)


def run(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], *,
    keep: float, decay: float, momentum: float, lr: float,
    nesterov: bool = False, maximize: bool = False,
) -> None:  # fmt: skip
    """Update lists of tensors of one dtype and layout. `buffers` is empty if μ = 0."""
    if not weights:  # all that shared these options were left to the reference
        return
    if _private is not None:
        _private(
            weights, grads, buffers, weight_decay=decay, momentum=momentum, lr=lr,
            dampening=1.0 - keep, nesterov=nesterov, maximize=maximize, is_first_step=False,
        )  # fmt: skip
    else:
        held: list[Tensor | None] = [*buffers] if buffers else [None] * len(weights)
        sgd(
            [*weights], [*grads], held, foreach=False, fused=True, weight_decay=decay,
            momentum=momentum, lr=lr, dampening=1.0 - keep, nesterov=nesterov, maximize=maximize,
        )  # fmt: skip


def expressible(factor: float, dtype: torch.dtype) -> bool:
    """Whether the kernel can have the factor as its 1 − dampening."""
    return factor == 0 or factor >= LEAST_FACTOR[dtype]


def update(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    factor: float, alpha: float, out: float, o: Options,
) -> None:  # fmt: skip
    """v ← μv + factor·(±g + alpha·w), w ← w − out·v, without nesterov; the factor is expressible.

    `buffers`: all are tensors, or none is.
    """
    held = [v for v in buffers if v is not None] if o.momentum else []
    if held:
        run(weights, grads, held, keep=factor, decay=alpha, momentum=o.momentum, lr=out,
            maximize=o.maximize)  # fmt: skip
    else:  # without a buffer the kernel has no dampening, so the factor goes into its lr
        run(weights, grads, [], keep=1.0, decay=alpha, momentum=0.0, lr=out * factor,
            maximize=o.maximize)  # fmt: skip


@functools.cache
def trusted(dtype: torch.dtype) -> bool:
    """Whether the kernel gives correct results in this dtype, tried once on a few tensors.

    PyTorch 2.13 skips whole vectors of 16-bit tensors (pytorch/pytorch#191763).
    """
    size = 77  # whole vectors and a remainder, for every vector width
    with torch.inference_mode(False), torch.no_grad():
        ramp = torch.linspace(-1, 1, size, dtype=torch.float64, device="cpu").to(dtype)
        w, g, v = ramp.clone(), ramp.flip(0) + 0.25, ramp.square() - 0.5
        wide = [t.to(torch.float64, copy=True) for t in (w, g, v)]
        try:
            run([w], [g], [v], keep=0.75, decay=0.5, momentum=0.5, lr=0.25)
        except (RuntimeError, NotImplementedError):
            return False
        true_v = 0.5 * wide[2] + 0.75 * (wide[1] + 0.5 * wide[0])
        true_w = wide[0] - 0.25 * true_v
        error = max((w - true_w).abs().max().item(), (v - true_v).abs().max().item())
    return error <= 4 * torch.finfo(dtype).eps
