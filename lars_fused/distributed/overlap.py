"""The optimizer step inside the backward pass of a DDP model.

    backward     ... layer 5   layer 4   layer 3   layer 2   layer 1
    all-reduce          bucket 0  ------  bucket 1 ------  bucket 2
    update                       bucket 0        bucket 1        bucket 2

LARS needs nothing of a layer but its own weights and its own gradient, so a bucket can be updated
as soon as its all-reduce is done. On a GPU both happen on side streams, which `backward()` joins
before it returns.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lars_fused import LARS
from lars_fused.agreement import check_same_on_all_ranks

from .noise import NoiseScale


def overlap_with_backward(
    ddp_model: DistributedDataParallel,
    optimizer: LARS,
    *,
    fold_mean: bool = False,
    noise_scale: NoiseScale | None = None,
) -> Overlap:
    """Take the optimizer's steps inside the backward pass, bucket by bucket.

    The training loop stays as it is. When `backward()` returns, the step has been taken;
    `optimizer.step()` must still follow, before the next synchronised backward pass: it checks that
    nothing happened that the step could not know, and runs the hooks that schedulers rely on. The
    weights are bitwise those of the plain step (with a number of ranks that is no power of two:
    provided that DDP, too, multiplies by its inverse; it divides instead where
    `gradient_as_bucket_view=True` meets `zero_grad(set_to_none=False)`).

    Learning-rate schedules, accumulation under `no_sync()` (the last micro-batch steps),
    `static_graph=True`, `gradient_as_bucket_view=True` and `layer_stats()` work. The first step is
    a rehearsal: it is taken by `step()`, after `backward()`, with the checks that have to pass for
    overlapping to be right, and the parameters compared between ranks.

    Args:
        ddp_model: holds every parameter that the optimizer updates; without a communication hook.
        optimizer: load a checkpoint into it before, not after.
        fold_mean: leave the division by the number of ranks to the update, which divides by
            something anyway. `p.grad` then holds the sum over ranks, not the mean (but for the
            first step's). The weights are
            the same to rounding, bitwise so for 2, 4, 8, ... ranks unless a value leaves the range
            of its dtype.
        noise_scale: measures the same gradients; DDP allows one communication hook only.

    Returns:
        The handle, whose `remove()` returns to plain steps.

    Raises:
        TypeError, ValueError: for what cannot be overlapped: another optimizer or wrapper,
            `find_unused_parameters=True` (which parameters are unused is not known before the end),
            DDP's own mixed precision, and parameters that the model does not reduce.
        RuntimeError: in `step()`: for a closure, for GradScaler (found_inf is known when all layers
            are), for gradients changed after `backward()` (clipping by the global norm), for
            parameters with a gradient that the model did not reduce; in `backward()`: for a second
            synchronised pass without a step, and inside `join()`.

    Example:
        >>> overlap_with_backward(ddp_model, optimizer)  # doctest: +SKIP
        >>> for images, labels in loader:  # doctest: +SKIP
        ...     loss(ddp_model(images), labels).backward()
        ...     optimizer.step()
        ...     scheduler.step()
        ...     optimizer.zero_grad()
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"overlap_with_backward: ddp_model is a {type(ddp_model).__name__}; must be a "
            "DistributedDataParallel (with fully_shard, norms need all shards of a layer)"
        )
    if not isinstance(optimizer, LARS):
        raise TypeError(
            f"overlap_with_backward: optimizer is a {type(optimizer).__name__}; must be a LARS"
        )
    if optimizer._overlap is not None:
        raise ValueError("overlap_with_backward: the optimizer's steps are overlapped already")
    if ddp_model.find_unused_parameters and not ddp_model.static_graph:
        raise ValueError(
            "overlap_with_backward: find_unused_parameters=True cannot be overlapped: which "
            "parameters have no gradient is known at the end of the backward pass only; use "
            "static_graph=True where they are always the same"
        )
    if ddp_model.mixed_precision is not None:
        raise ValueError(
            "overlap_with_backward: DDP(mixed_precision=...) has a communication hook of its own; "
            "use torch.autocast"
        )
    reduced = {id(p) for p in ddp_model.parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in reduced:
                raise ValueError(
                    f"overlap_with_backward: param_groups[{g}]['params'][{i}] (shape "
                    f"{tuple(p.shape)}) is no parameter of ddp_model; give it another optimizer"
                )
    return Overlap(ddp_model, optimizer, fold_mean, noise_scale)


def _as_laid_out(p: Tensor, g: Tensor) -> Tensor:
    """A gradient in a bucket as DDP wrote it: in the order of the parameter's memory.

    `GradBucket.gradients()` gives views in the order of the dimensions, which differs for
    channels_last.
    """
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(p)
    return g.as_strided(p.shape, p.stride(), g.storage_offset()) if dense else g


class Overlap:
    """A DDP model and the optimizer whose steps its backward pass takes."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: LARS,
        fold_mean: bool,
        noise_scale: NoiseScale | None,
    ):
        self._model, self._optimizer, self._noise = model, optimizer, noise_scale
        self._group: Any = model.process_group
        self._ranks = dist.get_world_size(self._group)
        self._fold = fold_mean
        self._lock = threading.Lock()  # callbacks of two buckets may run in two threads
        self._rehearsed = False
        self._pending = False  # a backward pass has reduced gradients; step() has not followed
        self._reached: set[int] = set()  # ids of the parameters reduced by this backward pass
        self._used: set[int] = set()  # those that had a gradient in the rehearsal
        self._seen: list[tuple[Tensor, int]] = []  # gradients and their versions after backward
        self._scale: Tensor | None = None
        # DDP compares annotations, which are strings here: a lambda has none.
        model.register_comm_hook(None, lambda _, bucket: self._hook(bucket))
        optimizer._overlap = self
        optimizer._room += sum(len(group["params"]) for group in optimizer.param_groups)

    def remove(self) -> None:
        """Return to steps taken by `step()`. DDP keeps the hook, which then only averages."""
        if self._optimizer._overlap is self:
            self._optimizer._overlap = None

    # ------------------------------------------------------------- in the backward pass

    def _hook(self, bucket: Any) -> torch.futures.Future[Tensor]:
        active = self._optimizer._overlap is self
        if active and bucket.index() == 0:
            self._begin()
        buffer = bucket.buffer()
        if self._noise is not None:
            self._noise._before(buffer)
        updating = active and self._rehearsed
        fold = updating and self._fold
        if not fold:
            buffer.mul_(1.0 / self._ranks)  # as DDP itself does
        params = bucket.parameters()
        grads = [*map(_as_laid_out, params, bucket.gradients())]
        if active:
            self._reached.update(map(id, params))
            if bucket.is_last():
                # DDP queues its own finishing after this hook: be called after that.
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(lambda: queue(self._after_backward))
        future = dist.all_reduce(buffer, group=self._group, async_op=True).get_future()

        def reduced(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = done.value()[0]
            if self._noise is not None:
                self._noise._after(total, 1.0 / self._ranks if fold else 1.0)
            if updating:
                self._update(params, grads, fold)
            return total

        then: torch.futures.Future[Tensor] = future.then(reduced)
        return then

    def _begin(self) -> None:
        if self._model._join_config.enable:
            raise RuntimeError(
                "overlap_with_backward: inside join() a rank without input would take steps; "
                "use plain steps there"
            )
        if self._pending:
            raise RuntimeError(
                "overlap_with_backward: a second backward pass has reduced gradients before "
                "optimizer.step(); accumulate under ddp_model.no_sync()"
            )
        self._reached = set()
        if self._rehearsed:
            self._optimizer._recent = []

    def _update(self, params: list[Tensor], grads: list[Tensor], fold: bool) -> None:
        own = {id(p): g for p, g in zip(params, grads, strict=True) if id(p) in self._used}
        with self._lock:
            self._optimizer._step_part(own, self._scale if fold else None)

    def _after_backward(self) -> None:
        self._pending = True
        grads = [p.grad for p in self._params() if p.grad is not None]
        self._seen = [(g, g._version) for g in grads]

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    # ------------------------------------------------------------------------ in step()

    def step(self, closure: Any) -> None:
        """What `optimizer.step()` does while steps are overlapped."""
        seen, self._seen = self._seen, []
        pending, self._pending = self._pending, False
        self._refuse(closure, pending, seen)
        if not self._rehearsed:
            check_same_on_all_ranks(self._optimizer, self._group)
            self._optimizer._step()
            self._used = {id(p) for p in self._params() if p.grad is not None}
            # Made here, on the main stream, after which all side streams come.
            self._scale = torch.full((1,), float(self._ranks), device=self._params()[0].device)
            self._rehearsed = True

    def _refuse(self, closure: Any, pending: bool, seen: list[tuple[Tensor, int]]) -> None:
        taken = "" if not self._rehearsed else "; the weights have been changed already"
        if closure is not None:
            raise RuntimeError(
                "overlap_with_backward: step(closure) cannot be overlapped: the closure would run "
                "after the step; call backward() and then step()"
            )
        for name in ("grad_scale", "found_inf"):
            if getattr(self._optimizer, name, None) is not None:
                raise RuntimeError(
                    "overlap_with_backward: GradScaler cannot be overlapped: whether any gradient "
                    f"overflowed is known when all layers are{taken}; use plain steps, or bfloat16 "
                    "without a scaler"
                )
        if not pending:
            raise RuntimeError(
                "overlap_with_backward: step() without a backward pass that reduced gradients: "
                "the last micro-batch must run outside of no_sync()"
            )
        now = [p.grad for p in self._params() if p.grad is not None]
        same = len(now) == len(seen) and all(
            g is old and g._version == version for g, (old, version) in zip(now, seen, strict=True)
        )
        if not same:
            raise RuntimeError(
                "overlap_with_backward: gradients were changed between backward() and step(), as "
                f"clipping by the global norm and GradScaler.unscale_ do{taken}; use plain steps"
            )
        allowed = self._used if self._rehearsed else self._reached
        for g, group in enumerate(self._optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and not (id(p) in allowed and id(p) in self._reached):
                    raise RuntimeError(
                        f"overlap_with_backward: param_groups[{g}]['params'][{i}] (shape "
                        f"{tuple(p.shape)}) has a gradient that the backward pass did not reduce"
                        f"{' in the first step' if self._rehearsed else ''}{taken}"
                    )
