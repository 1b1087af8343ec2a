"""Tables in device memory, and the launches that read them.

A `LaunchTables` is one list of tensors of one dtype combination on one device: the plan of its work
items, the tables that the kernels read, the self-resetting counters. It is built once; a step
compares addresses and hyper-parameters with what the device already has and uploads what changed.

Uploads come from fresh pinned memory, which PyTorch's host allocator does not reuse until the copy
is done, and launches follow them on the stream, so that no step in flight is disturbed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import layout
from ..options import Options, group_row
from . import launch, queue_state
from .plan import cached_plan, unpack_items
from .tensors import Addresses, Scaling

_ENVIRONMENT_LAUNCHES = "LARS_FUSED_LAUNCHES"
_ADDRESS_WORDS = (layout.W_AT, layout.G_AT, layout.V_AT, layout.COPY_AT)


class Contents(NamedTuple):
    """What the plan depends on: properties of the tensors of one launch, by index."""

    numels: tuple[int, ...]
    adapt: tuple[bool, ...]
    groups: tuple[int, ...]
    """The row of each tensor's hyper-parameters."""
    fresh: tuple[bool, ...]
    """Whether a tensor's next step is its first."""
    n_groups: int


def _integers(values: Sequence[int]) -> Tensor:
    """A table column on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class LaunchTables:
    """One list of tensors of one dtype combination on one device, ready to be stepped."""

    def __init__(
        self,
        device: torch.device,
        dtypes: launch.Dtypes,
        contents: Contents,
        *,
        staged: bool = False,
        halves: bool = False,
    ):
        """Make every table, so that no step has to.

        Args:
            device: of all tensors.
            dtypes: of all tensors.
            contents: the tensors.
            staged: for a step under graph capture, which may not allocate pinned memory.
            halves: `norms` and `update` will be called separately, whatever the architecture.
        """
        tuning = launch.kernels().tuning
        architecture, multiprocessors, l2_bytes = launch.architecture(device)
        self.device, self.dtypes, self.row = device, dtypes, tuning.row_for(architecture)
        programs = multiprocessors * self.row.programs
        window = self.row.window
        if window is None:
            window = int(l2_bytes * tuning.WINDOW_SHARE)
        self.plan = cached_plan(
            contents.numels,
            contents.adapt,
            contents.groups,
            chunk=self.row.chunk,
            window=window,
            lag=int(programs * self.row.lag),
            order=self.row.order,
            span=(launch.slots(dtypes, self.row) - 2) * programs,
            bytes_per_element=dtypes.w.itemsize + (0 if dtypes.g is None else dtypes.g.itemsize),
        )
        self.launches = _launches(self.row.launches)
        self.programs = max(1, min(programs, self.plan.items.numel()))
        self._stream: torch.cuda.Stream | None = None
        self._options: Sequence[Options] | None = None  # as the device has them

        n = len(contents.numels)
        self._addresses: Addresses | None = None  # as the device has them
        self._host = torch.zeros(n, layout.TENSOR_WORDS, dtype=torch.int64, device="cpu")
        self._host[:, layout.NUMEL] = _integers(contents.numels)
        self._host[:, layout.SLOT] = _integers(self.plan.slots)
        self._host[:, layout.GROUP] = _integers(contents.groups)
        self._fresh = _integers(contents.fresh) * layout.FRESH
        self._host_groups = torch.zeros(
            contents.n_groups, layout.GROUP_WORDS, dtype=torch.float64, device="cpu"
        )

        on: dict[str, Any] = {"device": device}
        slots = max(1, self.plan.n_slots)
        self.items = self._on_device(self.plan.items)
        self.tensors = self._on_device(self._host)
        self.groups = self._on_device(self._host_groups)
        self.counter = torch.full((1,), queue_state.START, dtype=torch.int64, **on)
        self.watch = torch.zeros(layout.WATCH_WORDS, dtype=torch.int64, **on)
        self.arrivals = torch.zeros(n, dtype=torch.int32, **on)
        self.flags = torch.zeros(n, dtype=torch.int64, **on)
        self.partials = torch.full((slots, layout.SUM_WORDS), torch.nan, dtype=torch.float64, **on)
        self.sums = torch.zeros(n, layout.SUM_WORDS, dtype=torch.float64, **on)
        self.ratios = torch.ones(n, layout.RATIO_WORDS, dtype=torch.float64, **on)
        self.one = torch.ones(1, dtype=torch.float32, **on)
        self.zero = torch.zeros(1, dtype=torch.float32, **on)
        self.norm_items = self.update_items = self.items[:0]
        if halves or self.launches == 2:
            kinds = unpack_items(self.plan.items)[0]
            norm_items = self.plan.items[(kinds & layout.NORM) != 0]
            # Backwards, since the data read last is still cached.
            update_items = self.plan.items[(kinds & layout.UPDATE) != 0].flip(0)
            self.norm_items = self._on_device(norm_items)
            self.update_items = self._on_device(update_items)
        # Each replay of a captured step copies from its staging memory again: never reuse it.
        self._staging = {
            table.data_ptr(): torch.empty_like(table, device="cpu", pin_memory=True)
            for table in ((self.tensors, self.groups) if staged else ())
        }

    # ------------------------------------------------------------------ tables

    def _on_device(self, host: Tensor) -> Tensor:
        """A table on the device. On a CPU it is the host tensor itself."""
        if self.device.type == "cpu":
            return host
        table = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._upload(table, host)
        return table

    def _upload(self, table: Tensor, host: Tensor) -> None:
        if table.data_ptr() == host.data_ptr() or host.numel() == 0:
            return
        if launch.capturing(self.device):
            pinned = self._staging[table.data_ptr()]
        else:
            pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
        pinned.copy_(host)
        table.copy_(pinned, non_blocking=True)

    def fill(self, addresses: Addresses, options: Sequence[Options]) -> None:
        """Bring the tables up to date: addresses by tensor, hyper-parameters by group."""
        self.point(addresses)
        self.set_groups(options)

    def point(self, addresses: Addresses) -> None:
        """Set the addresses of all tensors and upload the rows that changed."""
        if addresses == self._addresses:
            return
        self._order_streams()
        before = self._host.clone()
        known: Sequence[list[int] | None] = self._addresses or [None] * len(_ADDRESS_WORDS)
        for at, old, new in zip(_ADDRESS_WORDS, known, addresses, strict=True):
            if new != old:
                self._host[:, at] = _integers(new) if new else 0
        self._addresses = addresses
        aligned = ((self._host[:, : layout.NUMEL] % 16) == 0).all(1)
        self._host[:, layout.FLAGS] = aligned * layout.ALIGNED + self._fresh
        rows = (self._host != before).any(1).nonzero()
        if rows.numel():
            first, last = int(rows[0]), int(rows[-1]) + 1
            if launch.capturing(self.device):
                first, last = 0, len(self._host)
            self._upload(self.tensors[first:last], self._host[first:last])

    def set_groups(self, options: Sequence[Options]) -> None:
        """Set the hyper-parameters of all groups; uploads them if any changed.

        A list object is read only once: any change, even of a learning rate in a tensor, comes in a
        new list.
        """
        if options is self._options:
            return
        rows = [group_row(o, self.device) for o in options]
        words = torch.tensor([numbers for numbers, _ in rows], dtype=torch.float64, device="cpu")
        integers = words.view(torch.int64)
        for word in (layout.LR_AT, layout.SWITCHES):
            integers[:, word] = _integers([row[word] for _, row in rows])
        if self._options is None or not torch.equal(
            words.view(torch.int64), self._host_groups.view(torch.int64)
        ):
            self._order_streams()
            self._host_groups.copy_(words)
            self._upload(self.groups, self._host_groups)
        self._options = options

    def _order_streams(self) -> None:
        """Order this step after the last one if the current stream has changed since."""
        if self.device.type != "cuda" or launch.capturing(self.device):
            return
        current = torch.cuda.current_stream(self.device)
        if self._stream is not None and current != self._stream:
            current.wait_stream(self._stream)
            for table in self.tables():
                table.record_stream(current)
        self._stream = current

    def tables(self) -> list[Tensor]:
        """Every tensor in device memory that a launch touches."""
        return [
            self.items, self.norm_items, self.update_items, self.tensors, self.groups,
            self.counter, self.watch, self.arrivals, self.flags, self.partials, self.sums,
            self.ratios, self.one, self.zero,
        ]  # fmt: skip

    # ---------------------------------------------------------------- launches

    def step(self, scaling: Scaling) -> None:
        """Norms and updates: one launch, or two if the architecture's row says so."""
        if self.launches == 2:
            self.norms(scaling)
            self.update(scaling)
            return
        grad_scale, found_inf = self._scaling(scaling)
        if self.items.numel() == 0:  # other ranks hold all of these tensors
            queue_state.count_step(self.counter, self.watch, found_inf)
            return
        self._order_streams()
        args = (
            self.items, self.tensors, self.groups, self.counter, self.watch, self.arrivals,
            self.flags, self.partials, self.sums, self.ratios, grad_scale, found_inf,
            self.items.numel(),
        )  # fmt: skip
        name = "lars_resident" if self.row.order == "resident" else "lars_step"
        launch.run(name, self.programs, args, self.dtypes, self.row, self.device)

    def norms(self, scaling: Scaling) -> None:
        """The first of two launches: fill `sums`."""
        if self.norm_items.numel() == 0:
            return
        self._order_streams()
        args = (
            self.norm_items, self.tensors, self.groups, self.arrivals, self.partials, self.sums,
            self._scaling(scaling)[0],
        )  # fmt: skip
        launch.run("l2norm", self.norm_items.numel(), args, self.dtypes, self.row, self.device)

    def update(self, scaling: Scaling) -> None:
        """The second of two launches: update from `sums`."""
        grad_scale, found_inf = self._scaling(scaling)
        if self.update_items.numel() == 0:
            queue_state.count_step(self.counter, self.watch, found_inf)
            return
        self._order_streams()
        args = (
            self.update_items, self.tensors, self.groups, self.counter, self.watch, self.sums,
            self.ratios, grad_scale, found_inf,
        )  # fmt: skip
        launch.run(
            "lars_update", self.update_items.numel(), args, self.dtypes, self.row, self.device
        )

    def _scaling(self, scaling: Scaling) -> tuple[Tensor, Tensor]:
        scale, flag = scaling
        return self.one if scale is None else scale, self.zero if flag is None else flag

    def recover(self) -> bool:
        """Reset the queue after a failed launch; return True if no work was done."""
        if self.device.type != "cpu":  # it raised on the host, before the launch
            return True
        return queue_state.reset(self.counter, self.arrivals)

    def steps_taken(self) -> int:
        """How many steps found_inf did not skip. Synchronises with the device."""
        return queue_state.steps_taken(self.counter)

    def check_queue(self) -> None:
        """Raise if a launch skipped work because the queue was not at its start.

        Waits for the device, so it is asked where the host does so anyway.
        """
        queue_state.check(self.counter, self.watch)


def _launches(preferred: int) -> int:
    """Launches per step: as set in the environment, or the architecture's choice."""
    launches = int(os.environ.get(_ENVIRONMENT_LAUNCHES, preferred))
    if launches not in (1, 2):
        raise ValueError(f"{_ENVIRONMENT_LAUNCHES}={launches} is not allowed; must be 1 or 2")
    return launches


@contextlib.contextmanager
def forced_launches(count: int) -> Iterator[None]:
    """Within the block every new `LaunchTables` uses this number of launches, 1 or 2."""
    before = os.environ.get(_ENVIRONMENT_LAUNCHES)
    os.environ[_ENVIRONMENT_LAUNCHES] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ENVIRONMENT_LAUNCHES]
        else:
            os.environ[_ENVIRONMENT_LAUNCHES] = before
