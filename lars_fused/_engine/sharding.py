"""Sharded parameters: DTensors, as made by FSDP2's `fully_shard` and by tensor parallelism.

A rank updates its own shard; only squared norms cross ranks, so that no parameter is ever gathered:

    placements      mesh (replicate, shard)      reduced over    counted by
    Shard(any dim)  every rank holds a part      that dimension  every rank
    Replicate       every rank holds all of it   -               the first rank along the dimension
    Partial         refused: its reduction is still pending
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..options import Options

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_COLUMN = {"sum": 1, "decayed": 2, "gradient": 1}  # the column of [N(w)², N(g)², N(d)²] that D uses


class Layout(NamedTuple):
    """How a DTensor is distributed."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def split(self) -> tuple[int, ...]:
        """The mesh dimensions that split its elements."""
        return tuple(
            dim
            for dim, placement in enumerate(self.placements)
            if not placement.is_replicate() and self.mesh.size(dim) > 1
        )


def layout(t: Tensor | None) -> Layout | None:
    """None for an ordinary tensor."""
    # A DTensor cannot exist unless its module is already imported; importing it takes as long as
    # importing torch.
    module = sys.modules.get("torch.distributed.tensor")
    if t is None or module is None or not isinstance(t, module.DTensor):
        return None
    wrapper = cast("DTensor", t)
    return Layout(wrapper.device_mesh, tuple(wrapper.placements))


def gradient_norm_known(p: Tensor, o: Options) -> bool:
    """Whether a step of `p` with these options finds out N(g)."""
    where = layout(p)
    return where is None or not where.split() or _COLUMN[o.denominator] == 1


@overload
def local(t: Tensor) -> Tensor: ...
@overload
def local(t: Tensor | None) -> Tensor | None: ...
def local(t: Tensor | None) -> Tensor | None:
    """This rank's part of a DTensor, sharing its memory; any other tensor (or None) as it is."""
    if layout(t) is None:
        return t
    with torch.no_grad():
        part: Tensor = cast("DTensor", t).to_local()
    return part.wait() if hasattr(part, "wait") else part  # a collective may still be running


def like(p: Tensor, part: Tensor) -> Tensor:
    """`part` as a DTensor with the layout of `p`; `part` itself if `p` is a plain tensor."""
    where = layout(p)
    if where is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, where.mesh, where.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def shard_of(p: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every rank has in full, with the layout of `p`. No communication."""
    where = layout(p)
    if where is None or layout(whole) is not None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(local(p).device), where.mesh, where.placements, src_data_rank=None
    )


def check(p: Tensor, others: dict[str, Tensor | None], label: Callable[[], str]) -> None:
    """Raise unless gradient and state are distributed like the parameter."""
    if getattr(p, "_fsdp_flattened", False):
        raise RuntimeError(
            f"{label()}: belongs to FullyShardedDataParallel (FSDP1), whose parameters are pieces "
            "of flat buffers, not layers; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    where = layout(p)
    if where is not None and any(placement.is_partial() for placement in where.placements):
        raise RuntimeError(
            f"{label()}: its placements {where.placements} include a pending reduction; "
            "parameters must be Shard or Replicate"
        )
    for what, t in others.items():
        if t is None or layout(t) == where:
            continue
        its = layout(t)
        if where is None:
            raise RuntimeError(
                f"{label()}: its {what} is a DTensor, the parameter is not; use the {what}'s "
                "full_tensor(), or load with torch.distributed.checkpoint.state_dict"
            )
        remedy = (
            f"redistribute the {what} to the parameter's placements before step()"
            if its is not None
            else f"make the {what} a DTensor with the parameter's mesh and placements"
        )
        raise RuntimeError(
            f"{label()}: its {what} is {'a plain tensor' if its is None else its.placements} but "
            f"the parameter is {where.placements} on {where.mesh}; {remedy}"
        )


class _Exchange:
    """The tensors that are split across one mesh, and how their sums are reduced."""

    def __init__(self, mesh: DeviceMesh, layouts: dict[int, Layout]):
        self.at = {tensor: row for row, tensor in enumerate(layouts)}
        dims = sorted({dim for lay in layouts.values() for dim in lay.split()})
        # A tensor that is replicated along a dimension is counted once there, not once per rank.
        place = mesh.get_coordinate() or ()
        self.silent = [
            self.at[tensor]
            for tensor, lay in layouts.items()
            if any(place[dim] != 0 for dim in dims if dim not in lay.split())
        ]
        ranks = 1
        for dim in dims:
            ranks *= mesh.size(dim)
        # One collective if an existing group has exactly these ranks; creating a group here could
        # wait for ranks that never join.
        if len(dims) > 1 and ranks == dist.get_world_size():
            self.groups: list[dist.ProcessGroup | None] = [dist.group.WORLD]
        else:
            self.groups = [mesh.get_group(dim) for dim in dims]
        self._on_device: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def _constant(self, values: list[int], device: torch.device) -> Tensor:
        """An index on the device, uploaded once: later steps must not wait for a copy."""
        key = tuple(values), device
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._on_device[key]

    def add_up(self, tables: Sequence[tuple[list[int], Tensor]], columns: list[list[int]]) -> None:
        """Replace, in tables [tensor, column], the named columns by their sums over the ranks."""
        width, device = len(columns[0]), tables[0][1].device
        plan = []
        for index, table in tables:
            here = [(row, t) for row, t in enumerate(index) if t in self.at]
            if here:
                source = [row * table.shape[1] + c for row, t in here for c in columns[t]]
                goal = [self.at[t] * width + k for _, t in here for k in range(width)]
                device = table.device
                indices = self._constant(source, device), self._constant(goal, device)
                plan.append((table.view(-1), *indices))
        sent = torch.zeros(len(self.at) * width, dtype=tables[0][1].dtype, device=device)
        for flat, source_at, goal_at in plan:
            sent.index_copy_(0, goal_at, flat.index_select(0, source_at))
        if self.silent:
            silent = self._constant(self.silent, device)
            sent.view(-1, width).index_fill_(0, silent, 0.0)
        for group in self.groups:
            dist.all_reduce(sent, group=group)
        for flat, source_at, goal_at in plan:
            flat.index_copy_(0, source_at, sent.index_select(0, goal_at))

    def blank(self, tables: Sequence[tuple[list[int], Tensor]], columns: dict[int, int]) -> None:
        """Set a column that was not reduced to NaN: its local values are meaningless."""
        for index, table in tables:
            cells = [
                row * table.shape[1] + columns[t] for row, t in enumerate(index) if t in self.at
            ]
            if cells:
                table.view(-1).index_fill_(0, self._constant(cells, table.device), torch.nan)


class Shards:
    """Which tensors of a list are split across ranks. False if none is."""

    def __init__(self, tensors: Sequence[Tensor]):
        by_mesh: dict[DeviceMesh, dict[int, Layout]] = {}
        for i, t in enumerate(tensors):
            where = layout(t)
            if where is not None and where.split() and where.mesh.get_coordinate() is not None:
                by_mesh.setdefault(where.mesh, {})[i] = where
        self._exchanges = [_Exchange(mesh, layouts) for mesh, layouts in by_mesh.items()]
        self._split = {i for layouts in by_mesh.values() for i in layouts}

    def __bool__(self) -> bool:
        return bool(self._split)

    def among(self, index: list[int]) -> bool:
        """Whether any of these tensors is split."""
        return bool(self._split) and not self._split.isdisjoint(index)

    def groups(self) -> list[tuple[dist.ProcessGroup | None, list[int]]]:
        """Pairs (process group, the tensors whose sums it reduces), in the order of use."""
        return [(group, list(x.at)) for x in self._exchanges for group in x.groups]

    def on_any_rank(self, here: bool, device: torch.device) -> bool:
        """Whether something is true on a rank that shares a tensor. Waits for the device."""
        for group, _ in self.groups():
            flag = torch.full((1,), float(here), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            here = bool(flag)
        return here

    def add_up(
        self, tables: Sequence[tuple[list[int], Tensor]], options: Sequence[Options]
    ) -> None:
        """Turn local rows [N(w)², N(g)², N(d)²] into those of whole layers.

        One all-reduce per mesh, of two numbers per layer: N(w)² and the norm in the denominator.
        The third becomes NaN.

        Args:
            tables: (the tensors' numbers, their rows).
            options: of each tensor.
        """
        columns = [[0, _COLUMN[o.denominator]] for o in options]
        rest = {i: 3 - column for i, (_, column) in enumerate(columns)}
        for exchange in self._exchanges:
            exchange.add_up(tables, columns)
            exchange.blank(tables, rest)

    def add_up_squares(self, squares: Tensor) -> None:
        """The same for one squared norm a tensor, in place."""
        everything = list(range(len(squares)))
        for exchange in self._exchanges:
            exchange.add_up([(everything, squares.unsqueeze(1))], [[0]] * len(squares))
