"""Checks that all ranks hold the same parameters and options in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from . import sharding
from .parameters import Groups

_Value = TypeVar("_Value")


def check_same_on_all_ranks(optimizer: Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank unless the optimizer is the same on all of them.

    Compared are what runs the steps (`optimizer.backend`: after a step what ran it, before the
    first one what is expected) with which versions of torch and triton, the number of groups, their
    options, and each parameter's place, name (where the optimizer was given names), shape, dtype
    and placements. A collective call: every rank of
    `group` has to make it, or those that do wait until the group's timeout. Two small messages a
    rank; call it once, after construction.

    The first step with sharded parameters and `overlap_with_backward` do it automatically. A plain
    `LARS` cannot: it does not know which ranks should have the same parameters (stages of a
    pipeline do not), nor which of them will step.

    Args:
        optimizer: any optimizer.
        group: the ranks to compare; None for all.

    Raises:
        RuntimeError: naming the first difference and the ranks that differ.
    """
    compare(optimizer.param_groups, group, runs=_runs(optimizer))


def _runs(optimizer: Optimizer) -> list[str]:
    backend = getattr(optimizer, "backend", None)
    if backend is None:
        return []
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return [f"the steps run on backend {backend!r} (torch {torch.__version__}, triton {triton})"]


def compare(
    groups: Groups,
    group: dist.ProcessGroup | None,
    only: set[int] | None = None,
    runs: Sequence[str] = (),
) -> None:
    """`check_same_on_all_ranks`, of the parameters with the ids `only` where it is given."""
    if dist.get_rank(group) < 0:
        return
    lines = [*runs, *_describe(groups, only)]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).digest()
    digests = _gather(digest, group)
    if all(other == digest for other in digests):
        return
    message = _first_difference(_gather(lines, group))
    raise RuntimeError(f"LARS: the ranks disagree: {message}")


def _gather(value: _Value, group: dist.ProcessGroup | None) -> list[_Value]:
    found = [value] * dist.get_world_size(group)  # each is overwritten
    dist.all_gather_object(found, value, group=group)
    return found


def _describe(groups: Groups, only: set[int] | None) -> list[str]:
    """One line per group and per parameter, in order."""
    lines = []
    for g, group in enumerate(groups):
        names = group.get("param_names")
        options = {
            key: value
            for key, value in sorted(group.items())
            if key not in ("params", "param_names") and not isinstance(value, Tensor)
        }
        lines.append(f"param_groups[{g}] has {len(group['params'])} parameters and {options}")
        for i, p in enumerate(group["params"]):
            if only is not None and id(p) not in only:
                continue
            name = f"{names[i]!r}, " if names else ""
            where = sharding.layout(p)
            placed = "" if where is None else f", {where.placements}"
            dtype = str(p.dtype).removeprefix("torch.")
            shape = tuple(torch.Size(p.shape))
            lines.append(f"param_groups[{g}]['params'][{i}] is {name}{shape} {dtype}{placed}")
    return lines


def _first_difference(everyone: list[list[str]]) -> str:
    # Parameters before groups: the first of them that differs says more than two counts do.
    for kind in ("]['params'][", "] has ", "the steps run on"):
        kept = [[line for line in lines if kind in line] for lines in everyone]
        for at in range(max(map(len, kept))):
            seen: dict[str, list[int]] = {}
            for rank, lines in enumerate(kept):
                seen.setdefault(lines[at] if at < len(lines) else "", []).append(rank)
            if len(seen) > 1:
                return "; ".join(
                    f"{line or 'there is no such parameter'} on rank{'s'[: len(ranks) > 1]} "
                    f"{', '.join(map(str, ranks))}"
                    for line, ranks in seen.items()
                )
    return "in the number of parameter groups"
