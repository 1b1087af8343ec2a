"""Memory on the device: what the host sends there, and what the kernels write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout
from . import queue_state


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A table in the memory of a device. On a CPU it is the host's tensor itself."""
    if device.type == "cpu":
        return host
    table = torch.empty(host.shape, dtype=host.dtype, device=device)
    if host.numel():
        pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
        table.copy_(pinned.copy_(host), non_blocking=True)
    return table


@dataclass(frozen=True)
class Memory:
    """What the kernels write, between and during launches; `kernels/layout.py` has the layouts."""

    counter: Tensor
    watch: Tensor
    arrivals: Tensor
    flags: Tensor
    partials: Tensor
    sums: Tensor
    """N(w)², N(g)², N(d)² of each tensor in the last step that was not skipped."""
    ratios: Tensor
    """Likewise its trust ratio q, and γq."""


def new_memory(device: torch.device, tensors: int, slots: int) -> Memory:
    """The memory of a queue that stands at its start. Partial sums that nobody stored are NaN."""

    def full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return Memory(
        counter=full((1,), queue_state.START, torch.int64),
        watch=full((layout.WATCH_WORDS,), 0, torch.int64),
        arrivals=full((tensors,), 0, torch.int32),
        flags=full((tensors,), 0, torch.int64),
        partials=full((max(1, slots), layout.SUM_WORDS), torch.nan, torch.float64),
        sums=full((tensors, layout.SUM_WORDS), 0, torch.float64),
        ratios=full((tensors, layout.RATIO_WORDS), 1, torch.float64),
    )
