"""Tables in device memory, and the steps that use them.

A `Work` is one list of tensors of one dtype combination on one device: the plan of its work items,
the tables that the kernels read, the counters that reset themselves. It is built once; a step
compares addresses and hyper-parameters with what the device already has and uploads what changed.

Uploads come from fresh pinned memory whose reuse PyTorch's host allocator holds back until the copy
is done, and launches are ordered after them on the stream, so that no step in flight is disturbed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch
from .plan import NORM, UPDATE, Plan, make_plan, unpack_items

_ENVIRONMENT_LAUNCHES = "LARS_FUSED_LAUNCHES"
DENOMINATOR_CODES = {"sum": 0, "decayed": 1, "gradient": 2}


@functools.lru_cache(maxsize=64)
def _cached_plan(numels: tuple[int, ...], adapt: tuple[bool, ...], **sizes: Any) -> Plan:
    return make_plan(numels, adapt, **sizes)


def _integers(values: Sequence[int]) -> Tensor:
    """A table column on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class Work:
    """One list of tensors of one dtype combination on one device, ready to be stepped."""

    def __init__(
        self,
        device: torch.device,
        dtypes: launch.Dtypes,
        numels: Sequence[int],
        adapt: Sequence[bool],
        groups: Sequence[int],
        fresh: Sequence[bool],
        n_groups: int,
        staged: bool = False,
    ):
        """`staged`: for a step under graph capture, which may not allocate pinned memory."""
        tuning, tile = launch.kernels().tuning, launch.kernels().tile
        architecture, multiprocessors, l2_bytes = launch.architecture(device)
        self.device, self.dtypes, self.row = device, dtypes, tuning.row_for(architecture)
        programs = multiprocessors * self.row.programs
        window = self.row.window
        if window is None:
            window = int(l2_bytes * tuning.WINDOW_SHARE)
        self.plan = _cached_plan(
            tuple(numels),
            tuple(adapt),
            chunk=self.row.chunk,
            window=window,
            in_flight=programs,
            bytes_per_element=dtypes.w.itemsize + (0 if dtypes.g is None else dtypes.g.itemsize),
        )
        self.launches = int(os.environ.get(_ENVIRONMENT_LAUNCHES, self.row.launches))
        if self.launches not in (1, 2):
            raise ValueError(
                f"{_ENVIRONMENT_LAUNCHES}={self.launches} is not allowed; must be 1 or 2"
            )
        self.programs = max(1, min(programs, self.plan.items.numel()))

        n = len(numels)
        self._stream: Any = None
        self._columns: dict[int, list[int]] = {}
        self._group_rows: list[list[float]] = []
        self._lr_addresses: list[int] = []
        self._host = torch.zeros(n, tile.TENSOR_WORDS.value, dtype=torch.int64, device="cpu")
        self._host[:, tile.NUMEL.value] = _integers(numels)
        self._host[:, tile.SLOT.value] = _integers(self.plan.slots)
        self._host[:, tile.GROUP.value] = _integers(groups)
        self._fresh = _integers(fresh) * tile.FRESH.value
        self._host_groups = torch.zeros(
            n_groups, tile.GROUP_WORDS.value, dtype=torch.float64, device="cpu"
        )

        on: dict[str, Any] = {"device": device}
        self.items = self.plan.items if device.type == "cpu" else self._upload_new(self.plan.items)
        self.tensors = self._host if device.type == "cpu" else self._upload_new(self._host)
        self.groups = (
            self._host_groups if device.type == "cpu" else torch.empty_like(self._host_groups, **on)
        )
        self.counter = torch.full((1,), 1 << 32, dtype=torch.int64, **on)  # epoch 1, ticket 0
        self.arrivals = torch.zeros(n, dtype=torch.int32, **on)
        self.flags = torch.zeros(n, dtype=torch.int64, **on)
        self.partials = torch.full(
            (max(1, self.plan.n_slots), 3), torch.nan, dtype=torch.float64, **on
        )
        self.sums = torch.zeros(n, 3, dtype=torch.float64, **on)
        self.ratios = torch.ones(n, 2, dtype=torch.float64, **on)
        # Every replay of a captured step copies from its staging memory again: it is never reused.
        self._staging = {}
        if staged:
            for table in (self.tensors, self.groups):
                self._staging[table.data_ptr()] = torch.empty_like(
                    table, device="cpu", pin_memory=True
                )
        self.one = torch.ones(1, dtype=torch.float32, **on)
        self.zero = torch.zeros(1, dtype=torch.float32, **on)

    # ------------------------------------------------------------------ tables

    def _upload_new(self, host: Tensor) -> Tensor:
        device = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._upload(device, host)
        return device

    def _upload(self, device: Tensor, host: Tensor) -> None:
        if (
            device.data_ptr() == host.data_ptr() or host.numel() == 0
        ):  # the CPU's table is the table
            return
        if launch.capturing(self.device):
            pinned = self._staging[device.data_ptr()]
        else:
            pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
        pinned.copy_(host)
        device.copy_(pinned, non_blocking=True)

    def point(self, w: list[int], g: list[int], v: list[int], copy: list[int]) -> None:
        """Set the addresses of all tensors, 0 for none, and upload the rows that changed."""
        tile = launch.kernels().tile
        columns = {
            tile.W_AT.value: w,
            tile.G_AT.value: g,
            tile.V_AT.value: v,
            tile.COPY_AT.value: copy,
        }
        changed = {at: new for at, new in columns.items() if self._columns.get(at) != new}
        if not changed:
            return
        self._order_streams()
        before = self._host.clone()
        for at, new in changed.items():
            self._host[:, at] = _integers(new)
            self._columns[at] = new
        aligned = ((self._host[:, : tile.NUMEL.value] % 16) == 0).all(1)
        self._host[:, tile.FLAGS.value] = aligned * tile.ALIGNED.value + self._fresh
        rows = (self._host != before).any(1).nonzero()
        if rows.numel():
            first, last = int(rows[0]), int(rows[-1]) + 1
            if launch.capturing(self.device):
                first, last = 0, len(self._host)
            self._upload(self.tensors[first:last], self._host[first:last])

    def set_groups(self, rows: list[list[float]], lr_addresses: list[int]) -> None:
        """Set the hyper-parameters of all groups (`group_row`); uploads them if any changed."""
        if rows == self._group_rows and lr_addresses == self._lr_addresses:
            return
        self._order_streams()
        self._group_rows, self._lr_addresses = rows, lr_addresses
        self._host_groups.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        words = self._host_groups.view(torch.int64)
        words[:, launch.kernels().tile.LR_AT.value] = _integers(lr_addresses)
        self._upload(self.groups, self._host_groups)

    def _order_streams(self) -> None:
        """Order this step after the last one where the current stream has changed since."""
        if self.device.type != "cuda" or launch.capturing(self.device):
            return
        current = torch.cuda.current_stream(self.device)
        if self._stream is not None and current != self._stream:
            current.wait_stream(self._stream)
            for table in vars(self).values():
                if isinstance(table, Tensor) and table.is_cuda:
                    table.record_stream(current)
        self._stream = current

    # ---------------------------------------------------------------- launches

    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Norms and updates: one launch, or two where the architecture's row says so."""
        if self.plan.items.numel() == 0:
            return
        if self.launches == 2:
            self.norms(grad_scale)
            self.update(grad_scale, found_inf)
            return
        self._order_streams()
        args = (
            self.items, self.tensors, self.groups, self.groups.view(torch.int64), self.counter,
            self.arrivals, self.flags, self.partials, self.sums, self.ratios,
            self.one if grad_scale is None else grad_scale,
            self.zero if found_inf is None else found_inf,
            self.plan.items.numel(),
        )  # fmt: skip
        launch.run("lars_step", self.programs, args, self.dtypes, self.row, self.device)

    def norms(self, grad_scale: Tensor | None = None) -> None:
        """The first of two launches: fill `sums`."""
        items = self._items_with(NORM)
        if items.numel() == 0:
            return
        self._order_streams()
        scale = self.one if grad_scale is None else grad_scale
        args = (items, self.tensors, self.groups, self.arrivals, self.partials, self.sums, scale)
        launch.run("l2norm", items.numel(), args, self.dtypes, self.row, self.device)

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """The second of two launches: update from `sums`."""
        items = self._items_with(UPDATE)
        if items.numel() == 0:
            return
        self._order_streams()
        args = (
            items, self.tensors, self.groups, self.groups.view(torch.int64), self.counter,
            self.sums, self.ratios,
            self.one if grad_scale is None else grad_scale,
            self.zero if found_inf is None else found_inf,
        )  # fmt: skip
        launch.run("lars_update", items.numel(), args, self.dtypes, self.row, self.device)

    @functools.cached_property
    def _split_items(self) -> dict[int, Tensor]:
        """The items of each half; updates backwards, since what was read last is still cached."""
        items = self.plan.items
        kinds = unpack_items(items)[0]
        halves = {NORM: items[(kinds & NORM) != 0], UPDATE: items[(kinds & UPDATE) != 0].flip(0)}
        if self.device.type == "cpu":
            return halves
        return {kind: self._upload_new(half) for kind, half in halves.items()}

    def _items_with(self, kind: int) -> Tensor:
        return self._split_items[kind]

    @property
    def has_groups(self) -> bool:
        """Whether hyper-parameters were set."""
        return bool(self._group_rows)

    def recover(self) -> bool:
        """After a launch that raised: reset the queue; whether no work had been done."""
        if self.device.type != "cpu":  # it raised on the host, before the launch
            return True
        untouched = (int(self.counter.item()) & 0xFFFFFFFF) == 0
        self.counter.copy_((self.counter >> 32) << 32)
        self.arrivals.zero_()
        return untouched

    def steps_taken(self) -> int:
        """Steps that were not skipped by found_inf. Waits for the device."""
        return (int(self.counter.item()) >> 32) - 1


def group_row(options: Any, device: torch.device) -> tuple[list[float], int]:
    """A group's row of `kernels/tile.py`, and the address of a learning rate in device memory."""
    lr: Any = options.lr
    address, is_fp64 = 0, False
    if isinstance(lr, Tensor):
        if (
            lr.device != device
            or device.type == "cpu"
            or lr.dtype not in (torch.float32, torch.float64)
        ):
            lr = float(lr)
        else:
            address, is_fp64, lr = lr.data_ptr(), lr.dtype == torch.float64, 0.0
    row = [
        lr, 0.0, is_fp64, options.momentum, 1.0 - options.dampening, options.weight_decay,
        options.trust_coefficient, options.eps, -1.0 if options.maximize else 1.0, options.adapt,
        DENOMINATOR_CODES[options.denominator], options.nesterov, options.lr_in_momentum,
        options.trust_clip, options.decay_zero_norm, 0.0,
    ]  # fmt: skip
    return [float(x) for x in row], address


@contextlib.contextmanager
def forced_launches(count: int) -> Any:
    """Within the block every new `Work` uses one or two launches."""
    before = os.environ.get(_ENVIRONMENT_LAUNCHES)
    os.environ[_ENVIRONMENT_LAUNCHES] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ENVIRONMENT_LAUNCHES]
        else:
            os.environ[_ENVIRONMENT_LAUNCHES] = before
