"""Which backend updates which tensor, and why. Pure: launches, warns and raises nothing.

The kernels come first; torch operations update unsupported tensors in the same step, and
`torch_step.divide` chooses between their backends. `report` puts all of it into words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import validate
from .launch import Dtypes
from .tensors import StepTensors

LaunchKey = tuple[torch.device, Dtypes]


class Choice(NamedTuple):
    """Which backend updates a tensor, and why none of those does that come before it."""

    backend: str
    """"triton", or of torch's: "fused", "foreach" or "reference"."""
    refused: tuple[tuple[str, str], ...] = ()
    """Pairs (backend, reason), in the order in which the tensor was offered to them."""


class Partition(NamedTuple):
    """The tensors of a step, by the backend that updates them."""

    launches: dict[LaunchKey, list[int]]
    """The tensors of each kernel launch: one dtype combination on one device."""
    rest: dict[torch.device, list[int]]
    """The tensors left to torch operations, by device."""
    reasons: dict[int, str]
    """Why the kernels do not support each of the latter."""
    wrapped: list[int]
    """Those of the latter among whose tensors is one without memory of its own."""


def objection(w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None) -> str | None:
    """Why the kernels cannot update a tensor, with a remedy; None if they can."""
    named = (("the tensor", w), ("its gradient", g), ("its momentum", v), ("its copy", copy))
    for what, t in named:
        if t is not None and t.dtype not in validate.STORAGE_DTYPES:
            return f"{what} is {t.dtype}; the kernels support {validate.STORAGE_TEXT}"
    for what, t in named:
        if t is not None and not validate.in_memory(t):
            return f"{what} is a {type(t).__name__}, which has no memory of its own"
    if not validate.dense(w):
        return "its elements are not adjacent in memory; use a contiguous parameter"
    for what, t in named[1:]:
        if t is not None and not validate.same_layout(t, w):
            return f"{what} has strides {t.stride()}, the tensor {w.stride()}; use equal strides"
    return None


def divide(
    tensors: StepTensors, backend: str, unavailable: Callable[[torch.device], str | None]
) -> Partition:
    """Assign every tensor to a kernel launch, or to torch operations.

    Args:
        tensors: of one step.
        backend: "auto", "triton" or "torch"; the last assigns everything to torch operations.
        unavailable: why the kernels cannot run on a device; None if they can.
    """
    launches: dict[LaunchKey, list[int]] = {}
    rest: dict[torch.device, list[int]] = {}
    reasons: dict[int, str] = {}
    for i, (w, g, v, copy) in enumerate(zip(*tensors[:4], strict=True)):
        if backend == "torch":
            reason: str | None = "backend='torch' was requested"
        else:
            reason = unavailable(w.device) or objection(w, g, v, copy)
        if reason is None:
            dtypes = Dtypes(
                w.dtype,
                g.dtype,
                torch.float32 if v is None else v.dtype,
                None if copy is None else copy.dtype,
            )
            launches.setdefault((w.device, dtypes), []).append(i)
        else:
            rest.setdefault(w.device, []).append(i)
            reasons[i] = reason
    _join_without_momentum(launches, tensors.buffers)
    wrapped = [
        i for i in reasons
        if not all(t is None or validate.in_memory(t) for t in (c[i] for c in tensors[:4]))
    ]  # fmt: skip
    return Partition(launches, rest, reasons, wrapped)


def report(choices: Mapping[int, Choice], name: Callable[[int], str]) -> list[str]:
    """One line per choice that was made: how many tensors, the first of them by name, and why."""
    by_choice: dict[Choice, list[int]] = {}
    for i, choice in choices.items():
        by_choice.setdefault(choice, []).append(i)
    lines = []
    for (backend, refused), index in sorted(by_choice.items(), key=lambda item: -len(item[1])):
        line = f"{backend}: {len(index)} tensor{'s'[: len(index) > 1]}"
        if refused:
            line += f" ({', '.join(map(name, index[:3]))}{', ...' if len(index) > 3 else ''})"
        lines.append(line + "".join(f"; not {other}, since {why}" for other, why in refused))
    rest = len(lines) - _MOST_LINES
    return lines if rest <= 0 else [*lines[:_MOST_LINES], f"and {rest} more such lines"]


_MOST_LINES = 8


def _join_without_momentum(
    launches: dict[LaunchKey, list[int]], buffers: list[Tensor | None]
) -> None:
    """Tensors without momentum have no momentum dtype, so they join an existing launch."""
    without = [k for k, index in launches.items() if all(buffers[i] is None for i in index)]
    for key in without:
        device, dtypes = key
        for other in launches:
            if other != key and other[0] == device and other[1]._replace(v=dtypes.v) == dtypes:
                launches[other] = sorted(launches[other] + launches.pop(key))
                break
