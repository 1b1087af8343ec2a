"""L2 norms of many tensors, and clipping by the global norm, without a host synchronisation."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import checks, launch, portable, sharding, tables
from .reference import Options

_NORM_OPTIONS = Options(weight_decay=0.0)
_KEPT_LISTS = 8
_kept = threading.local()  # two threads may ask for the norms of the same shapes at once


def multi_tensor_l2norm(
    tensors: Sequence[Tensor], per_tensor: bool = True, *, backend: str = "auto"
) -> Tensor:
    """L2 norms of tensors, in one launch for each device and dtype.

    N(x) = sqrt(Σ x²), summed in fp32 within a block and float64 beyond, and right from the smallest
    to the largest magnitude of the dtype.

    Args:
        tensors: floating-point tensors of any shape and strides.
        per_tensor: True for one norm a tensor, False for the norm of all of them together.
        backend: "auto", "triton" or "torch", as for `LARS`. While a CUDA graph is captured the
            portable path runs.

    Returns:
        float64 on the first tensor's device (float32 on MPS): shape [len(tensors)], or [] with
        `per_tensor=False`. An empty list gives an empty tensor, or 0.

    Raises:
        TypeError, RuntimeError: for tensors that are not dense floating-point tensors, or that
            backend="triton" does not take.
    """
    checks.check_choice("backend", backend, checks.BACKENDS, "multi_tensor_l2norm: ")
    tensors = list(tensors)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"multi_tensor_l2norm: tensors[{i}] is a {type(t).__name__}; must be a tensor"
            )
        checks.check_readable(t, f"tensors[{i}]")
        sharding.check(t, {}, partial(checks.describe, f"tensors[{i}]", t))
    if not tensors:
        return torch.zeros([0] if per_tensor else [], dtype=torch.float64, device="cpu")
    squares = _squares([sharding.local(t.detach()) for t in tensors], backend)
    sharding.Shards(tensors).add_up_squares(squares)
    return squares.sqrt() if per_tensor else squares.sum().sqrt()


def _squares(tensors: list[Tensor], backend: str) -> Tensor:
    home = tensors[0].device
    found: list[Tensor | None] = [None] * len(tensors)
    taken: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        reason = "forced" if backend == "torch" else _why_not(t.device)
        if reason is None and t.dtype not in checks.STORAGE_DTYPES:
            reason = f"it is {t.dtype}; the kernels take float32, float16 and bfloat16"
        if reason is None and not checks.dense(t):
            reason = "its elements are not adjacent in memory; use a contiguous tensor"
        if reason is None:
            taken.setdefault((t.device, t.dtype), []).append(i)
        elif backend == "triton":
            raise RuntimeError(
                f"{checks.describe(f'tensors[{i}]', t)}: backend='triton' cannot read it: {reason}"
            )
        else:
            found[i] = portable.squared_norm(t).to(home)
    for (device, dtype), index in taken.items():
        sums = _sums_of_squares(device, dtype, [tensors[i] for i in index])
        if len(index) == len(tensors):
            return sums
        for i, square in zip(index, sums.to(home), strict=True):
            found[i] = square
    return torch.stack([f for f in found if f is not None])


def _why_not(device: torch.device) -> str | None:
    if launch.capturing(device):
        return "a CUDA graph is being captured, for which no tables are kept; use backend='torch'"
    return launch.why_not(device)


def _sums_of_squares(device: torch.device, dtype: torch.dtype, tensors: list[Tensor]) -> Tensor:
    """One launch. The tables of the last few lists of shapes are kept: gradients come again."""
    numels = tuple(t.numel() for t in tensors)
    row = launch.kernels().tuning.row_for(launch.architecture(device)[0])
    works = _kept.__dict__.setdefault("works", {})
    # Taken out while it is at work: what an exception leaves behind is not used again.
    work = works.pop((device, dtype, numels, row), None)
    n = len(tensors)
    if work is None:
        dtypes = launch.Dtypes(dtype, None, torch.float32)
        work = tables.Work(device, dtypes, numels, [False] * n, [0] * n, [False] * n, 1)
        options, address = tables.group_row(_NORM_OPTIONS, device)
        work.set_groups([options], [address])
    work.point([t.data_ptr() for t in tensors], [0] * n, [0] * n, [0] * n)
    work.norms()
    sums: Tensor = work.sums[:, 0].clone()
    while len(works) >= _KEPT_LISTS:
        works.pop(next(iter(works)))
    works[device, dtype, numels, row] = work
    return sums


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    error_if_nonfinite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    g = g · min(1, max_norm / (N + 1e-6)) with N the norm over all gradients, as
    `torch.nn.utils.clip_grad_norm_`, which this replaces.

    Args:
        parameters: tensors whose `.grad` is to be clipped; those without one are passed over.
        max_norm: largest norm allowed, >= 0.
        error_if_nonfinite: raise if N is NaN or infinite. Waits for the device.
        backend: "auto", "triton" or "torch", as for `LARS`.

    Returns:
        N before clipping, as a tensor: no host synchronisation unless it is turned into a number.

    Raises:
        ValueError: if `max_norm` is negative or NaN.
        RuntimeError: if N is not finite and `error_if_nonfinite` is True; nothing is changed.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm >= 0:
        raise ValueError(
            f"clip_grad_norm_: max_norm={max_norm!r} is not allowed; must be a number >= 0"
        )
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    total = multi_tensor_l2norm(grads, per_tensor=False, backend=backend)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients is {float(total)}; "
            "set error_if_nonfinite=False to clip all the same"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in map(sharding.local, grads):
        by_kind.setdefault((g.device, g.dtype), []).append(g)
    for (device, _), same in by_kind.items():
        torch._foreach_mul_(same, factor.to(device))
    return total
