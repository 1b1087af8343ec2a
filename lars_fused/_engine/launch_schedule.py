"""What is fixed before a launch has any address: its tensors, their plan, its constants."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels import layout
from . import launch
from .plan import Plan, cached_plan, unpack_items

_ENVIRONMENT_KERNEL = "LARS_FUSED_KERNEL"


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
        """How many programs one launch starts: no more than have something to do."""
        finishers = self.target.row.finishers
        return max(1, min(self.target.programs, self.plan.items.numel() + finishers))

    def items(self) -> torch.Tensor:
        """What one launch reads: the work, and behind it what its finishers do, up to a zero."""
        finishers = self.target.row.finishers
        if finishers == 0:
            return self.plan.items
        ends = torch.zeros(finishers, dtype=torch.int64, device="cpu")
        return torch.cat([self.plan.items, self.plan.finishes, ends])

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of two launches: norms; then updates."""
        kinds = unpack_items(self.plan.items)[0]
        norms = self.plan.items[(kinds & layout.NORM) != 0]
        # Backwards, since the data read last is still cached.
        return norms, self.plan.items[(kinds & layout.UPDATE) != 0].flip(0)


def schedule(
    device: torch.device, dtypes: launch.Dtypes, contents: Contents, alone: bool = True
) -> Schedule:
    """The schedule for a device; equal tensors share a plan.

    `alone`: whether one launch may take the whole device. `lars_resident` does, and waits until it
    can: beside a backward pass it would be late, and beside collectives that wait for one another
    across devices it could keep one of them out.
    """
    target = _target(device, dtypes, contents.numels) if alone else launch.target(device)
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


def _target(device: torch.device, dtypes: launch.Dtypes, numels: Sequence[int]) -> launch.Target:
    """`lars_resident` for lists that suit it, where the device has it; or as the user says."""
    asked = os.environ.get(_ENVIRONMENT_KERNEL)
    if asked not in (None, "lars_step", "lars_resident"):
        raise ValueError(
            f"{_ENVIRONMENT_KERNEL}={asked} is not allowed; must be lars_step or lars_resident, "
            "or unset for the choice by architecture and list"
        )
    if asked == "lars_step":
        return launch.target(device)
    resident = launch.resident_target(device)
    if resident is None:
        if asked == "lars_resident":
            name = launch.architecture(device)[0]
            raise ValueError(
                f"{_ENVIRONMENT_KERNEL}={asked} is not allowed on {name}, which has no such "
                "kernel; unset it, or use lars_step"
            )
        return launch.target(device)
    if asked == "lars_resident" or launch.suits_rings(resident, dtypes, numels):
        return resident
    return launch.target(device)


def forced_kernel(name: str) -> contextlib.AbstractContextManager[None]:
    """Within the block every new schedule is for this kernel, lars_step or lars_resident."""
    return environment(_ENVIRONMENT_KERNEL, name)


@contextlib.contextmanager
def environment(variable: str, value: str) -> Iterator[None]:
    """Within the block a variable of the environment has this value."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
