"""N(g + βw) of the last step, computed when asked for.

Where the denominator does not use it, PyTorch's SGD kernel gets by without it, and measuring it
would read w and g once more in every step. The weights before the step follow from what it left:

    w = w' + out·v                                     w' the weights now, v the momentum now
    w = (w' ± out·f·g/s + out·μv) / (1 − out·f·β)      nesterov; without a buffer, μ = 0

with f and `out` as in `rates`. Norms that differ from the step's show that w, g or v was written
since; then there is no answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options import Options
from . import portable


def square(
    w: Tensor, g: Tensor, v: Tensor | None, o: Options, lr: float, ratio: float, scale: float,
    known: tuple[float, float],
) -> float:  # fmt: skip
    """N(g + βw)² of the step that left these tensors; NaN if they were written since.

    Args:
        w: the weight after the step.
        g: the gradient.
        v: the momentum buffer after the step.
        o: the step's options.
        lr: γ as a number.
        ratio: the step's trust ratio.
        scale: the step's loss scale.
        known: N(w)² and N(g)² of the step, the latter of the unscaled gradient.
    """
    if 0.0 in known:
        return known[1] + o.weight_decay**2 * known[0]
    out = 1.0 if o.lr_in_momentum else lr
    factor = lr * ratio if o.lr_in_momentum else ratio
    sign = (-1.0 if o.maximize else 1.0) / scale
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    for w_, g_, v_ in portable.pieces([w, g, v], None):
        now, d = w_.double(), g_.double() * sign
        if v_ is not None and not o.nesterov:
            before = now + out * v_.double()
        else:
            momentum = 0.0 if v_ is None else o.momentum * v_.double()
            before = (now + out * (factor * d + momentum)) / (1 - out * factor * o.weight_decay)
        parts = before, d, d + o.weight_decay * before
        sums += torch.stack([part.square().sum() for part in parts])
    found = sums.tolist()
    # Squares: w' was rounded to its dtype, the step's norms of w and g to the compute dtype.
    compute = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
    bounds = 8 * torch.finfo(w.dtype).eps, 8 * compute
    same = all(abs(a - b) <= e * b for a, b, e in zip(found[:2], known, bounds, strict=True))
    return float(found[2]) if same else math.nan
