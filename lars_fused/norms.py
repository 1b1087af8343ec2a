"""L2 norms of many tensors, and clipping by the global norm, without synchronising the host."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor

from . import options as table
from ._engine import launch, sharding, torch_step, validate
from ._engine.launch_schedule import Contents
from ._engine.launch_tables import LaunchTables
from ._engine.members import list_of_tensors, tensors_of
from ._engine.tensors import Addresses, Scaling
from .options import Options

_NORM_OPTIONS = [Options(weight_decay=0.0)]
_KEPT_LISTS = 8
_kept = threading.local()  # two threads may ask for the norms of the same shapes at once


def multi_tensor_l2norm(
    tensors: Sequence[Tensor], per_tensor: bool = True, *, backend: str = "auto"
) -> Tensor:
    """L2 norms of many tensors, in one launch per device and dtype.

    N(x) = sqrt(Σ x²), accumulated in fp32 within a block (4,096 elements on a CPU) and in float64
    across blocks; accurate over the dtype's whole range of magnitudes.

    Args:
        tensors: floating-point tensors of any shape and strides.
        per_tensor: True for one norm per tensor, False for the norm of all of them together.
        backend: "auto", "triton" or "torch", as for `LARS`. During CUDA graph capture the portable
            path runs.

    Returns:
        float64 on the first tensor's device (float32 on MPS): shape [len(tensors)], or [] with
        `per_tensor=False`. An empty list yields an empty tensor, or 0.

    Raises:
        TypeError, RuntimeError: for tensors that are not dense floating-point tensors, or that
            backend="triton" does not support.
    """
    table.check_choice("backend", backend, table.BACKENDS, "multi_tensor_l2norm: ")
    each = table.truth("per_tensor", per_tensor, "multi_tensor_l2norm: ")
    listed = list_of_tensors("multi_tensor_l2norm", "tensors", tensors)
    _check_tensors("multi_tensor_l2norm", "tensors", listed)
    return _norms(
        listed, each, backend,
        lambda i: validate.describe(f"tensors[{i}]", listed[i], what="multi_tensor_l2norm"),
    )  # fmt: skip


def _check_tensors(caller: str, name: str, given: Sequence[object]) -> None:
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            raise validate.not_a_tensor(f"{caller}: {name}[{i}]", t)


def _norms(
    tensors: Sequence[Tensor], per_tensor: bool, backend: str, label: Callable[[int], str]
) -> Tensor:
    """`multi_tensor_l2norm`; `label`: the prefix of a message about the i-th tensor."""
    for i, t in enumerate(tensors):
        validate.check_readable(t, partial(label, i))
        sharding.check(t, {}, partial(label, i))
    if not tensors:
        return torch.zeros([0] if per_tensor else [], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        squares = _squares([sharding.local(t) for t in tensors], backend, label)
        sharding.Shards(tensors).add_up_squares(squares)
    return squares.sqrt() if per_tensor else squares.sum().sqrt()


def _squares(tensors: list[Tensor], backend: str, label: Callable[[int], str]) -> Tensor:
    home = tensors[0].device
    found: list[Tensor | None] = [None] * len(tensors)
    taken: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    others: dict[torch.device, list[int]] = {}
    why_not: dict[torch.device, str | None] = {}
    for i, t in enumerate(tensors):
        if t.device not in why_not:
            why_not[t.device] = "forced" if backend == "torch" else _why_not(t.device)
        reason = why_not[t.device]
        if reason is None and t.dtype not in validate.STORAGE_DTYPES:
            reason = f"it is {t.dtype}; the kernels support {validate.STORAGE_TEXT}"
        if reason is None and not validate.dense(t):
            reason = "its elements are not adjacent in memory; use a contiguous tensor"
        if reason is None and not validate.in_memory(t):
            reason = f"it is a {type(t).__name__}, which has no memory of its own"
        if reason is None:
            taken.setdefault((t.device, t.dtype), []).append(i)
        elif backend == "triton":
            raise RuntimeError(f"{label(i)}: backend='triton' cannot read it: {reason}")
        else:
            others.setdefault(t.device, []).append(i)
    parts = [(i, torch_step.squared_norms([tensors[k] for k in i])) for i in others.values()]
    parts += [
        (index, _sums_of_squares(device, dtype, [tensors[i] for i in index]))
        for (device, dtype), index in taken.items()
    ]
    if len(parts) == 1:
        return parts[0][1]
    for index, squares in parts:
        for i, square in zip(index, squares.to(home), strict=True):
            found[i] = square
    return torch.stack([f for f in found if f is not None])


def _why_not(device: torch.device) -> str | None:
    if launch.capturing(device):
        return "norms cannot be captured into a CUDA graph by the kernels; use backend='torch'"
    return launch.why_not(device)


def _sums_of_squares(device: torch.device, dtype: torch.dtype, tensors: list[Tensor]) -> Tensor:
    """One launch. Tables of the most recent lists of shapes are cached: gradients recur."""
    numels = tuple(t.numel() for t in tensors)
    row = launch.target(device).row
    works = _kept.__dict__.setdefault("works", {})
    # Removed from the cache while in use: tables left behind by an exception are not reused.
    work = works.pop((device, dtype, numels, row), None)
    n = len(tensors)
    if work is None:
        dtypes = launch.Dtypes(dtype, None, torch.float32)
        never = (False,) * n
        # Cached tables must also serve calls outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            contents = Contents(numels, never, (0,) * n, never, 1)
            work = LaunchTables(device, dtypes, contents, halves=True)
    nothing = [0] * n
    addresses = Addresses([t.data_ptr() for t in tensors], nothing, nothing, nothing)
    work.fill(addresses, _NORM_OPTIONS)
    work.norms(Scaling())
    sums: Tensor = work.memory.sums[:, 0].clone()
    while len(works) >= _KEPT_LISTS:
        works.pop(next(iter(works)))
    works[device, dtype, numels, row] = work
    return sums


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    *,
    error_if_nonfinite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    g = g · min(1, max_norm / (N + 1e-6)) with N the norm over all gradients: a replacement for
    `torch.nn.utils.clip_grad_norm_` with norm_type=2.

    Args:
        parameters: tensors whose `.grad` is to be clipped; those without one are skipped.
        max_norm: largest norm allowed, >= 0; a number, or a tensor of one, which is not read if it
            is in device memory.
        error_if_nonfinite: raise if N is NaN or infinite. Synchronises with the device.
        backend: "auto", "triton" or "torch", as for `LARS`.

    Returns:
        N before clipping, as a float64 tensor (float32 on MPS); the host is not synchronised until
        you read its value.

    Raises:
        ValueError: if `max_norm` is negative or NaN.
        TypeError: if `parameters` are no tensors.
        RuntimeError: if a gradient is not a dense floating-point tensor, or if N is not finite and
            `error_if_nonfinite` is True; no gradient is modified.
    """
    largest = _largest(max_norm)
    table.check_choice("backend", backend, table.BACKENDS, "clip_grad_norm_: ")
    raises = table.truth("error_if_nonfinite", error_if_nonfinite, "clip_grad_norm_: ")
    listed = [parameters] if isinstance(parameters, Tensor) else tensors_of(parameters)
    if listed is None:
        raise TypeError(
            f"clip_grad_norm_: parameters is a {type(parameters).__name__}; must be a tensor or "
            "several, such as model.parameters()"
        )
    _check_tensors("clip_grad_norm_", "parameters", listed)
    where = [i for i, p in enumerate(listed) if p.grad is not None]
    grads = [p.grad for p in listed if p.grad is not None]

    def label(i: int) -> str:
        return validate.describe(f"parameters[{where[i]}].grad", grads[i], what="clip_grad_norm_")

    total = _norms(grads, False, backend, label)
    if raises and not torch.isfinite(total):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients is {float(total)}; "
            "set error_if_nonfinite=False to clip anyway"
        )
    if isinstance(largest, Tensor):
        largest = largest.detach().reshape(()).to(total)
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in map(sharding.local, grads):
        by_kind.setdefault((g.device, g.dtype), []).append(g)
    for (device, dtype), same in by_kind.items():
        # On a device, a factor of another dtype would cost one launch per tensor.
        kind = factor.dtype if device.type == "cpu" else dtype
        torch._foreach_mul_(same, factor.to(device, kind))
    return total


def _largest(max_norm: object) -> float | Tensor:
    """`max_norm` as a number, or as a tensor in device memory, which the host does not read."""
    given = max_norm
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_complex():
        if given.device.type != "cpu":
            return given
        given = given.item()
    infinite = isinstance(given, Real) and given == math.inf
    number = math.inf if infinite else table.finite(given)
    if number is None or number < 0:
        raise ValueError(
            f"clip_grad_norm_: max_norm={table.shown(max_norm)} is not allowed; "
            "must be a number >= 0, or a tensor of one"
        )
    return number
