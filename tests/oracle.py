"""The one oracle of these tests: LARS from the README's equations, tensor by tensor.

It uses nothing of the package, so that a fault in `reference.py` shows too, and is itself held
against numbers worked by hand (`test_oracle.py`). In float64 it is the truth; in fp32 it is what
eager torch makes of the same equations, the baseline that an error is measured by.

The implementations in `conformance/originals.py` are another thing: each is written from its own
project's code, to say what a convention means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001, "eps": 1e-8,
    "dampening": 0.0, "nesterov": False, "denominator": "sum", "lr_in_momentum": True,
    "trust_clip": False, "decay_zero_norm": True, "adapt": True, "maximize": False,
}  # fmt: skip


def norm(t: Tensor) -> Tensor:
    """The 2-norm in the arithmetic of `t`, its squares kept in range by a power of two."""
    largest = t.abs().max()
    if largest == 0 or not torch.isfinite(largest):
        return largest
    unit = torch.exp2(torch.frexp(largest).exponent.to(t.dtype) - 1)
    return unit * (t / unit).square().sum().sqrt()


def update(
    w: Tensor, g: Tensor, v: Tensor | None, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """One tensor's step in the arithmetic of `w`: the new weight and momentum.

    `v` None: the tensor's first step. Without momentum there is no new one either.
    """
    g = -g if o["maximize"] else g
    lr, momentum, decay = float(o["lr"]), o["momentum"], o["weight_decay"]
    d = g + decay * w
    q: Any = 1.0
    if o["adapt"]:
        w_norm, below = norm(w), norm(d if o["denominator"] == "decayed" else g)
        if w_norm != 0 and below != 0:
            if o["denominator"] == "sum":
                below = below + decay * w_norm
            q = o["trust_coefficient"] * w_norm / (below + o["eps"])
            if o["trust_clip"]:
                q = (q / lr).clamp(max=1.0) if lr else 1.0
        elif not o["decay_zero_norm"]:
            d = g
    inside, outside = (lr, 1.0) if o["lr_in_momentum"] else (1.0, lr)
    u = inside * q * d
    if momentum == 0:
        return w - outside * u, None
    v = u if v is None else momentum * v + (1 - o["dampening"]) * u
    return w - outside * (u + momentum * v if o["nesterov"] else v), v


def in_float64(
    w: Tensor, g: Tensor, v: Tensor | None, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The truth of one step, from what is stored."""
    w, g, v = (None if t is None else t.detach().cpu().double() for t in (w, g, v))
    return update(w, g, v, o)


def in_eager_fp32(
    w: Tensor, g: Tensor, v: Tensor | None, o: Mapping[str, Any], v_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The same as one would write it in torch: fp32 arithmetic, each stored value rounded once."""
    new_w, new_v = update(w.float(), g.float(), None if v is None else v.float(), o)
    return new_w.to(w.dtype), None if new_v is None else new_v.to(v_dtype)


def momentum_terms(
    w: Tensor, g: Tensor, v: Tensor | None, new_v: Tensor, o: Mapping[str, Any]
) -> Tensor:
    """Magnitudes of what a step sums up to the momentum `new_v`, added.

    What rounding leaves is relative to these: g + βw may cancel.
    """
    w, g = w.detach().cpu().double(), g.detach().cpu().double()
    old = torch.zeros_like(new_v) if v is None else o["momentum"] * v.detach().cpu().double()
    d, u = g * (-1 if o["maximize"] else 1) + o["weight_decay"] * w, new_v - old
    factor = norm(u) / norm(d) if norm(d) != 0 else norm(d)
    return factor * (g.abs() + o["weight_decay"] * w.abs()) + old.abs()


# ------------------------------------------------------------------ bounds

ULPS = 2


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at |x|, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs().clamp(min=info.tiny)).exponent - 1
    return info.eps * torch.exp2(exponent.double())


def assert_close(
    name: str, ours: Tensor, truth: Tensor, eager: Tensor, before: Tensor, ulps: float = ULPS
) -> None:
    """Our error is at most twice that of eager fp32, plus a few ulp of what is stored.

    `before`: the weight before the step, or the terms of the momentum, if they are larger.
    """
    if ours.numel() == 0:
        return
    ours_, eager_, before_ = (t.detach().double().cpu() for t in (ours, eager, before))
    scale = torch.maximum(truth.abs(), before_.abs())
    bound = 2 * (eager_ - truth).abs().max() + ulps * ulp(scale, ours.dtype)
    excess = (ours_ - truth).abs() - bound
    if bool((excess <= 0).all()):
        return
    worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    raise AssertionError(
        f"{name}, element {at} of {tuple(truth.shape)}: ours {ours_[at].item():.17g}, "
        f"truth {truth[at].item():.17g}, eager {eager_[at].item():.17g}, "
        f"before {before_[at].item():.17g}; bound {bound[at].item():.3g}; "
        f"{int((~(excess <= 0)).sum())} of {truth.numel()} elements are beyond it"
    )


class Truth:
    """Some tensors stepped in float64, each stored value rounded to its storage dtype.

    `momentum_dtype` None: as the optimizer's default, fp32 but float64 for float64 parameters.
    """

    def __init__(
        self, params: Sequence[Tensor], momentum_dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        self.options = {**DEFAULTS, **options}
        self.weights = [p.detach().double().cpu().clone() for p in params]
        self.dtypes = [p.dtype for p in params]
        self.buffer_dtypes = [
            momentum_dtype or (torch.float64 if d == torch.float64 else torch.float32)
            for d in self.dtypes
        ]
        self.buffers: list[Tensor | None] = [None] * len(params)
        # The largest number met in each tensor's arithmetic: its errors are of that scale, also
        # where the result is smaller (1.5 - 1.4).
        self.sizes = [0.0] * len(params)

    def step(self, grads: Sequence[Tensor | None], **options: Any) -> None:
        o = {**self.options, **options}
        for i, g in enumerate(grads):
            if g is None or g.numel() == 0:
                continue
            old = self.weights[i]
            w, v = in_float64(old, g, self.buffers[i], o)
            self.sizes[i] = max(self.sizes[i], *(t.abs().max().item() for t in (old, w, w - old)))
            if v is not None:
                out = 1.0 if o["lr_in_momentum"] else float(o["lr"])
                self.sizes[i] = max(self.sizes[i], out * v.abs().max().item())
            self.weights[i] = w.to(self.dtypes[i]).double()
            self.buffers[i] = None if v is None else v.to(self.buffer_dtypes[i]).double()


def assert_true(params: Sequence[Tensor], truth: Truth, steps: int = 1, units: float = 2.0) -> None:
    """Each parameter equals the truth within `units` roundings of its storage a step."""
    for i, (p, w) in enumerate(zip(params, truth.weights, strict=True)):
        if w.numel() == 0:
            continue
        info = torch.finfo(p.dtype)
        arithmetic = 2.0**-53 if p.dtype == torch.float64 else 2.0**-24
        size = max(truth.sizes[i], w.abs().max().item())
        bound = info.eps / 2 * w.abs() + arithmetic * size + info.tiny * info.eps
        bound = units * steps * bound
        error = (p.detach().double().cpu() - w).abs()
        assert torch.isfinite(p).all(), f"parameter {i} is not finite"
        assert (error <= bound).all(), (
            f"parameter {i} {tuple(p.shape)} {p.dtype}: off by {error.max():.3g}, "
            f"{(error / bound).max():.3g} times the bound"
        )
