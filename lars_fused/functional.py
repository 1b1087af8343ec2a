"""`lars_step`: one LARS step as a function, without an optimizer object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from . import options as table
from ._engine import new_state, validate
from ._engine.members import list_of_tensors
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
        momentum_buffers: a list, one buffer per parameter, same shape, in memory of its own;
            updated in place. One that begins where another, a parameter or a gradient begins is
            refused; an overlap in part is not looked for. None marks a tensor that has not been
            stepped yet: the entry is replaced by a new buffer of `momentum_dtype` (float64 for
            float64 parameters) unless `momentum` is 0.
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
        grad_scale: a tensor of one element: gradients are divided by it.
        found_inf: a tensor of one element: a non-zero value skips the step. On a CPU
            `momentum_buffers` is then unchanged; on other devices the host does not read the flag,
            and missing buffers are filled in with zeros.

    Raises:
        ValueError, TypeError, RuntimeError: for bad input, before anything is modified.
    """
    options = table.pick(locals())
    table.check(options._asdict(), "lars_step: ", read_device=False)
    table.check_settings(Settings(momentum_dtype, backend=backend), "lars_step: ")
    params = list_of_tensors("lars_step", "params", params)
    grads = list_of_tensors("lars_step", "grads", grads)
    if momentum == 0:
        momentum_buffers = list_of_tensors("lars_step", "momentum_buffers", momentum_buffers)
    elif not isinstance(momentum_buffers, list):
        raise TypeError(
            f"lars_step: momentum_buffers is a {type(momentum_buffers).__name__}; must be a list, "
            "which keeps the new buffers between steps; begin with [None] * len(params)"
        )
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"lars_step: {len(params)} params, {len(grads)} grads and {len(momentum_buffers)} "
            "momentum_buffers; must have the same length"
        )
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        _check_scalar(name, value)
    _check_elements("params", params)
    _check_elements("grads", grads)
    _check_elements("momentum_buffers", momentum_buffers)

    def label(i: int) -> str:
        return validate.describe(f"params[{i}]", params[i], what="lars_step")

    seen_at: dict[int, int] = {}
    for i, (p, g, v) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        validate.check_writable(p, partial(label, i))
        new_state.check_tensors(
            p, g, {"momentum_buffer": v}, partial(label, i), remedy="pass None to start from zero"
        )
        if seen_at.setdefault(id(p), i) != i:
            raise ValueError(
                f"{label(i)}: is a duplicate of params[{seen_at[id(p)]}]; "
                "each parameter may appear only once"
            )
    buffers: list[Tensor | None] = [None] * len(params)
    if momentum != 0:
        _check_buffers(params, grads, momentum_buffers, label)
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


def _check_elements(name: str, given: Sequence[object]) -> None:
    for i, t in enumerate(given):
        if isinstance(t, Tensor) or (t is None and name == "momentum_buffers"):
            continue
        also = ""
        if name == "momentum_buffers":
            also = ", or None for one that has not been stepped yet"
        elif name == "grads" and t is None:
            also = "; leave out parameters without a gradient, with their buffers"
        raise validate.not_a_tensor(f"lars_step: {name}[{i}]", t, also)


def _check_scalar(name: str, value: Tensor | None) -> None:
    allowed = "must be None or a tensor of one real number"
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(
            f"lars_step: {name}={table.shown(value)} is a {type(value).__name__}; {allowed}, "
            "such as torch.tensor(1.0)"
        )
    if value is not None and (value.numel() != 1 or value.is_complex() or value.is_sparse):
        raise ValueError(
            f"lars_step: {name} is a tensor of shape {tuple(value.shape)}, {value.dtype}; {allowed}"
        )


def _check_buffers(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    label: Callable[[int], str],
) -> None:
    """Raise where a buffer is another one, a parameter or a gradient: they would overwrite it."""
    held = [v for v in buffers if v is not None]
    if not held or _apart(held, chain(params, grads)):
        return
    taken = {_place(t): f"params[{i}]" for i, t in enumerate(params)}
    taken |= {_place(t): f"grads[{i}]" for i, t in enumerate(grads)}
    for i, v in enumerate(buffers):
        if v is None:
            continue
        place, name = _place(v), f"momentum_buffers[{i}]"
        if taken.setdefault(place, name) != name:
            raise ValueError(
                f"{label(i)}: {name} shares its memory with {taken[place]}; each parameter needs "
                "a buffer of its own; pass None for a new one"
            )


def _apart(held: Sequence[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether all begin at different addresses. False is no answer: some may have none."""
    try:
        places = set(map(Tensor.data_ptr, held))
        return len(places) == len(held) and places.isdisjoint(map(Tensor.data_ptr, others))
    except (RuntimeError, NotImplementedError):  # fake and functional tensors
        return False


def _place(t: Tensor) -> object:
    """Where a tensor begins; of one without memory, which it is."""
    if t.numel() == 0 or t.is_meta or t.layout != torch.strided or not validate.in_memory(t):
        return id(t)
    return t.device, t.data_ptr()
