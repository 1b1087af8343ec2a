"""A step that is checked, partitioned and has its tables: what `LARS.step` and `lars_step` run.

    seen = step.see(grads, addresses)           read what the host must know; no side effects
    step.matches(seen, facts)                   whether preparing it again would change nothing
    step.run(seen, options, scaling, before)    launch

A prepared step belongs to one list of tensors. Its kernel launches hold their tables; torch
operations update tensors that the kernels do not support, in the same step. What a call left, the
next one is given by whoever makes it: where the tensors were, and what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..options import Options
from . import fallback, foreach, graph_pool, launch, partition, replicas, sharding, wrapped
from .fallback import Label
from .graph_pool import GraphPool
from .launch_schedule import Contents
from .launch_tables import LaunchTables
from .measured import Measured
from .new_state import StepState
from .partition import Choice, LaunchKey
from .tensors import Addresses, Scaling, Seen, StepTensors, basis, see
from .torch_part import TorchPart


@dataclass(frozen=True)
class _KernelPart:
    """The tensors of one launch."""

    key: LaunchKey
    index: list[int]
    split: bool
    """Whether any of them is shared with other ranks."""
    tables: LaunchTables


class Terms(NamedTuple):
    """On what terms a list of tensors is stepped."""

    caller: str
    """Whom messages that name no parameter speak for."""
    auto: bool
    """Whether torch operations may stand in for a launch that fails."""
    alone: bool
    """Whether nothing runs on the device beside a step, so that a launch may take all of it."""


class PreparedStep:
    """One list of tensors, checked and split between kernel launches and torch operations."""

    def __init__(
        self,
        state: StepState,
        grads: list[Tensor],
        groups: Sequence[int],
        options: Sequence[Options],
        backend: str,
        label: Label,
        pool: GraphPool | None = None,
        caller: str = "LARS",
        alone: bool = True,
    ):
        """Partition the work and make its tables; nothing is written.

        Args:
            state: parameters and their state, checked.
            grads: one per parameter.
            groups: for each parameter, its index into `options`.
            options: hyper-parameters of each group.
            backend: "auto", "triton" or "torch".
            label: prefix of a message about the i-th parameter.
            pool: the optimizer's, if its steps may be captured into CUDA graphs.
            caller: whom messages that name no parameter speak for.
            alone: whether nothing runs on the device beside a step.

        Raises:
            RuntimeError: with backend="triton", for a tensor that the kernels do not support.
        """
        self.state, self._groups, self._pool = state, groups, pool
        self.terms = Terms(caller, backend == "auto", alone)
        self._plan_facts = plan_facts(options)
        tensors = state.tensors(grads)
        self._basis = basis(tensors)
        self._shards = sharding.Shards(state.params)
        divided = partition.divide(tensors, backend, launch.why_not)
        fallback.report(divided, backend, label, caller)
        self._numels = [w.numel() for w in tensors.weights]
        self._kernel_parts = [
            _KernelPart(
                key, index, self._shards.among(index),
                self._tables(key, index, options, state.fresh),
            )
            for key, index in divided.launches.items()
        ]  # fmt: skip
        self._torch_parts = [
            TorchPart(
                index, tensors, groups, options, state.fresh, divided.reasons, bool(self._shards)
            )
            for index in divided.rest.values()
        ]  # fmt: skip
        for i in divided.wrapped:
            wrapped.rehearse(tensors, i, options[groups[i]], label)
        self._written = [p for p in state.params if not p.is_inference()]
        if pool is not None:
            self._reserve(pool, options)

    # ---------------------------------------------------------------- before a step

    @property
    def addresses(self) -> Addresses:
        """Where its tensors were when it was prepared."""
        return self._basis.fingerprint.addresses

    def see(self, grads: Sequence[Tensor | None], known: Addresses) -> Seen | None:
        """What a step with these gradients would work on; None if the layout of one changed.

        Args:
            grads: one per parameter, or None.
            known: where the tensors were when they were last found to match: there they still do.
        """
        if self.state.sharded and [sharding.layout(g) for g in grads] != self.state.layouts:
            return None
        return see(self.state.tensors(grads), known)

    def matches(self, seen: Seen, facts: list[tuple[bool, ...]]) -> bool:
        """Whether this step is still valid for these tensors, and options with these facts."""
        return facts == self._plan_facts and self._basis.fits(seen)

    def gradients_are_zero(self, seen: Seen) -> bool:
        """Whether every gradient is 0, on all ranks that share them. Waits for the device."""
        moving = any(bool(torch.any(g != 0)) for g in seen.tensors.grads)
        return not self._shards.on_any_rank(moving, self.state.params[0].device)

    # --------------------------------------------------------------------- the step

    def run(
        self, seen: Seen, options: Sequence[Options], scaling: Scaling,
        before: Measured | None = None,
    ) -> Measured:  # fmt: skip
        """Take one step. Nothing is written before every table is ready.

        Args:
            seen: for which `matches` is true.
            options: hyper-parameters of each group.
            scaling: loss scale, and the flag that skips the step.
            before: what the run before measured, which stands where this one is skipped.

        Returns:
            What was measured on the way, where it is.
        """
        tensors, addresses = seen.tensors, seen.fingerprint.addresses
        parts = self._parts_of_this_run(tensors, options)
        for part in parts:
            part.tables.fill(addresses.select(part.index), options)
        whole: dict[torch.device, Tensor] = {}
        if self.state.sharded:
            whole = self._norms_of_whole_layers(parts, tensors, options, scaling)
        launches = [
            (part.index, part.tables)
            for part in parts
            if self._launch(part, tensors, options, scaling)
        ]
        earlier = {} if before is None else before.of_torch
        of_torch = {
            part: part.run(
                tensors, self._groups, options, scaling, whole.get(part.device), earlier.get(part)
            )
            for part in self._torch_parts
        }
        # The kernels' writes are invisible to autograd.
        torch.autograd.graph.increment_version(self._written)
        if self.state.sharded:
            torch.autograd.graph.increment_version(tensors.written())
        return Measured(addresses, self._numels, self._groups, options, launches, of_torch)

    def _parts_of_this_run(
        self, tensors: StepTensors, options: Sequence[Options]
    ) -> list[_KernelPart]:
        """The kernel parts, with separate tables if the step is being captured."""
        parts = self._kernel_parts
        if not any(part.tables.captured() for part in parts):
            if self._pool is not None:
                self._reserve(self._pool, options)
            return parts
        if self._pool is None:
            graph_pool.refuse(False, self.terms.caller)
        tables = self._pool.take(self, tensors)
        return [
            replace(part, tables=own) for part, own in zip(self._kernel_parts, tables, strict=True)
        ]

    def _reserve(self, pool: GraphPool, options: Sequence[Options]) -> None:
        """Prepare tables for a capture."""
        never = [False] * len(self._numels)
        pool.reserve(
            self,
            lambda: [
                self._tables(part.key, part.index, options, never, staged=True)
                for part in self._kernel_parts
                if part.tables.device.type == "cuda"
            ],
        )

    def _tables(
        self, key: LaunchKey, index: list[int], options: Sequence[Options],
        fresh: Sequence[bool], staged: bool = False,
    ) -> LaunchTables:  # fmt: skip
        groups = [self._groups[i] for i in index]
        contents = Contents(
            tuple(self._numels[i] for i in index),
            tuple(options[g].adapt for g in groups),
            tuple(groups),
            tuple(fresh[i] for i in index),
            len(options),
        )
        return LaunchTables(
            *key, contents, staged=staged, halves=self._shards.among(index), alone=self.terms.alone
        )

    def _launch(
        self, part: _KernelPart, tensors: StepTensors, options: Sequence[Options], scaling: Scaling
    ) -> bool:
        """Launch the kernel; False if its tensors were handed to torch operations instead."""
        tables, split = part.tables, part.split
        on_device = scaling.on(tables.device)
        take = tables.update if split else tables.step
        try:
            take(on_device)
        except Exception:  # anything can go wrong in compiling or launching a kernel
            if not self._may_retry(tables, split):
                raise
            try:
                # Processes that share a cache folder disturb each other: the second try finds it.
                take(on_device)
            except Exception as error:
                if not self._may_retry(tables, split):
                    raise
                if replicas.exist():
                    raise replicas.refusal(self.terms.caller, error) from error
                self._fall_back(part, tensors, options, error)
                return False
        return True

    def _may_retry(self, tables: LaunchTables, split: bool) -> bool:
        """Whether a failed launch did nothing, and "auto" may find another way."""
        untouched = tables.recover()
        return self.terms.auto and untouched and not split and not tables.captured()

    def _fall_back(
        self, part: _KernelPart, tensors: StepTensors, options: Sequence[Options], error: Exception
    ) -> None:
        """Hand the tensors of a failed launch to torch operations, from this step on."""
        reason = f"the kernel could not be launched ({type(error).__name__}: {error})"
        fallback.warn_once(self.terms.caller, reason)
        begun = part.tables.steps_taken() > 0
        fresh = [first and not begun for first in self.state.fresh]
        reasons = dict.fromkeys(part.index, reason)
        # Used by later steps, which may be taken outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            own = TorchPart(
                part.index, tensors, self._groups, options, fresh, reasons, bool(self._shards)
            )
        self._torch_parts.append(own)
        self._kernel_parts = [p for p in self._kernel_parts if p.index is not part.index]
        if self._pool is not None:
            self._pool.drop(self)
            self._reserve(self._pool, options)

    def _norms_of_whole_layers(
        self, parts: list[_KernelPart], tensors: StepTensors, options: Sequence[Options],
        scaling: Scaling,
    ) -> dict[torch.device, Tensor]:  # fmt: skip
        """Norms of whole layers for tensors that are split across ranks.

        Written into the `sums` of every launch that holds shards; those of the torch parts are
        returned, by device.
        """
        if not self._shards:
            return {}
        found = []
        for part in parts:
            if part.split:
                part.tables.memory.sums.zero_()  # no item writes the row of an empty shard
                part.tables.norms(scaling.on(part.tables.device))
                found.append((part.index, part.tables.memory.sums))
        own = {}
        for torch_part in self._torch_parts:
            sums = torch_part.square_sums(tensors, self._groups, options, scaling)
            own[torch_part.device] = sums
            found.append((torch_part.index, sums))
        self._shards.add_up(found, [options[g] for g in self._groups])
        return own

    # ---------------------------------------------------------------- after a step

    def split_over(self) -> list[tuple[dist.ProcessGroup | None, set[int]]]:
        """Pairs (process group, `id` of the parameters that it splits), in the order of use."""
        params = self.state.params
        return [(group, {id(params[i]) for i in at}) for group, at in self._shards.groups()]

    @property
    def backends(self) -> set[str]:
        """The backends in use: "triton", "torch" or both."""
        found = {"triton"} if self._kernel_parts else set()
        return found | ({"torch"} if self._torch_parts else set())

    def choices(self) -> dict[int, Choice]:
        """Which backend updates each tensor, and why."""
        found = {i: Choice("triton") for part in self._kernel_parts for i in part.index}
        for part in self._torch_parts:
            found |= part.choices()
        return dict(sorted(found.items()))

    @property
    def tables(self) -> list[LaunchTables]:
        """The tables of each kernel launch."""
        return [part.tables for part in self._kernel_parts]

    def tensors_of(self, measured: Measured, grads: Sequence[Tensor | None]) -> StepTensors | None:
        """The tensors of the step that was measured; None if these gradients cannot be its."""
        seen = self.see(grads, measured.addresses)
        facts = plan_facts(measured.options)
        return seen.tensors if seen and self.matches(seen, facts) else None

    def untaken(self) -> set[int]:
        """The `id` of each parameter whose steps were all skipped. Synchronises."""
        index = [i for part in self._kernel_parts if part.tables.steps_taken() == 0
                 for i in part.index]  # fmt: skip
        index += [i for part in self._torch_parts if part.steps_taken() == 0 for i in part.index]
        return {id(self.state.params[i]) for i in index}


def plan_facts(options: Sequence[Options]) -> list[tuple[bool, ...]]:
    """Options that the plan depends on; changing others only changes numbers in a table."""
    return [(o.adapt, o.momentum != 0, o.dampening != 0, foreach.expressible(o)) for o in options]
