"""Runs the optimizer step inside the backward pass of a DDP model.

    backward     ... layer 5   layer 4   layer 3   layer 2   layer 1
    all-reduce          bucket 0  ------  bucket 1 ------  bucket 2
    update                       bucket 0        bucket 1        bucket 2

LARS needs only a layer's own weights and gradient, so a bucket can be updated as soon as its
all-reduce is done. On a GPU both run on side streams, which `backward()` joins before it returns.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lars_fused import LARS

from .._engine.rank_check import check_same_on_all_ranks
from .noise import NoiseScale, register_hook


def overlap_with_backward(
    ddp_model: DistributedDataParallel,
    optimizer: LARS,
    *,
    fold_mean: bool = False,
    noise_scale: NoiseScale | None = None,
) -> Overlap:
    """Run the optimizer's steps inside the backward pass, bucket by bucket.

    The training loop does not change. When `backward()` returns, the step has been taken;
    `optimizer.step()` must still follow, before the next synchronised backward pass: it verifies
    that gradients were not modified after `backward()`, and runs the hooks that schedulers rely on.
    The weights are bitwise those of the plain step. (If the number of ranks is not a power of two,
    this requires that DDP multiplies by its inverse; DDP divides instead when
    `gradient_as_bucket_view=True` is combined with `zero_grad(set_to_none=False)`. On sm_90 plain
    steps of long lists take the kernel lars_resident, which needs the GPU for itself, and those
    within a backward pass lars_step: the same up to rounding, and bitwise if
    LARS_FUSED_KERNEL=lars_step is set for the plain steps.)

    Learning-rate schedules, accumulation under `no_sync()` (the last micro-batch takes the step),
    `static_graph=True`, `gradient_as_bucket_view=True` and `layer_stats()` work. The first step is
    a rehearsal: `step()` takes it after `backward()`, runs the checks that overlapping relies on,
    and compares the parameters across ranks.

    Args:
        ddp_model: has every parameter that the optimizer updates, and no communication hook.
        optimizer: load its checkpoint before this call, not after.
        fold_mean: leave the division by the number of ranks to the update, which scales the
            gradient anyway. `p.grad` then holds the sum over ranks, not the mean (except in the
            first step). The weights are the same up to rounding, and bitwise the same for 2, 4,
            8, ... ranks unless a value leaves the range of its dtype.
        noise_scale: measures the same gradients; DDP allows only one communication hook.

    Returns:
        A handle whose `remove()` returns to plain steps. DDP keeps its one communication hook: to
        overlap again after that, wrap the module in a new DistributedDataParallel.

    Raises:
        TypeError, ValueError: for what cannot be overlapped: another optimizer or wrapper,
            `find_unused_parameters=True` (unused parameters are known only at the end), DDP's own
            mixed precision, and parameters that the model does not reduce.
        RuntimeError: for a model that has had a communication hook. In `step()`: for a closure, for
            GradScaler (found_inf is known only after all layers), for gradients changed after
            `backward()` (clipping by the global norm), for parameters with a gradient that the
            model did not reduce; in `backward()`: for a second synchronised pass without a step,
            and inside `join()`.

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
            "DistributedDataParallel (under fully_shard, norms need all shards of a layer)"
        )
    if not isinstance(optimizer, LARS):
        raise TypeError(
            f"overlap_with_backward: optimizer is a {type(optimizer).__name__}; must be a LARS"
        )
    if optimizer._overlap is not None:
        raise ValueError(
            "overlap_with_backward: the optimizer's steps are already overlapped; first call "
            "remove() on what overlap_with_backward returned"
        )
    if ddp_model.find_unused_parameters and not ddp_model.static_graph:
        raise ValueError(
            "overlap_with_backward: find_unused_parameters=True cannot be overlapped: which "
            "parameters have no gradient is known only at the end of the backward pass; use "
            "static_graph=True if they are always the same"
        )
    if ddp_model.mixed_precision is not None:
        raise ValueError(
            "overlap_with_backward: DDP(mixed_precision=...) has its own communication hook; "
            "use torch.autocast"
        )
    reduced = {id(p) for p in ddp_model.parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in reduced:
                raise ValueError(
                    f"overlap_with_backward: param_groups[{g}]['params'][{i}] (shape "
                    f"{tuple(p.shape)}) is not a parameter of ddp_model; use another optimizer"
                )
    return Overlap(ddp_model, optimizer, fold_mean, noise_scale)


def _as_laid_out(p: Tensor, g: Tensor) -> Tensor:
    """A gradient in a bucket as DDP wrote it: in the parameter's memory order.

    `GradBucket.gradients()` gives views in dimension order, which is different for channels_last.
    """
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(p)
    return g.as_strided(p.shape, p.stride(), g.storage_offset()) if dense else g


class Overlap:
    """A DDP model and the optimizer whose steps run in its backward pass."""

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
        register_hook("overlap_with_backward", model, self._hook)
        optimizer._overlap = self
        prepared = optimizer._engine.prepared
        prepared.room += sum(len(group["params"]) for group in optimizer.param_groups)
        self._share_the_device(True)

    def remove(self) -> None:
        """Return to plain steps by `step()`. DDP keeps the hook, which then only averages.

        To overlap again wrap the module in a new DistributedDataParallel: a model takes one hook.
        """
        if self._optimizer._overlap is self:
            self._optimizer._overlap = None
            self._share_the_device(False)

    def _share_the_device(self, shared: bool) -> None:
        """Whether steps run beside the backward pass and its collectives; prepares them anew."""
        prepared = self._optimizer._engine.prepared
        prepared.alone = not shared
        prepared.clear()

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
                # DDP queues its own final callback after this hook; queue ours behind it.
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
                "overlap_with_backward: inside join() a rank out of input would take steps; "
                "use plain steps there"
            )
        if self._pending:
            raise RuntimeError(
                "overlap_with_backward: a second backward pass has reduced gradients before "
                "optimizer.step(); accumulate under ddp_model.no_sync()"
            )
        self._reached = set()
        if self._rehearsed:
            self._optimizer._engine.last = []

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
            # Allocated here on the main stream, which all side streams wait for.
            self._scale = torch.full((1,), float(self._ranks), device=self._params()[0].device)
            self._rehearsed = True

    def _refuse(self, closure: Any, pending: bool, seen: list[tuple[Tensor, int]]) -> None:
        taken = "" if not self._rehearsed else "; the weights have already been changed"
        if closure is not None:
            raise RuntimeError(
                "overlap_with_backward: step(closure) cannot be overlapped: the closure would run "
                "after the step; call backward() and then step()"
            )
        for name in ("grad_scale", "found_inf"):
            if getattr(self._optimizer, name, None) is not None:
                raise RuntimeError(
                    "overlap_with_backward: GradScaler cannot be overlapped: whether any gradient "
                    f"overflowed is known only after all layers{taken}; use plain steps, or "
                    "bfloat16 without a scaler"
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
                        f"{' in the first step' if self._rehearsed else ''}{taken}; use plain "
                        "steps, or overlap a new DistributedDataParallel of the module once every "
                        "parameter has a gradient"
                    )
