"""`lars_step`: one LARS step as a function, without an optimizer object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import options as table
from ._engine import new_state, validate
from ._engine.new_state import StepState
from ._engine.prepared_step import PreparedStep
from ._engine.tensors import Scaling
from .options import Settings


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
    """Take one LARS step on a list of tensors, in place; see `LARS` for the equations.

    Args:
        params: tensors of any shape; float32, float16, bfloat16 or float64; updated in place.
        grads: one gradient per parameter, same shape and device; not modified.
        momentum_buffers: one buffer per parameter, same shape; updated in place. None marks a
            tensor that has not been stepped yet: the entry is replaced by a new buffer of
            `momentum_dtype` (float64 for float64 parameters) unless `momentum` is 0.
        lr: γ; this and every hyper-parameter up to `maximize` as for `LARS`.
        momentum: μ; with 0 no buffer is read, allocated or written.
        weight_decay: as for `LARS`.
        trust_coefficient: as for `LARS`.
        eps: as for `LARS`.
        dampening: as for `LARS`.
        nesterov: as for `LARS`.
        denominator: as for `LARS`.
        lr_in_momentum: as for `LARS`.
        trust_clip: as for `LARS`.
        decay_zero_norm: as for `LARS`.
        adapt: as for `LARS`.
        maximize: as for `LARS`.
        momentum_dtype: storage dtype of new buffers.
        backend: "auto", "triton" or "torch", as for `LARS`.
        grad_scale: float32, one element: gradients are divided by it.
        found_inf: float32, one element: a non-zero value skips the step. On a CPU
            `momentum_buffers` is then unchanged; on other devices the host does not read the flag,
            and missing buffers are filled in with zeros.

    Raises:
        ValueError, TypeError, RuntimeError: for bad input, before anything is modified.
    """
    options = table.pick(locals())
    table.check(options._asdict(), "lars_step: ", read_device=False)
    table.check_settings(Settings(momentum_dtype, backend=backend), "lars_step: ")
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"lars_step: {len(params)} params, {len(grads)} grads and {len(momentum_buffers)} "
            "momentum_buffers; must have the same length"
        )

    def label(i: int) -> str:
        return validate.describe(f"params[{i}]", params[i], what="lars_step")

    seen_at: dict[int, int] = {}
    for i, (p, g, v) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        validate.check_writable(p, partial(label, i))
        new_state.check_tensors(p, g, {"momentum_buffer": v}, partial(label, i))
        if seen_at.setdefault(id(p), i) != i:
            raise ValueError(
                f"{label(i)}: is a duplicate of params[{seen_at[id(p)]}]; "
                "each parameter may appear only once"
            )
    buffers: list[Tensor | None] = [None] * len(params)
    if momentum != 0:
        buffers = [
            new_state.new_buffer(p, momentum_dtype) if v is None else v
            for p, v in zip(params, momentum_buffers, strict=True)
        ]
    with torch.no_grad():
        fresh = [v is None for v in momentum_buffers]
        nothing: list[Tensor | None] = [None] * len(params)
        state = StepState([*params], [*params], buffers, nothing, fresh)
        step = PreparedStep(
            state, [*grads], [0] * len(params), [options], backend, label, caller="lars_step"
        )
        scaling = Scaling(grad_scale, found_inf)
        if scaling.skips_for_certain():
            return
        seen = step.see([*grads], step.addresses)
        assert seen is not None, "every gradient was checked"
        step.run(seen, [options], scaling)
    if momentum != 0:
        momentum_buffers[:] = buffers
