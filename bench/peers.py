"""Ways to take the same step: `lars_fused` itself, SGD, and LARS in plain PyTorch.

The tables below also list the other projects of `bench.projects`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import projects
from bench.variants import (
    Hyper,
    Inputs,
    Variant,
    groups,
    not_many,
    parameters,
    same_dtype,
    with_momentum,
)
from lars_fused import LARS
from lars_fused._engine import launch, launch_schedule, launch_tables

ONE = "lars_fused, one launch"
TWO = "lars_fused, two launches"
CACHED = "lars_fused, one launch, lars_step"
PORTABLE = "lars_fused, portable"
FLOOR = "SGD(fused=True)"
OURS = (ONE, CACHED, TWO, PORTABLE)


def ours(
    inputs: Inputs, launches: int = 1, backend: str = "triton", kernel: str | None = None
) -> Variant:
    """As users get it, or in one launch or two of a kernel."""
    params, h = parameters(inputs), inputs.hyper
    optimizer = LARS(
        groups(inputs, params, weight_decay=0.0, adapt=False), h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps,
        backend=backend,
    )  # fmt: skip
    with_momentum(optimizer, params, inputs.v)

    def step() -> None:
        # Read when the tables are made, by the first step.
        chosen = launch_schedule.forced_kernel(kernel) if kernel else contextlib.nullcontext()
        with launch_tables.forced_launches(launches), chosen:
            optimizer.step()
        variant.step = optimizer.step

    def momenta() -> list[Tensor]:
        return [optimizer.state[p]["momentum_buffer"] for p in params]

    variant = Variant(step, lambda: params, options=inputs.options(), momenta=momenta)
    return variant


@contextlib.contextmanager
def used(row: Any, architecture: str) -> Iterator[None]:
    """New work within the block is made and launched with the constants of a row, by its kernel."""
    tuning = launch.kernels().tuning
    resident = row.order == "resident"
    rows = tuning.RESIDENT_ROWS if resident else tuning.ROWS
    before = dict(rows)
    rows[architecture] = row
    try:
        with launch_schedule.forced_kernel("lars_resident" if resident else "lars_step"):
            yield
    finally:
        rows.clear()
        rows.update(before)


def sgd_fused(inputs: Inputs, **kind: bool) -> Variant:
    """20 bytes per parameter in fp32, no norms: the floor. Momentum has the weights' dtype."""
    same_dtype(inputs, "SGD")
    params, h = parameters(inputs), inputs.hyper
    given = groups(inputs, params, weight_decay=0.0)
    kind = kind or {"fused": True}
    optimizer = torch.optim.SGD(given, h.lr, h.momentum, weight_decay=h.weight_decay, **kind)
    return Variant(optimizer.step, lambda: params)


# ------------------------------------------------------------------ our own plain LARS


def _eager(w: list[Tensor], g: list[Tensor], v: list[Tensor], adapt: list[bool], h: Hyper) -> None:
    """As users write it: one tensor after the other."""
    for i, adapted in enumerate(adapt):
        d = g[i]
        if adapted:
            w_norm, g_norm = torch.linalg.vector_norm(w[i]), torch.linalg.vector_norm(g[i])
            q = h.trust_coefficient * w_norm / (g_norm + h.weight_decay * w_norm + h.eps)
            q = torch.where((w_norm > 0) & (g_norm > 0), q, 1.0)
            d = (d + h.weight_decay * w[i]) * q
        v[i].mul_(h.momentum).add_(d, alpha=h.lr)
        w[i].sub_(v[i])


def _foreach(
    w: list[Tensor], g: list[Tensor], v: list[Tensor], adapt: list[bool], h: Hyper
) -> None:
    """The same with PyTorch's foreach functions."""
    yes = [i for i, adapted in enumerate(adapt) if adapted]
    if yes:
        some_w, some_g = [w[i] for i in yes], [g[i] for i in yes]
        w_norms = torch.stack(torch._foreach_norm(some_w))
        g_norms = torch.stack(torch._foreach_norm(some_g))
        q = h.trust_coefficient * w_norms / (g_norms + h.weight_decay * w_norms + h.eps)
        q = torch.where((w_norms > 0) & (g_norms > 0), q, 1.0)
        scaled = torch._foreach_add(some_g, some_w, alpha=h.weight_decay)
        torch._foreach_mul_(scaled, list(q.to(scaled[0].dtype).unbind()))
        at = dict(zip(yes, scaled, strict=True))
        g = [at.get(i, grad) for i, grad in enumerate(g)]
    torch._foreach_mul_(v, h.momentum)
    torch._foreach_add_(v, g, alpha=h.lr)
    torch._foreach_sub_(w, v)


def plain(
    inputs: Inputs, foreach: bool = False, compiled: bool = False, compiler: str = "inductor"
) -> Variant:
    if compiled or not foreach:
        not_many(inputs)
    w, v = [t.clone() for t in inputs.w], [t.clone() for t in inputs.v]
    run: Any = _foreach if foreach else _eager
    if compiled:
        run = torch.compile(run, backend=compiler, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        run(w, inputs.g, v, inputs.adapt, inputs.hyper)

    return Variant(step, lambda: w, graph=not compiled, options=inputs.options())


LADDER: dict[str, Callable[[Inputs], Variant]] = {
    FLOOR: sgd_fused,
    ONE: ours,
    CACHED: lambda i: ours(i, kernel="lars_step"),
    TWO: lambda i: ours(i, launches=2, kernel="lars_step"),
}
EAGER: dict[str, Callable[[Inputs], Variant]] = {
    "foreach LARS": lambda i: plain(i, foreach=True),
    "eager LARS": plain,
}
COMPILED: dict[str, Callable[[Inputs], Variant]] = {
    "compiled foreach LARS": lambda i: plain(i, foreach=True, compiled=True),
    "compiled eager LARS": lambda i: plain(i, compiled=True),
}
PROJECTS: dict[str, Callable[[Inputs], Variant]] = {
    "timm Lars": projects.timm_lars,
    "optax lars, jit": projects.optax_lars,
    "apex LARC": projects.apex_larc,
    "apex FusedLARS": projects.apex_fused_lars,
}
CPU_PROJECTS: dict[str, Callable[[Inputs], Variant]] = {
    "timm Lars": projects.timm_lars,
    "pytorch_optimizer LARS": projects.kozistr_lars,
    "pytorch_optimizer LARS, foreach": lambda i: projects.kozistr_lars(i, foreach=True),
    "torch_optimizer LARS": projects.torch_optimizer_lars,
}
PORTABLE_LADDER: dict[str, Callable[[Inputs], Variant]] = {
    FLOOR: sgd_fused,
    "SGD(foreach=True)": lambda i: sgd_fused(i, foreach=True),
    PORTABLE: lambda i: ours(i, backend="torch"),
}
# Variants that run on a CPU, ours first.
CPU_LADDER: dict[str, Callable[[Inputs], Variant]] = {
    PORTABLE: PORTABLE_LADDER[PORTABLE],
    FLOOR: sgd_fused,
    "SGD(foreach=True)": PORTABLE_LADDER["SGD(foreach=True)"],
    **EAGER,
    "compiled foreach LARS": COMPILED["compiled foreach LARS"],
    **CPU_PROJECTS,
}
