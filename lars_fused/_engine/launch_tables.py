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
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import layout
from ..options import Options, group_row
from . import launch, queue_state
from .device_memory import new_memory, on_device
from .launch_schedule import Contents, environment, schedule
from .tensors import Addresses, Scaling

_ENVIRONMENT_LAUNCHES = "LARS_FUSED_LAUNCHES"
_ADDRESS_WORDS = (layout.W_AT, layout.G_AT, layout.V_AT, layout.COPY_AT)


def _integers(values: Sequence[int]) -> Tensor:
    """A table column on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class Rows:
    """The tables that the host fills: one row per tensor, one per group of hyper-parameters.

    On a CPU the host's copy and the table are the same tensor.
    """

    def __init__(
        self, device: torch.device, contents: Contents, slots: Sequence[int], staged: bool
    ):
        self._device = device
        n = len(contents.numels)
        self._addresses: Addresses | None = None  # as the device has them
        self._options: Sequence[Options] | None = None  # likewise
        self._fresh = _integers(contents.fresh) * layout.FRESH
        self.host = torch.zeros(n, layout.TENSOR_WORDS, dtype=torch.int64, device="cpu")
        self.host[:, layout.NUMEL] = _integers(contents.numels)
        self.host[:, layout.SLOT] = _integers(slots)
        self.host[:, layout.GROUP] = _integers(contents.groups)
        self._host_groups = torch.zeros(
            contents.n_groups, layout.GROUP_WORDS, dtype=torch.float64, device="cpu"
        )
        self.tensors = on_device(self.host, device)
        self.groups = on_device(self._host_groups, device)
        # Each replay of a captured step copies from its staging memory again: never reuse it.
        self._staging = {
            table.data_ptr(): torch.empty_like(table, device="cpu", pin_memory=True)
            for table in ((self.tensors, self.groups) if staged else ())
        }

    def point(self, addresses: Addresses) -> None:
        """Set the addresses of all tensors and upload the rows that changed."""
        if addresses == self._addresses:
            return
        before = self.host.clone()
        known: Sequence[list[int] | None] = self._addresses or [None] * len(_ADDRESS_WORDS)
        for at, old, new in zip(_ADDRESS_WORDS, known, addresses, strict=True):
            if new != old:
                self.host[:, at] = _integers(new) if new else 0
        self._addresses = addresses
        aligned = ((self.host[:, : layout.NUMEL] % 16) == 0).all(1)
        self.host[:, layout.FLAGS] = aligned * layout.ALIGNED + self._fresh
        rows = (self.host != before).any(1).nonzero()
        if rows.numel():
            first, last = int(rows[0]), int(rows[-1]) + 1
            if launch.capturing(self._device):
                first, last = 0, len(self.host)
            self._upload(self.tensors[first:last], self.host[first:last])

    def set_groups(self, options: Sequence[Options]) -> None:
        """Set the hyper-parameters of all groups; uploads them if any changed.

        A list object is read only once: any change, even of a learning rate in a tensor, comes in a
        new list.
        """
        if options is self._options:
            return
        rows = [group_row(o, self._device) for o in options]
        words = torch.tensor([numbers for numbers, _ in rows], dtype=torch.float64, device="cpu")
        integers = words.view(torch.int64)
        for word in (layout.LR_AT, layout.SWITCHES):
            integers[:, word] = _integers([row[word] for _, row in rows])
        if self._options is None or not torch.equal(
            words.view(torch.int64), self._host_groups.view(torch.int64)
        ):
            self._host_groups.copy_(words)
            self._upload(self.groups, self._host_groups)
        self._options = options

    def _upload(self, table: Tensor, host: Tensor) -> None:
        if table.data_ptr() == host.data_ptr() or host.numel() == 0:
            return
        if launch.capturing(self._device):
            pinned = self._staging[table.data_ptr()]
        else:
            pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
        pinned.copy_(host)
        table.copy_(pinned, non_blocking=True)


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
        alone: bool = True,
    ):
        """Make every table, so that no step has to.

        Args:
            device: of all tensors.
            dtypes: of all tensors.
            contents: the tensors.
            staged: for a step under graph capture, which may not allocate pinned memory.
            halves: `norms` and `update` will be called separately, whatever the architecture.
            alone: whether nothing runs on the device beside a launch.
        """
        self.device = device
        self.schedule = schedule(device, dtypes, contents, alone and not halves)
        plan = self.schedule.plan
        self._launches = _launches(self.schedule.target.row.launches)
        self._stream: torch.cuda.Stream | None = None
        self.rows = Rows(device, contents, plan.slots, staged)
        self.memory = new_memory(device, len(contents.numels), plan.n_slots)
        self._unscaled = (
            torch.ones(1, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.float32, device=device),
        )
        self.programs = self.schedule.programs
        items, memory = on_device(self.schedule.items(), device), self.memory
        one, zero = self._unscaled
        self.arguments = launch.StepArguments(
            items=items, tensors=self.rows.tensors, groups=self.rows.groups,
            counter=memory.counter, watch=memory.watch, arrivals=memory.arrivals,
            flags=memory.flags, partials=memory.partials, sums=memory.sums, ratios=memory.ratios,
            grad_scale=one, found_inf=zero, n_items=plan.items.numel(),
        )  # fmt: skip
        """Of one launch, unless there is a loss scale or a flag."""
        self.norm_items = self.update_items = items[:0]
        if halves or self._launches == 2:
            norms, updates = self.schedule.halves()
            self.norm_items = on_device(norms, device)
            self.update_items = on_device(updates, device)

    def captured(self) -> bool:
        """Whether a CUDA graph is being captured on the device's current stream."""
        return launch.capturing(self.device)

    def fill(self, addresses: Addresses, options: Sequence[Options]) -> None:
        """Bring the tables up to date: addresses by tensor, hyper-parameters by group."""
        self._order_streams()
        self.rows.point(addresses)
        self.rows.set_groups(options)

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
        lists = (
            self.arguments.items,
            self.norm_items,
            self.update_items,
            self.rows.tensors,
            self.rows.groups,
        )
        return [*lists, *vars(self.memory).values(), *self._unscaled]

    # ---------------------------------------------------------------- launches

    def step(self, scaling: Scaling) -> None:
        """Norms and updates: one launch, or two if the architecture's row says so."""
        if self._launches == 2:
            self.norms(scaling)
            self.update(scaling)
            return
        args = self.arguments
        if scaling.grad_scale is not None or scaling.found_inf is not None:
            grad_scale, found_inf = self._numbers(scaling)
            args = args._replace(grad_scale=grad_scale, found_inf=found_inf)
        if args.n_items == 0:  # other ranks hold all of these tensors
            queue_state.count_step(args.counter, args.watch, args.found_inf)
            return
        self._launch(self.schedule.target.kernel, self.programs, args)

    def norms(self, scaling: Scaling) -> None:
        """The first of two launches: fill `sums`."""
        if self.norm_items.numel() == 0:
            return
        memory = self.memory
        self._launch("l2norm", self.norm_items.numel(), launch.NormArguments(
            items=self.norm_items, tensors=self.rows.tensors, groups=self.rows.groups,
            arrivals=memory.arrivals, partials=memory.partials, sums=memory.sums,
            grad_scale=self._numbers(scaling)[0],
        ))  # fmt: skip

    def update(self, scaling: Scaling) -> None:
        """The second of two launches: update from `sums`."""
        grad_scale, found_inf = self._numbers(scaling)
        memory = self.memory
        if self.update_items.numel() == 0:
            queue_state.count_step(memory.counter, memory.watch, found_inf)
            return
        self._launch("lars_update", self.update_items.numel(), launch.UpdateArguments(
            items=self.update_items, tensors=self.rows.tensors, groups=self.rows.groups,
            counter=memory.counter, watch=memory.watch, sums=memory.sums, ratios=memory.ratios,
            grad_scale=grad_scale, found_inf=found_inf,
        ))  # fmt: skip

    def _launch(self, name: launch.KernelName, programs: int, args: launch.Arguments) -> None:
        fixed = self.schedule
        launch.run(name, programs, args, fixed.dtypes, fixed.target.row, self.device)

    def _numbers(self, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """The loss scale and the flag as the kernels read them: 1 and 0 where there is none."""
        one, zero = self._unscaled
        scale, flag = scaling
        return one if scale is None else scale, zero if flag is None else flag

    # ------------------------------------------------------------ between launches

    def recover(self) -> bool:
        """Reset the queue after a failed launch; return True if no work was done."""
        if self.device.type != "cpu":  # it raised on the host, before the launch
            return True
        return queue_state.reset(self.memory.counter, self.memory.arrivals)

    def steps_taken(self) -> int:
        """How many steps found_inf did not skip. Synchronises with the device."""
        return queue_state.steps_taken(self.memory.counter)

    def check_queue(self) -> None:
        """Raise if a launch skipped work because the queue was not at its start.

        Waits for the device, so it is asked where the host does so anyway.
        """
        queue_state.check(self.memory.counter, self.memory.watch)


def _launches(preferred: int) -> int:
    """Launches per step: as set in the environment, or the architecture's choice."""
    asked = os.environ.get(_ENVIRONMENT_LAUNCHES, str(preferred))
    if asked not in ("1", "2"):
        raise ValueError(
            f"{_ENVIRONMENT_LAUNCHES}={asked} is not allowed; must be 1 or 2, or unset for the "
            "architecture's own choice"
        )
    return int(asked)


def forced_launches(count: int) -> contextlib.AbstractContextManager[None]:
    """Within the block every new `LaunchTables` uses this number of launches, 1 or 2."""
    return environment(_ENVIRONMENT_LAUNCHES, str(count))
