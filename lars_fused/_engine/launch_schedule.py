"""What is fixed before a launch has any address: its tensors, their plan, its constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels import layout
from . import launch
from .plan import Plan, cached_plan, unpack_items


class Contents(NamedTuple):
    """What the plan depends on: properties of the tensors of one launch, by index."""

    numels: tuple[int, ...]
    adapt: tuple[bool, ...]
    groups: tuple[int, ...]
    """The row of each tensor's hyper-parameters."""
    fresh: tuple[bool, ...]
    """Whether a tensor's next step is its first."""
    n_groups: int


@dataclass(frozen=True)
class Schedule:
    """The plan for one list of tensors of one dtype combination on one device."""

    device: torch.device
    dtypes: launch.Dtypes
    target: launch.Target
    plan: Plan

    @property
    def programs(self) -> int:
        """How many programs one launch starts: no more than there are items."""
        return max(1, min(self.target.programs, self.plan.items.numel()))

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of two launches: norms; then updates."""
        kinds = unpack_items(self.plan.items)[0]
        norms = self.plan.items[(kinds & layout.NORM) != 0]
        # Backwards, since the data read last is still cached.
        return norms, self.plan.items[(kinds & layout.UPDATE) != 0].flip(0)


def schedule(device: torch.device, dtypes: launch.Dtypes, contents: Contents) -> Schedule:
    """The schedule for a device; equal tensors share a plan."""
    target = launch.target(device)
    plan = cached_plan(
        contents.numels,
        contents.adapt,
        contents.groups,
        chunk=target.row.chunk,
        window=target.window,
        lag=int(target.programs * target.row.lag),
        order=target.row.order,
        span=launch.held_chunks(target, dtypes),
        bytes_per_element=launch.bytes_per_element(dtypes),
    )
    return Schedule(device, dtypes, target, plan)
