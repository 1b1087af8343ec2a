"""The step without a class, and the checks of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import checks, sharding
from .batch import Batch
from .reference import Options
from .stepper import Stepper


def lars_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    dampening: float = 0.0,
    nesterov: bool = False,
    denominator: str = "sum",
    lr_in_momentum: bool = True,
    trust_clip: bool = False,
    decay_zero_norm: bool = True,
    adapt: bool = True,
    maximize: bool = False,
    momentum_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One LARS step of a list of tensors in place; the equations stand at `LARS`.

    Args:
        params: tensors of any shape; float32, float16, bfloat16 or float64; updated in place.
        grads: one gradient each, same shape and device; not changed.
        momentum_buffers: one buffer each, same shape; updated in place. An entry None means that
            the tensor has not been stepped: it is replaced by a new buffer of `momentum_dtype`
            (float64 for float64 parameters) unless `momentum` is 0.
        lr: γ, as all that follow up to `maximize` as for `LARS`.
        momentum: μ.
        weight_decay: β.
        trust_coefficient: η.
        eps: ε.
        dampening: τ.
        nesterov: Nesterov momentum.
        denominator: "sum", "decayed" or "gradient".
        lr_in_momentum: whether γ is inside the buffer.
        trust_clip: q = min(q/γ, 1).
        decay_zero_norm: whether a tensor with a zero norm decays.
        adapt: whether the trust ratio is used.
        maximize: maximize the objective.
        momentum_dtype: storage dtype of new buffers.
        backend: "auto", "triton" or "torch", as for `LARS`.
        grad_scale: float32, one element: gradients are divided by it.
        found_inf: float32, one element: not 0 skips the step. `momentum_buffers` then stays as it
            is on a CPU; elsewhere the host cannot know, and new buffers are put there as zeros.

    Raises:
        ValueError, TypeError, RuntimeError: for bad input, before anything is changed.
    """
    options = Options(
        lr, momentum, weight_decay, trust_coefficient, eps, dampening, nesterov, denominator,
        lr_in_momentum, trust_clip, decay_zero_norm, adapt, maximize,
    )  # fmt: skip
    checks.check_options(options._asdict(), "lars_step: ", read_device=False)
    checks.check_engine(backend, momentum_dtype, False, False)
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"lars_step: {len(params)} params, {len(grads)} grads and {len(momentum_buffers)} "
            "momentum_buffers; must be equally many"
        )
    buffers: list[Tensor | None] = []

    def label(i: int) -> str:
        return checks.describe(f"params[{i}]", params[i])

    for i, (p, g, v) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        checks.check_writable(p, partial(label, i))
        check_tensors(p, g, {"momentum_buffer": v}, partial(label, i))
        buffers.append(new_buffer(p, momentum_dtype) if v is None and momentum else v)
    ids = list(map(id, params))
    if len(set(ids)) != len(ids):
        twice = next(i for i, key in enumerate(ids) if key in ids[:i])
        raise ValueError(
            f"{label(twice)}: is a duplicate of params[{ids.index(ids[twice])}]; "
            "a parameter may stand there once"
        )
    if not momentum:
        buffers = [None] * len(params)
    with torch.no_grad():
        weights, present, held = (
            [sharding.local(t) for t in tensors] for tensors in (params, grads, buffers)
        )
        batch = Batch(weights, present, held, [None] * len(params), [0] * len(params))
        fresh = [v is None for v in momentum_buffers]
        stepper = Stepper(batch, [options], fresh, backend, label, shards=sharding.Shards(params))
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        stepper.run(batch, [options], grad_scale, found_inf)
        torch.autograd.graph.increment_version([p for p in params if sharding.layout(p)])
    if momentum:
        momentum_buffers[:] = buffers


def check_tensors(
    p: Tensor, g: Tensor, state: dict[str, Tensor | None], label: Callable[[], str]
) -> None:
    """Raise unless a parameter, its gradient and its state go together."""
    checks.check_parameter(p, label)
    checks.check_gradient(p, g, label)
    for key, value in state.items():
        if value is not None:
            checks.check_state(p, key, value, label)
    sharding.check(p, {"gradient": g, **state}, label)


def new_buffer(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros laid out as `p`. A float64 parameter keeps float64 momentum, whatever `dtype` says."""
    wide = torch.float64 if p.dtype == torch.float64 else dtype
    part = sharding.local(p)
    return sharding.like(p, torch.zeros_like(part, dtype=wide, memory_format=torch.preserve_format))
