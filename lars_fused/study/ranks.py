"""The processes of a run: one, or several under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, value: bool) -> bool:
        """The first process's answer, for all."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.int32, device=self.device)
        dist.broadcast(told, 0)
        return bool(told.item())


def alone() -> Ranks:
    """One process, on a GPU where there is one."""
    return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield alone()
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class RunningStatistics:
    """Batch normalisation's running means, as if one process had seen all micro-batches in order.

    After K micro-batches with momentum m a process that began at r₀ is at r = (1−m)ᴷ r₀ + S, where
    S depends on its micro-batches alone. So the ranks can be strung together afterwards: beginning
    with r₀, every rank in order takes r to (1−m)ᴷ r + S.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.ranks = ranks
        self.decay = {1 - (norm.momentum or 0.0) for norm in norms}
        self.buffers = [
            buffer
            for norm in norms
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        self.counts = [n.num_batches_tracked for n in norms if n.num_batches_tracked is not None]
        assert len(self.decay) <= 1, "networks here have one momentum"
        self.start: Tensor | None = None

    def before(self) -> None:
        """To be called before a step's first forward pass."""
        if self.ranks.size > 1 and self.buffers:
            self.start = torch.cat([buffer.flatten() for buffer in self.buffers])

    def after(self, pieces: int) -> None:
        """To be called when this rank has seen its `pieces` micro-batches."""
        if self.start is None:
            return
        mine = torch.cat([buffer.flatten() for buffer in self.buffers])
        counted = torch.tensor([pieces], device=mine.device)
        everyone = [torch.empty_like(mine) for _ in range(self.ranks.size)]
        counts = [torch.empty_like(counted) for _ in range(self.ranks.size)]
        dist.all_gather(everyone, mine)
        dist.all_gather(counts, counted)
        (keep,) = self.decay
        merged = everyone[0]  # its own course, from the common start: exact
        for theirs, count in list(zip(everyone, counts, strict=True))[1:]:
            shrunk = keep ** int(count)
            merged = shrunk * merged + (theirs - shrunk * self.start)
        sizes = [buffer.numel() for buffer in self.buffers]
        for buffer, part in zip(self.buffers, torch.split(merged, sizes), strict=True):
            buffer.copy_(part.view_as(buffer))
        others = sum(int(count) for count in counts) - pieces
        for tracked in self.counts:
            tracked += others
