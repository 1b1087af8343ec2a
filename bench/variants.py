"""What a benchmark steps: tensors and hyper-parameters, and a way to take the step.

Builders of `bench.peers` and `bench.projects` make a `Variant` of `Inputs`; each owns copies of
weights and momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lars_fused.reference import Options

# Where every tensor costs a peer several launches or a compilation, more of them would only wait.
MANY = 1000


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of every peer: each term moves the result, and w settles near −g/β."""

    lr: float = 0.5
    momentum: float = 0.8
    weight_decay: float = 0.3
    trust_coefficient: float = 0.05
    eps: float = 1e-8


@dataclass
class Inputs:
    """Tensors of one case. A peer copies `w` and `v`; it must leave `g` as it is."""

    w: list[Tensor]
    g: list[Tensor]
    v: list[Tensor]
    adapt: list[bool]
    hyper: Hyper = field(default_factory=Hyper)

    def options(self, **convention: Any) -> list[Options]:
        """The reference's options of each tensor."""
        h = self.hyper
        base: dict[str, Any] = {
            "lr": h.lr, "momentum": h.momentum, "eps": h.eps,
            "trust_coefficient": h.trust_coefficient, **convention,
        }  # fmt: skip
        yes = Options(**base, weight_decay=h.weight_decay, adapt=True)
        no = Options(**base, weight_decay=0.0, adapt=False)
        return [yes if a else no for a in self.adapt]


@dataclass
class Variant:
    """One way to step, ready to be timed."""

    step: Callable[[], object]
    weights: Callable[[], list[Tensor]]
    prepare: Callable[[], object] | None = None  # before each step, not timed
    graph: bool = False  # so many launches that only graph replay shows the GPU's own time
    chained: Callable[[int], object] | None = None  # run that many steps and wait: other runtimes
    options: list[Options] | None = None  # the reference's options
    host_bound: bool = False  # set by the timer
    momenta: Callable[[], list[Tensor]] | None = None  # compared too


def set_gradient(p: Tensor, g: Tensor) -> None:
    """Set the gradient `g` of `p`, whatever its dtype.

    Before `Tensor.grad_dtype` (torch 2.13) only `grad.data` could have a different dtype.
    """
    if g.dtype == p.dtype:
        p.grad = g
    elif hasattr(Tensor, "grad_dtype"):
        p.grad_dtype = g.dtype  # type: ignore[attr-defined]
        p.grad = g
    else:
        p.grad = torch.zeros_like(p)
        p.grad.data = g


def parameters(inputs: Inputs) -> list[torch.nn.Parameter]:
    found = []
    for w, g in zip(inputs.w, inputs.g, strict=True):
        p = torch.nn.Parameter(w.clone())
        set_gradient(p, g)
        found.append(p)
    return found


def groups(inputs: Inputs, params: list[Any], **undecayed: Any) -> list[dict[str, Any]]:
    """Decayed and adapted tensors; then the others, with `undecayed` as their options."""
    groups = [
        {"params": [p for p, a in zip(params, inputs.adapt, strict=True) if a]},
        {"params": [p for p, a in zip(params, inputs.adapt, strict=True) if not a], **undecayed},
    ]
    return [group for group in groups if group["params"]]


def with_momentum(optimizer: Any, params: list[Any], v: list[Tensor]) -> None:
    for p, buffer in zip(params, v, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer.to(p.device).clone()


def same_dtype(inputs: Inputs, who: str) -> None:
    if {t.dtype for t in [*inputs.w, *inputs.g]} != {inputs.w[0].dtype}:
        raise RuntimeError(f"{who} needs one dtype for parameters and gradients")


def not_many(inputs: Inputs) -> None:
    if len(inputs.w) > MANY:
        raise RuntimeError(f"not run beyond {MANY} tensors")
