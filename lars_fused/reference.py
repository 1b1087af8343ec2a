"""The equations of LARS, in order: the float64 truth, and the portable backend's step.

Symbols: w weight, g gradient, v momentum buffer, γ lr, μ momentum, τ dampening, β weight decay,
η trust coefficient, ε eps, N(·) the L2 norm of one tensor. You, Gitman, Ginsburg 2017, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .options import Options


def scalar(value: Any, like: Tensor) -> Tensor:
    """A number or 1-element tensor as a 0-dim tensor of the dtype and device of `like`."""
    if isinstance(value, Tensor):
        return value.to(like).reshape(())
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def square_sums(w: Tensor, g: Tensor, o: Options, scale: Any = 1.0) -> Tensor:
    """N(w)², N(g)², N(d)² with g divided by `scale` and d = g + βw."""
    g = (-g if o.maximize else g) / scale
    d = g + o.weight_decay * w
    return torch.stack([(w * w).sum(), (g * g).sum(), (d * d).sum()])


def trust_ratios(sums: Tensor, options: Sequence[Options]) -> tuple[Tensor, Tensor]:
    """For rows [N(w)², N(g)², N(d)²]: each row's trust ratio q, and the decay left in d."""

    # One column per option; `lr` may be a tensor, possibly on the device.
    def column(name: str) -> Tensor:
        values = [getattr(o, name) for o in options]
        return torch.tensor(values, dtype=sums.dtype, device=sums.device)

    lr = torch.stack([scalar(o.lr, sums) for o in options])
    w_norm, g_norm, d_norm = sums.sqrt().unbind(1)
    mode = [o.denominator for o in options]
    of_d, of_sum = (
        torch.tensor([m == k for m in mode], device=sums.device) for k in ("decayed", "sum")
    )
    norm = torch.where(of_d, d_norm, g_norm)
    adapt, decay = column("adapt").bool(), column("weight_decay")
    adapted = adapt & (w_norm != 0) & (norm != 0)
    below = norm + torch.where(of_sum, decay * w_norm, 0) + column("eps")
    q = column("trust_coefficient") * w_norm / torch.where(adapted, below, 1)
    clipped = torch.where(lr == 0, 1, q / torch.where(lr == 0, 1, lr))  # the limit as lr goes to 0
    q = torch.where(column("trust_clip").bool(), torch.where(clipped > 1, 1, clipped), q)
    raw = adapt & ~adapted & ~column("decay_zero_norm").bool()
    return torch.where(adapted, q, 1), torch.where(raw, 0, decay)


def update(
    w: Tensor, g: Tensor, v: Tensor | None, q: Any, decay: Any, first: bool, o: Options,
    scale: Any = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The new w and v. With `v` None there is no momentum buffer (μ = 0)."""
    lr = o.lr.to(w).reshape(()) if isinstance(o.lr, Tensor) else o.lr
    d = (-g if o.maximize else g) / scale + decay * w
    u = (lr * q if o.lr_in_momentum else q) * d
    out = 1.0 if o.lr_in_momentum else lr
    if v is None:
        return w - out * u, None
    v = u if first else o.momentum * v + (1 - o.dampening) * u
    return w - out * (u + o.momentum * v if o.nesterov else v), v
