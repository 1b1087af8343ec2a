"""The LARS variants in use, as named sets of the options of `LARS`.

Each is a dict, used as `LARS(params, lr, **conventions.MAE)`. Every access gives a new one of plain
values: it can be pickled, copied and put into a configuration, and changing it, by accident or not,
leaves the convention as it is. It sets every
option that its source fixes; learning rate, momentum, weight decay and everything that the source
leaves to its user stay with the caller. To change an option that a convention sets, merge:

    LARS(params, lr, **conventions.APEX_LARC | {"trust_clip": False})

Notation: w weight, g gradient, v momentum buffer, γ lr, μ momentum, τ dampening, β weight_decay,
η trust_coefficient, ε eps, N(·) the L2 norm of one tensor, d = g + βw. On a tensor's first step v
has no earlier value: it is the second term alone, undampened.

Each source has its own way to exclude tensors from decay or adaptation, documented below; here it
is always a group option (`adapt=False`, `weight_decay=0`), which `param_groups` sets by number of
dimensions or by name. Sources that run in PyTorch round the norms, q·d and v to the parameter's
dtype; this library computes in fp32, so fp16 and bf16 results differ from theirs by that rounding.
"""

from __future__ import annotations

from typing import Any

__all__ = ["APEX_LARC", "MAE", "PAPER", "SIMCLR", "TIMM", "TORCHLARS"]

PAPER: dict[str, Any]
"""Algorithm 1 of You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017.

    q = η N(w) / (N(g) + β N(w) + ε)
    v ← μv + γq(g + βw) ;  w ← w − v

These are the defaults of `LARS`. Remaining differences: the paper has no ε and does not say what
happens where a norm is zero (here q = 1); it adapts every tensor unless `param_groups` is used.
"""

APEX_LARC: dict[str, Any]
"""NVIDIA apex, `apex.parallel.LARC(torch.optim.SGD(...))` with its defaults (`clip=True`).

    q = min(η N(w) / (N(g) + β N(w) + ε) / γ, 1)
    v ← μv + (1−τ)q(g + βw) ;  w ← w − γv
    where N(w) = 0 or N(g) = 0: q = 1 and d = g, without the decay

Momentum, dampening and nesterov are those of the wrapped optimizer, so they stay with the caller:
pass the momentum that SGD had (its default is 0, that of `LARS` is 0.9). For `clip=False` merge
`{"trust_clip": False}`. apex adapts every tensor, including biases. Remaining differences: apex
scales `p.grad` in place; this library never writes it. Source: apex/parallel/LARC.py, deleted from
NVIDIA/apex in May 2025 (pull request 1896).
"""

TORCHLARS: dict[str, Any]
"""kakaobrain/torchlars, `LARS(torch.optim.SGD(...))`.

    q = η N(w) / (N(g) + β N(w) + ε), 1 where N(w) = 0 or N(g) = 0
    v ← μv + (1−τ)q(g + βw) ;  w ← w − γv

Momentum stays with the caller, as for `APEX_LARC`. torchlars adapts every tensor. Remaining
differences: it scales `p.grad` in place, and does so before the closure recomputes it; here the
closure runs first.
Source: torchlars/lars.py.
"""

TIMM: dict[str, Any]
"""timm, `timm.optim.Lars`.

The equations are those of `TORCHLARS`; timm's default momentum is 0, that of `LARS` is 0.9. This
covers timm's names lars and nlars (nesterov); for larc and nlarc merge `{"trust_clip": True}`.

timm adapts a group only if its weight decay is not 0, or with `always_adapt`: give the groups
without decay `adapt=False`, as `param_groups` does. Remaining differences: with `trust_clip` timm
also clips the fallback, so that q = min(1/γ, 1) where a norm is zero; here q stays 1 there. Older
versions scale `p.grad` in place.
Source: timm/optim/lars.py.
"""

MAE: dict[str, Any]
"""MAE and MoCo v3; also Barlow Twins, VICReg, DINO and BYOL, which name η `eta`.

    d = g + βw ;  q = η N(w) / N(d), 1 where N(w) = 0 or N(d) = 0
    v ← μv + qd ;  w ← w − γv

MAE, MoCo v3 and DINO neither decay nor adapt tensors of one dimension or none (`param_groups`'
default split). Barlow Twins and VICReg do so by two separate filters. Remaining differences: their
state key is `mu`, here it is `momentum_buffer`. Sources: facebookresearch/mae util/lars.py,
facebookresearch/moco-v3 moco/optimizer.py.
"""

SIMCLR: dict[str, Any]
"""SimCLR's `LARSOptimizer` with `classic_momentum=True` (its default), and `optax.lars`.

    d = g + βw ;  q = η N(w) / N(d), 1 where N(w) = 0 or N(d) = 0
    v ← μv + γqd ;  w ← w − v            nesterov: w ← w − (μv + γqd)

Both exclude tensors from decay and from adaptation separately: SimCLR by regular expressions on
names, optax by masks. Remaining differences: `classic_momentum=False`, whose ratio depends on
the updated momentum, is not covered; optax stores −v. Sources: google-research/simclr
lars_optimizer.py, optax `alias.lars`.
"""

_OPTIONS: dict[str, dict[str, Any]] = {
    "PAPER": {
        "trust_coefficient": 0.001,
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_momentum": True,
        "trust_clip": False,
        "decay_zero_norm": True,
    },
    "APEX_LARC": {
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_momentum": False,
        "trust_clip": True,
        "decay_zero_norm": False,
    },
    "TORCHLARS": {
        "trust_coefficient": 0.001,
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_momentum": False,
        "trust_clip": False,
        "decay_zero_norm": True,
    },
    "TIMM": {
        "trust_coefficient": 0.001,
        "eps": 1e-8,
        "denominator": "sum",
        "lr_in_momentum": False,
        "trust_clip": False,
        "decay_zero_norm": True,
    },
    "MAE": {
        "trust_coefficient": 0.001,
        "eps": 0.0,
        "denominator": "decayed",
        "lr_in_momentum": False,
        "trust_clip": False,
        "decay_zero_norm": True,
    },
    "SIMCLR": {
        "trust_coefficient": 0.001,
        "eps": 0.0,
        "denominator": "decayed",
        "lr_in_momentum": True,
        "trust_clip": False,
        "decay_zero_norm": True,
    },
}


def __getattr__(name: str) -> dict[str, Any]:
    if name in _OPTIONS:
        return dict(_OPTIONS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
