"""Which tensors the kernels take, which the portable path, and a step that runs both.

A `Stepper` holds one fixed list of tensors, checked and divided. A step of the same tensors only
compares facts that are cheap to read (addresses, strides, dtypes) before it launches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, portable, reference, sharding, tables
from .batch import Batch, addresses, facts, kernel_objection, places
from .reference import Options

_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"LARS: the portable path is used, because {reason}", RuntimeWarning, stacklevel=4
        )


class Stepper:
    """One list of tensors, divided into kernel launches and portable updates."""

    def __init__(
        self,
        batch: Batch,
        options: Sequence[Options],
        fresh: list[bool],
        backend: str,
        label: Callable[[int], str],
        spare: bool = False,
        shards: sharding.Shards | None = None,
    ):
        self._facts, self._places = facts(batch.grads), places(batch)
        self._no_copies = all(c is None for c in batch.copies)
        self._addresses: list[list[int]] = []
        self._addresses = self._read_addresses(batch)
        self._filled: list[list[int]] | None = None  # the addresses that the tables hold
        self.flags = self._flags(options)
        self.fresh = fresh
        self.auto = backend == "auto"
        self.portable: list[int] = []
        self.portable_taken = False
        self._portable_results: list[tuple[list[int], Tensor, Tensor]] = []
        self.parts: list[tuple[list[int], tables.Work]] = []
        self.spares: list[tables.Work] = []
        self.captured: list[tables.Work] = []
        self.results: list[tuple[list[int], Tensor, Tensor]] = []
        self._options: Sequence[Options] | None = None
        self._weights: list[Tensor] | None = None
        self._written: list[Tensor] = []
        self._shards = shards or None  # None also where nothing is split
        self._groups = batch.groups
        self._empty = {i for i, w in enumerate(batch.weights) if w.numel() == 0}
        taken: dict[tuple[torch.device, launch.Dtypes], list[int]] = {}
        for i, w in enumerate(batch.weights):
            g, v, c = batch.grads[i], batch.buffers[i], batch.copies[i]
            reason = self._refusal(backend, w, g, v, c, label, i)
            if reason is not None:
                self.portable.append(i)
                continue
            dtypes = launch.Dtypes(
                w.dtype,
                g.dtype,
                torch.float32 if v is None else v.dtype,
                c if c is None else c.dtype,
            )
            taken.setdefault((w.device, dtypes), []).append(i)
        self._merge_without_momentum(taken, batch)
        self._make = [
            (device, dtypes, index, [batch.weights[i].numel() for i in index],
             [options[batch.groups[i]].adapt for i in index], [batch.groups[i] for i in index],
             len(options))
            for (device, dtypes), index in taken.items()
        ]  # fmt: skip
        for make in self._make:
            self.parts.append((make[2], self._work(make, [fresh[i] for i in make[2]])))
        self._spare = spare
        self._add_spares()

    @staticmethod
    def _refusal(
        backend: str, w: Tensor, g: Tensor, v: Tensor | None, c: Tensor | None,
        label: Callable[[int], str], i: int,
    ) -> str | None:  # fmt: skip
        if backend == "torch":
            return "forced"
        reason = launch.why_not(w.device)
        if reason is not None and backend == "auto":
            expected = w.device.type == "cuda" or "TRITON_INTERPRET=1 was set" in reason
            if expected or "triton cannot" in reason:
                _warn_once(reason)
            return reason
        reason = reason or kernel_objection(w, g, v, c)
        if reason is not None and backend == "triton":
            raise RuntimeError(
                f"{label(i)}: backend='triton' cannot update it: {reason}; or use backend='auto'"
            )
        return reason

    @staticmethod
    def _merge_without_momentum(
        taken: dict[tuple[torch.device, launch.Dtypes], list[int]], batch: Batch
    ) -> None:
        """Tensors without momentum have no momentum dtype: put them into a launch that exists."""
        for key in [
            k for k, index in taken.items() if all(batch.buffers[i] is None for i in index)
        ]:
            for other in taken:
                if other != key and other[0] == key[0] and other[1]._replace(v=key[1].v) == key[1]:
                    taken[other] = sorted(taken[other] + taken.pop(key))
                    break

    @staticmethod
    def _work(make: tuple[Any, ...], fresh: list[bool], staged: bool = False) -> tables.Work:
        device, dtypes, _, numels, adapt, groups, n_groups = make
        return tables.Work(device, dtypes, numels, adapt, groups, fresh, n_groups, staged)

    def _add_spares(self) -> None:
        """Tables for one graph capture, made before it: a captured step keeps its own for ever."""
        if self._spare and not self.spares:
            self.spares = [
                self._work(make, [False] * len(make[2]), True)
                for make in self._make
                if make[0].type == "cuda"
            ]

    @staticmethod
    def _flags(options: Sequence[Options]) -> list[Any]:
        """What the plan depends on: a change of another option only changes numbers in a table."""
        return [(o.adapt, o.momentum != 0) for o in options]

    def _read_addresses(self, batch: Batch) -> list[list[int]]:
        w, v, g = (addresses(ts) for ts in (batch.weights, batch.buffers, batch.grads))
        if self._no_copies and self._addresses:
            return [w, g, v, self._addresses[3]]
        return [w, g, v, addresses(batch.copies)]

    def fits(self, batch: Batch, options: Sequence[Options]) -> bool:
        """Whether the same checks and plans would come out for this batch."""
        if options is not self._options and self._flags(options) != self.flags:
            return False
        try:
            if facts(batch.grads) != self._facts:
                return False
        except (RuntimeError, TypeError):  # a sparse gradient has no strides, None has nothing
            return False
        current = self._read_addresses(batch)
        if current != self._addresses:
            if places(batch) != self._places:
                return False
            self._addresses = current
        return True

    def run(
        self, batch: Batch, options: Sequence[Options],
        grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One step of the batch that was given last, to the constructor or to `fits`.

        Nothing is written before every table is ready.
        """
        works = [work for _, work in self.parts]
        if self._spare and any(launch.capturing(w.device) for w in works):
            if not self.spares:
                raise RuntimeError(
                    "LARS: one graph capture has used the tables made for it; "
                    "run one step() outside of a capture before the next"
                )
            works, self.spares = self.spares, []
            self.captured += works
            self._fill(works, options, own=False)
        else:
            self._add_spares()
            self._fill(works, options, own=True)
        self._options = options
        self.results = []
        whole = self._whole_norms(works, batch, options, grad_scale)
        kept = []
        for part, work in zip(self.parts, works, strict=True):
            index = part[0]
            scale = None if grad_scale is None else grad_scale.to(work.device, torch.float32)
            skip = None if found_inf is None else found_inf.to(work.device, torch.float32)
            split = self._shards is not None and self._shards.among(index)
            try:
                (work.update if split else work.step)(scale, skip)
                if work.plan.items.numel() == 0:
                    # No program counts the steps: empty parts of tensors that other ranks step.
                    work.counter += (work.zero if skip is None else skip).eq(0).long() << 32
            except Exception as error:  # whatever keeps a kernel from being compiled or launched
                untouched = work.recover()
                if not (self.auto and untouched) or split:
                    raise
                if work.steps_taken() > 0:
                    for i in index:
                        self.fresh[i] = False
                self._fall_back(index, error)
                continue
            kept.append(part)
            self.results.append((index, work.sums, work.ratios))
        self.parts = kept
        if self.portable:
            self._run_portable(batch, options, grad_scale, found_inf, whole)
            self.results += self._portable_results  # of the step before, if this one was skipped
        if batch.weights is not self._weights:
            self._weights = batch.weights
            pairs = zip(batch.weights, batch.copies, strict=True)
            written = [w if c is None else c for w, c in pairs]
            self._written = [w for w in written if not w.is_inference()]
        torch.autograd.graph.increment_version(self._written)

    def _whole_norms(
        self, works: list[tables.Work], batch: Batch, options: Sequence[Options],
        grad_scale: Tensor | None,
    ) -> dict[torch.device, Tensor]:  # fmt: skip
        """Norms of whole layers where layers are split over ranks.

        They are put into the `sums` of every work that holds parts of such tensors; those of the
        portable tensors are given back, by device.
        """
        if self._shards is None:
            return {}
        found = []
        for (index, _), work in zip(self.parts, works, strict=True):
            if self._shards.among(index):
                work.sums.zero_()  # no item writes the row of an empty part
                work.norms(
                    None if grad_scale is None else grad_scale.to(work.device, torch.float32)
                )
                found.append((index, work.sums))
        own = {}
        for device, index in self._portable_by_device(batch).items():
            scale = 1.0 if grad_scale is None else grad_scale.to(device).double()
            own[device] = portable.square_sums_of(
                [batch.weights[i] for i in index], [batch.grads[i] for i in index],
                [options[batch.groups[i]] for i in index], scale,
            )  # fmt: skip
            found.append((index, own[device]))
        self._shards.add_up(found, [options[g] for g in batch.groups])
        return own

    def _fall_back(self, index: list[int], error: Exception) -> None:
        _warn_once(f"the kernel could not be launched ({type(error).__name__}: {error})")
        self.portable = sorted(self.portable + index)

    def _fill(self, works: list[tables.Work], options: Sequence[Options], own: bool) -> None:
        """Bring tables up to date: the stepper's own, or those of a graph capture."""
        moving = any(isinstance(o.lr, Tensor) for o in options)
        current = own and options is self._options and not moving
        if current and self._filled is self._addresses:
            return
        for (index, _), work in zip(self.parts, works, strict=True):
            if len(index) == len(self._addresses[0]):
                work.point(*self._addresses)
            else:
                work.point(*([column[i] for i in index] for column in self._addresses))
            if not current or not work.has_groups:
                rows = [tables.group_row(o, work.device) for o in options]
                work.set_groups([row for row, _ in rows], [at for _, at in rows])
        self._filled = self._addresses if own else None

    def _portable_by_device(self, batch: Batch) -> dict[torch.device, list[int]]:
        by_device: dict[torch.device, list[int]] = {}
        for i in self.portable:
            by_device.setdefault(batch.weights[i].device, []).append(i)
        return by_device

    def _run_portable(
        self, batch: Batch, options: Sequence[Options],
        grad_scale: Tensor | None, found_inf: Tensor | None, whole: dict[torch.device, Tensor],
    ) -> None:  # fmt: skip
        if found_inf is not None and float(found_inf) != 0:
            return
        results = []
        for device, index in self._portable_by_device(batch).items():
            scale = 1.0 if grad_scale is None else grad_scale.to(device).double()
            sums, ratios = portable.step_(
                [batch.weights[i] for i in index], [batch.grads[i] for i in index],
                [batch.buffers[i] for i in index], [batch.copies[i] for i in index],
                [options[batch.groups[i]] for i in index], [self.fresh[i] for i in index], scale,
                whole.get(device),
            )  # fmt: skip
            lr = torch.stack([reference.scalar(options[batch.groups[i]].lr, ratios) for i in index])
            rates = torch.stack([ratios, ratios * lr], 1)
            results.append((index, sums, rates))
        self._portable_results = results
        for i in self.portable:
            self.fresh[i] = False
        self.portable_taken = True

    def figures(self) -> list[tuple[int, list[float]]]:
        """Of each tensor N(w), N(g), N(d), q and γq in the last step. Waits for the device."""
        found = []
        for index, sums, ratios in self.results:
            rows = torch.cat([sums.sqrt(), ratios], 1).tolist()
            for at, (i, row) in enumerate(zip(index, rows, strict=True)):
                if i in self._empty and self._options is not None:
                    # No program had a part of it to work on; other ranks may hold some.
                    o = self._options[self._groups[i]]
                    q = float(reference.trust_ratios(sums[at : at + 1].cpu(), [o])[0])
                    row[3:] = [q, q * float(o.lr)]
                found.append((i, row))
        return found

    def untaken(self) -> list[int]:
        """Tensors whose steps were all skipped so far. Waits for the device."""
        index = [i for part, work in self.parts if work.steps_taken() == 0 for i in part]
        return [*index, *([] if self.portable_taken else self.portable)]
