"""N(g + βw) of the last step, computed when asked for.

Where the denominator does not use it, PyTorch's SGD kernel gets by without it, and measuring it
would read w and g once more in every step. The weights before the step follow from what it left:

    w = w' + out·v                                     w' the weights now, v the momentum now
    w = (w' ± out·f·g/s + out·μv) / (1 − out·f·β)      nesterov; without a buffer, μ = 0

with f and `out` as in `rates`, up to the rounding of what was stored, whose norm is at most

    E = (u_w N(w') + u_v out·N(v) + arithmetic) / |1 − out·f·β|      u: half an ulp of 1

So a large step, or momentum of few bits, blurs w, and a step that takes w to −g leaves nothing of
it. The answer is then off by at most β·min(E, N(w)), and given where that is a hundredth of it.
Norms that differ from the step's by more show that w, g or v was written since; a write that keeps
them, such as a change of sign, goes unseen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options import Options
from . import portable

ACCURACY = 0.01
"""The largest relative error of an answer."""
_SUMMED = 64
"""Units of the compute dtype by which a norm of the step may be off: it summed blocks in it."""


def square(
    w: Tensor, g: Tensor, v: Tensor | None, o: Options, lr: float, ratio: float, scale: float,
    known: tuple[float, float],
) -> float:  # fmt: skip
    """N(g + βw)² of the step that left these tensors; NaN if it cannot be known any more.

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
    decay = o.weight_decay
    if 0.0 in known:
        return known[1] + decay**2 * known[0]
    out = 1.0 if o.lr_in_momentum else lr
    factor = lr * ratio if o.lr_in_momentum else ratio
    sign = (-1.0 if o.maximize else 1.0) / scale
    direct = v is not None and not o.nesterov  # v has the whole step
    left = 1.0 if direct else 1 - out * factor * decay  # how much of w is in w'
    kept = 0.0 if v is None else out if direct else out * o.momentum
    sums = torch.zeros(5, dtype=torch.float64, device="cpu")
    for w_, g_, v_ in portable.pieces([w, g, v], None):
        now, d = w_.double(), g_.double() * sign
        moved = kept * v_.double() if v_ is not None else torch.zeros_like(now)
        before = now + moved
        if not direct:
            before = (before + out * factor * d) / (left or 1.0)
        parts = before, d, d + decay * before, now, moved
        sums += torch.stack([part.square().sum() for part in parts])
    n_before, n_g, n_d, n_now, n_moved = sums.sqrt().tolist()
    n_w, n_g_then = map(math.sqrt, known)
    compute = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
    blur = _rounding(w, n_now) + (0.0 if v is None else kept * _rounding(v, n_moved / (kept or 1)))
    blur += 4 * compute * (n_now + n_moved + n_before)
    if not direct:
        blur += 4 * compute * out * factor * (n_g + decay * n_w)
    blur = blur / abs(left) if left else math.inf
    if not abs(n_g - n_g_then) <= _SUMMED * compute * n_g_then:
        return math.nan
    if blur < n_w:
        if not abs(n_before - n_w) <= 2 * blur + _SUMMED * compute * n_w:
            return math.nan
        found, error = n_d, decay * blur
    else:
        found, error = math.hypot(n_g_then, decay * n_w), decay * n_w
    return found**2 if error <= ACCURACY * found else math.nan


def _rounding(t: Tensor, norm: float) -> float:
    """The largest norm of what was lost when a tensor of this norm was stored."""
    info = torch.finfo(t.dtype)
    return 0.5 * info.eps * (norm + math.sqrt(t.numel()) * info.smallest_normal)
