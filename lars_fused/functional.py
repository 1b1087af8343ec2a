"""The step without a class: which tensors the kernels take, which the portable path, and both run.

A `Stepper` holds one fixed list of tensors, checked and divided. A step of the same tensors only
compares facts that are cheap to read (addresses, strides, dtypes) before it launches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks, launch, reference, sharding
from .reference import Options

_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"LARS: the portable path is used, because {reason}", RuntimeWarning, stacklevel=4
        )


@dataclass
class Batch:
    """The tensors of one step, index by index.

    `weights`: parameters, or their fp32 masters; `copies`: then the parameters, else None.
    `buffers`: None where the group has no momentum. `groups`: index of each tensor's options.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor | None]
    copies: list[Tensor | None]
    groups: list[int]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _facts(batch: Batch) -> list[Any]:
    """What must not change for the tables of a `Stepper` to stay right; read every step."""
    facts: list[Any] = []
    for tensors in (batch.weights, batch.grads):
        facts.append(list(map(torch.Tensor.stride, tensors)))
        facts.append([t.dtype for t in tensors])
        facts.append(list(map(torch.Tensor.size, tensors)))
    return facts


def _places(batch: Batch) -> list[Any]:
    """The same of the tensors that stay for many steps; read again when one of them has moved."""
    return [
        t
        if t is None
        else (t.device, t.dtype, t.size(), t.stride(), t.untyped_storage().nbytes() == 0)
        for tensors in (batch.weights, batch.buffers, batch.copies)
        for t in tensors
    ]


def _all_addresses(batch: Batch) -> list[list[int]]:
    w, v = _addresses(batch.weights), _addresses(batch.buffers)
    return [w, v, _addresses(batch.copies), _addresses(batch.grads)]


def kernel_objection(w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None) -> str | None:
    """Why the kernels do not take a tensor, and what would help; None where they do."""
    for what, t in (
        ("the tensor", w),
        ("its gradient", g),
        ("its momentum", v),
        ("its copy", copy),
    ):
        if t is not None and t.dtype not in checks.STORAGE_DTYPES:
            return f"{what} is {t.dtype}; the kernels take float32, float16 and bfloat16"
    if not checks.dense(w):
        return "its elements are not adjacent in memory; use a contiguous parameter"
    for what, t in (("its gradient", g), ("its momentum", v), ("its copy", copy)):
        if t is not None and not checks.same_layout(t, w):
            return f"{what} has strides {t.stride()}, the tensor {w.stride()}; use equal strides"
    return None


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
        self.facts, self.places = _facts(batch), _places(batch)
        self.addresses = _all_addresses(batch)
        self.flags = self._flags(options)
        self.fresh = fresh
        self.auto = backend == "auto"
        self.portable: list[int] = []
        self.portable_taken = False
        self.parts: list[tuple[list[int], launch.Work]] = []
        self.spares: list[launch.Work] = []
        self.captured: list[launch.Work] = []
        self.results: list[tuple[list[int], Tensor, Tensor]] = []
        self._options: Sequence[Options] | None = None
        self._shards = shards or None  # None also where nothing is split
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
    def _work(make: tuple[Any, ...], fresh: list[bool], staged: bool = False) -> launch.Work:
        device, dtypes, _, numels, adapt, groups, n_groups = make
        return launch.Work(device, dtypes, numels, adapt, groups, fresh, n_groups, staged)

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

    def fits(self, batch: Batch, options: Sequence[Options]) -> bool:
        """Whether the same checks and plans would come out for this batch."""
        if options is not self._options and self._flags(options) != self.flags:
            return False
        try:
            if _facts(batch) != self.facts:
                return False
        except RuntimeError:  # a sparse gradient has no strides
            return False
        addresses, before = _all_addresses(batch), self.addresses
        if addresses[:3] != before[:3] and _places(batch) != self.places:
            return False
        if addresses[3].count(0) != before[3].count(0):  # a gradient's storage was freed
            return False
        self.addresses = addresses
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
        else:
            self._add_spares()
        self._fill(works, options)
        self._options = options
        self.results = []
        whole = self._whole_norms(works, batch, options, grad_scale)
        for (index, _), work in zip(self.parts, works, strict=True):
            scale = None if grad_scale is None else grad_scale.to(work.device, torch.float32)
            skip = None if found_inf is None else found_inf.to(work.device, torch.float32)
            split = self._shards is not None and self._shards.among(index)
            try:
                (work.update if split else work.step)(scale, skip)
            except Exception as error:
                untouched = work.recover()
                if not (self.auto and untouched) or split:
                    raise
                if work.steps_taken() > 0:
                    for i in index:
                        self.fresh[i] = False
                self._fall_back(index, error)
                continue
            self.results.append((index, work.sums, work.ratios))
        self.parts = [(index, work) for index, work in self.parts if index is not self._lost(index)]
        if self.portable:
            self._run_portable(batch, options, grad_scale, found_inf, whole)
        written = [w if c is None else c for w, c in zip(batch.weights, batch.copies, strict=True)]
        torch.autograd.graph.increment_version([w for w in written if not w.is_inference()])

    def _whole_norms(
        self, works: list[launch.Work], batch: Batch, options: Sequence[Options],
        grad_scale: Tensor | None,
    ) -> dict[torch.device, Tensor]:  # fmt: skip
        """Fill the `sums` of every work that holds parts of tensors split over ranks with those of
        whole layers; those of the portable tensors are given back, by device."""
        if self._shards is None:
            return {}
        tables = []
        for (index, _), work in zip(self.parts, works, strict=True):
            if self._shards.among(index):
                work.sums.zero_()  # no item writes the row of an empty part
                work.norms(
                    None if grad_scale is None else grad_scale.to(work.device, torch.float32)
                )
                tables.append((index, work.sums))
        portable = {}
        for device, index in self._portable_by_device(batch).items():
            scale = 1.0 if grad_scale is None else grad_scale.to(device).double()
            portable[device] = reference.square_sums_of(
                [batch.weights[i] for i in index], [batch.grads[i] for i in index],
                [options[batch.groups[i]] for i in index], scale,
            )  # fmt: skip
            tables.append((index, portable[device]))
        self._shards.add_up(tables, [options[g] for g in batch.groups])
        return portable

    def _lost(self, index: list[int]) -> list[int] | None:
        return index if index and index[0] in self.portable else None

    def _fall_back(self, index: list[int], error: Exception) -> None:
        _warn_once(f"the kernel could not be launched ({type(error).__name__}: {error})")
        self.portable = sorted(self.portable + index)

    def _fill(self, works: list[launch.Work], options: Sequence[Options]) -> None:
        w, v, c, g = self.addresses
        moving = any(isinstance(o.lr, Tensor) for o in options)
        for (index, _), work in zip(self.parts, works, strict=True):
            if len(index) == len(w):
                work.point(w, g, v, c)
            else:
                work.point(*([column[i] for i in index] for column in (w, g, v, c)))
            if moving or options is not self._options or not work.has_groups:
                rows = [launch.group_row(o, work.device) for o in options]
                work.set_groups([row for row, _ in rows], [at for _, at in rows])

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
        for device, index in self._portable_by_device(batch).items():
            scale = 1.0 if grad_scale is None else grad_scale.to(device).double()
            sums, ratios = reference.step_(
                [batch.weights[i] for i in index], [batch.grads[i] for i in index],
                [batch.buffers[i] for i in index], [batch.copies[i] for i in index],
                [options[batch.groups[i]] for i in index], [self.fresh[i] for i in index], scale,
                whole.get(device),
            )  # fmt: skip
            lr = torch.stack([reference.scalar(options[batch.groups[i]].lr, ratios) for i in index])
            self.results.append((index, sums, torch.stack([ratios, ratios * lr], 1)))
        for i in self.portable:
            self.fresh[i] = False
        self.portable_taken = True

    def untaken(self) -> list[int]:
        """Tensors whose steps were all skipped so far. Waits for the device."""
        # Without items nothing counts: an empty part of a tensor that other ranks do step.
        index = [
            i
            for part, work in self.parts
            if work.plan.items.numel() and work.steps_taken() == 0
            for i in part
        ]
        return [*index, *([] if self.portable_taken else self.portable)]


def lars_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    dampening: float = 0.0,
    nesterov: bool = False,
    denominator: str = "sum",
    lr_in_momentum: bool = True,
    trust_clip: bool = False,
    decay_zero_norm: bool = True,
    adapt: bool = True,
    maximize: bool = False,
    momentum_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One LARS step of a list of tensors in place; the equations stand at `LARS`.

    Args:
        params: tensors of any shape; float32, float16, bfloat16 or float64; updated in place.
        grads: one gradient each, same shape and device; not changed.
        momentum_buffers: one buffer each, same shape; updated in place. An entry None means that
            the tensor has not been stepped: it is replaced by a new buffer of `momentum_dtype`
            (float64 for float64 parameters) unless `momentum` is 0.
        lr: γ, as all that follow up to `maximize` as for `LARS`.
        momentum: μ.
        weight_decay: β.
        trust_coefficient: η.
        eps: ε.
        dampening: τ.
        nesterov: Nesterov momentum.
        denominator: "sum", "decayed" or "gradient".
        lr_in_momentum: whether γ is inside the buffer.
        trust_clip: q = min(q/γ, 1).
        decay_zero_norm: whether a tensor with a zero norm decays.
        adapt: whether the trust ratio is used.
        maximize: maximize the objective.
        momentum_dtype: storage dtype of new buffers.
        backend: "auto", "triton" or "torch", as for `LARS`.
        grad_scale: float32, one element: gradients are divided by it.
        found_inf: float32, one element: not 0 skips the step. `momentum_buffers` then stays as it
            is on a CPU; elsewhere the host cannot know, and new buffers are put there as zeros.

    Raises:
        ValueError, TypeError, RuntimeError: for bad input, before anything is changed.
    """
    options = Options(
        lr, momentum, weight_decay, trust_coefficient, eps, dampening, nesterov, denominator,
        lr_in_momentum, trust_clip, decay_zero_norm, adapt, maximize,
    )  # fmt: skip
    checks.check_options(options._asdict(), "lars_step: ", read_device=False)
    checks.check_engine(backend, momentum_dtype, False, False)
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"lars_step: {len(params)} params, {len(grads)} grads and {len(momentum_buffers)} "
            "momentum_buffers; must be equally many"
        )
    buffers: list[Tensor | None] = []

    def label(i: int) -> str:
        return checks.describe(f"params[{i}]", params[i])

    for i, (p, g, v) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        check_tensors(p, g, {"momentum_buffer": v}, partial(label, i))
        buffers.append(new_buffer(p, momentum_dtype) if v is None and momentum else v)
    if len(set(map(id, params))) != len(params):
        raise ValueError("lars_step: params holds a tensor twice; each may stand there once")
    if not momentum:
        buffers = [None] * len(params)
    with torch.no_grad():
        weights, present, held = (
            [sharding.local(t) for t in tensors] for tensors in (params, grads, buffers)
        )
        batch = Batch(weights, present, held, [None] * len(params), [0] * len(params))
        fresh = [v is None for v in momentum_buffers]
        stepper = Stepper(
            batch, [options], fresh, backend, label, shards=sharding.Shards(params)
        )
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        stepper.run(batch, [options], grad_scale, found_inf)
        torch.autograd.graph.increment_version([p for p in params if sharding.layout(p)])
    if momentum:
        momentum_buffers[:] = buffers


def check_tensors(
    p: Tensor, g: Tensor, state: dict[str, Tensor | None], label: Callable[[], str]
) -> None:
    """Raise unless a parameter, its gradient and its state go together."""
    checks.check_parameter(p, label)
    checks.check_gradient(p, g, label)
    for key, value in state.items():
        if value is not None:
            checks.check_state(p, key, value, label)
    sharding.check(p, {"gradient": g, **state}, label)


def new_buffer(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros laid out as `p`. A float64 parameter keeps float64 momentum, whatever `dtype` says."""
    wide = torch.float64 if p.dtype == torch.float64 else dtype
    part = sharding.local(p)
    return sharding.like(p, torch.zeros_like(part, dtype=wide, memory_format=torch.preserve_format))
