"""How to make what is refused because of the situation, and what is warned of, in one process.

Process groups have one rank, captures and other ranks are pretended. `tests/distributed` and
`tests/gpu` meet the same refusals where they really happen.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lars_fused import LARS, conventions, lars_step, param_groups
from lars_fused._engine import (
    fallback,
    graph_pool,
    launch,
    launch_schedule,
    launch_tables,
    plan,
    queue_state,
    rank_check,
)
from lars_fused.distributed import NoiseScale, check_same_on_all_ranks, overlap_with_backward
from lars_fused.monitor import Monitor
from tests.contract.wrapped_tensors import Deaf, ReadOnly
from tests.distributed.ranks import group_of_one

Call = Callable[[], Any]
MATRIX = torch.ones(4, 3)


def parameter(t: Tensor = MATRIX, grad: Tensor | None = None) -> nn.Parameter:
    p = nn.Parameter(t.detach().clone(memory_format=torch.preserve_format))
    p.grad = torch.ones(t.shape, dtype=t.dtype) if grad is None else grad
    return p


def strided() -> nn.Parameter:
    p = nn.Parameter(torch.ones(4, 6)[:, ::2])
    p.grad = torch.ones(4, 3)
    return p


def wrapped(kind: type) -> nn.Parameter:
    p = nn.Parameter(kind(MATRIX.clone()))
    p.grad = torch.ones(4, 3)
    return p


def one_step(p: nn.Parameter, **options: Any) -> None:
    LARS([("layer.weight", p)], **options).step()


# ------------------------------------------------------------------ ranks, one of them real


@contextlib.contextmanager
def mesh_of_one() -> Iterator[Any]:
    """It shows itself alike in every version of torch."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    with group_of_one(), patch.object(DeviceMesh, "__repr__", lambda _: "DeviceMesh('cpu', [0])"):
        yield init_device_mesh("cpu", (1,))


def laid_out(tensor: str, gradient: str) -> Call:
    """A step of a DTensor or plain parameter with such a gradient."""

    def call() -> None:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        with mesh_of_one() as mesh:
            places = {"shard": Shard(0), "whole": Replicate(), "pending": Partial()}

            def made(how: str) -> Any:
                bare = torch.ones(4, 3)
                return bare if how == "plain" else DTensor.from_local(bare, mesh, [places[how]])

            p = nn.Parameter(made(tensor))
            lars_step([p.detach()], [made(gradient)], [None], backend="torch")

    return call


def checkpoint_laid_out_elsewhere() -> None:
    from torch.distributed.tensor import DTensor, Shard

    with mesh_of_one() as mesh:
        momentum = DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)])
        optimizer = LARS([("layer.weight", parameter())])
        saved = optimizer.state_dict()
        optimizer.load_state_dict({**saved, "state": {0: {"momentum_buffer": momentum}}})


def flattened() -> None:
    p = parameter(torch.ones(12))
    p._fsdp_flattened = True  # as FSDP1 marks its flat parameters
    one_step(p, backend="torch")


def beside_another_rank(change: Callable[[list[str]], list[str]]) -> Call:
    """Rank 1 describes its optimizer in these lines."""

    def both(value: Any, group: Any) -> list[Any]:
        return [value, change(value) if isinstance(value, list) else b"other"]

    def call() -> None:
        model = nn.Linear(3, 2)
        optimizer = LARS(model.named_parameters(), weight_decay=0.1, backend="torch")
        with (
            group_of_one(),
            patch.object(rank_check, "_gather", both),
            patch.object(rank_check, "version", lambda _: "3.7.1"),
            patch.object(torch, "__version__", "2.13.0"),
        ):
            check_same_on_all_ranks(optimizer)

    return call


def another_backend(lines: list[str]) -> list[str]:
    return [line.replace("backend 'torch'", "backend 'triton'") for line in lines]


@contextlib.contextmanager
def second_of_two_ranks() -> Iterator[None]:
    with (
        patch.object(dist, "is_initialized", lambda: True),
        patch.object(dist, "get_world_size", lambda *_: 2),
        patch.object(dist, "get_rank", lambda *_: 1),
    ):
        yield


@contextlib.contextmanager
def failing_launches() -> Iterator[None]:
    """The kernels' path on CPU tensors, where every launch fails."""
    pytest.importorskip("triton", reason="without triton there is no launch")

    def run(*_: Any) -> None:
        raise RuntimeError("out of resources")

    with patch.object(launch, "run", run), patch.object(launch, "why_not", lambda _: None):
        yield


def failing_on_one_rank() -> None:
    with failing_launches(), second_of_two_ranks():
        one_step(parameter())


# ------------------------------------------------------------------ overlapped steps


class Overlapped:
    """A DDP model of one rank whose steps are overlapped; `rehearse`: one has been taken."""

    def __init__(self, rehearse: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), **options)
        self.optimizer = LARS(self.model.parameters(), 0.1, backend="torch")
        self.handle = overlap_with_backward(self.model, self.optimizer)
        if rehearse:
            self.backward()
            self.optimizer.step()

    def backward(self) -> None:
        self.model(MATRIX).square().sum().backward()


def overlapped(act: Callable[[Overlapped], Any], **options: Any) -> Call:
    def call() -> None:
        with group_of_one():
            act(Overlapped(**options))

    return call


def after_backward(act: Callable[[Overlapped], Any]) -> Callable[[Overlapped], Any]:
    def change(made: Overlapped) -> None:
        made.backward()
        act(made)
        made.optimizer.step()

    return change


def clipped(made: Overlapped) -> None:
    nn.utils.clip_grad_norm_(made.model.parameters(), 1e-3)


def scaled(made: Overlapped) -> None:
    made.optimizer.found_inf = torch.zeros(1)


def without_synchronisation(made: Overlapped) -> None:
    with made.model.no_sync():
        made.backward()
    made.optimizer.step()


def gradient_from_elsewhere(made: Overlapped) -> None:
    made.handle._used.clear()  # as if none had had a gradient in the first step
    made.backward()
    made.optimizer.step()


def joined(made: Overlapped) -> None:
    with made.model.join():
        made.handle._begin()


def twice(made: Overlapped) -> None:
    made.backward()
    made.handle._begin()


def again(made: Overlapped) -> None:
    made.handle.remove()
    overlap_with_backward(made.model, made.optimizer)


def refused_by_overlap(
    change: Callable[[nn.parallel.DistributedDataParallel], Any] = lambda _: None,
    make: Callable[[nn.Module], Any] = lambda model: LARS(model.parameters(), 0.1),
    **options: Any,
) -> Call:
    def call() -> None:
        with group_of_one():
            model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), **options)
            change(model)
            overlap_with_backward(model, make(model))

    return call


# ------------------------------------------------------------------ groups, graphs, plans, kernels


def other_names() -> None:
    optimizer = LARS(nn.Linear(3, 2).named_parameters())
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()


def flat_partition() -> None:
    optimizer = LARS(nn.Linear(3, 2).parameters())
    optimizer.param_groups[0]["params"] = [parameter(torch.ones(8))]
    optimizer.step()


def planned(numels: list[int], **changes: Any) -> Call:
    given = {
        "adapt": [True] * len(numels), "groups": [0] * len(numels), "chunk": 4, "window": 64,
        "lag": 1, "bytes_per_element": 8, **changes,
    }  # fmt: skip
    return lambda: plan.make_plan(numels, **given)


def three_launches() -> None:
    with patch.dict(os.environ, {"LARS_FUSED_LAUNCHES": "3"}):
        launch_tables._launches(1)


def scheduled_for(kernel: str, architecture: str) -> Call:
    contents = launch_schedule.Contents((8,), (True,), (0,), (False,), 1)
    fp32 = launch.Dtypes(torch.float32, torch.float32, torch.float32)

    def call() -> None:
        with (
            patch.dict(os.environ, {"LARS_FUSED_KERNEL": kernel}),
            patch.object(launch, "architecture", return_value=(architecture, 108, 40 << 20)),
        ):
            launch_schedule.schedule(torch.device("cpu"), fp32, contents)

    return call


@contextlib.contextmanager
def of_an_h200(function: Callable[[str], Any]) -> Iterator[None]:
    """Where `launch.function` is this one and CPU tensors pass for those of an H200."""
    launch._has_resident.cache_clear()
    with (
        patch.object(launch, "architecture", return_value=("sm_90", 132, 60 << 20)),
        patch.object(launch, "function", function),
    ):
        yield
    launch._has_resident.cache_clear()


def without_gluon() -> None:
    def function(name: str) -> None:
        raise ImportError("cannot import name 'async_copy'")

    with of_an_h200(function):
        launch.resident_target(torch.device("cpu"))


def shared_out() -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    dtypes = launch.Dtypes(torch.float32, torch.float32, torch.float32)
    with (
        of_an_h200(lambda name: {(264,): refused}),
        patch.object(launch, "constants", return_value={}),
        patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        row = launch.tuning.RESIDENT_ROWS["sm_9"]
        launch.run("lars_resident", 264, (), dtypes, row, torch.device("cuda", 0))


def lost_work() -> None:
    """The third launch saw that the second had begun behind the queue's start."""
    counter, watch = torch.tensor([4 * queue_state.START]), torch.tensor([3, 2])
    queue_state.check(counter, watch)


def forced(p: nn.Parameter) -> None:
    """Kernels are asked for, and there are some."""
    with patch.object(launch, "why_not", lambda _: None):
        one_step(p, backend="triton")


def without_matplotlib() -> None:
    with patch.dict("sys.modules", {"matplotlib": None}):
        Monitor(LARS([parameter()])).picture()


def monitored(p: nn.Parameter, steps: int = 1, **options: Any) -> Monitor:
    optimizer = LARS([("layer.weight", p)], 0.1, backend="torch", **options)
    monitor = Monitor(optimizer, every=1, patience=0)
    for _ in range(steps):
        optimizer.step()
    monitor.flush()
    return monitor


REFUSALS: dict[str, Call] = {
    "CUDA graph: capture without `capturable`": lambda: graph_pool.refuse(False),
    "CUDA graph: capture without a warm-up step": lambda: graph_pool.refuse(True),
    "CUDA graph: capture of `lars_step`": lambda: graph_pool.refuse(False, "lars_step"),
    "CUDA graph: a second capture without a step before it": lambda: graph_pool.GraphPool().take(
        object(), None
    ),
    "LARS: a launch that began in the middle of the queue": lost_work,
    "LARS: a launch that fails on one of several ranks": failing_on_one_rank,
    "LARS: `lars_resident` on a part of a GPU": shared_out,
    "LARS_FUSED_KERNEL: no kernel": scheduled_for("resident", "sm_90"),
    "LARS_FUSED_KERNEL: one that the GPU does not have": scheduled_for("lars_resident", "sm_80"),
    "LARS_FUSED_LAUNCHES: neither 1 nor 2": three_launches,
    'LARS: `backend="triton"`, float64': lambda: forced(parameter(MATRIX.double())),
    'LARS: `backend="triton"`, a gradient of other strides': lambda: forced(
        parameter(grad=torch.ones(3, 4).t())
    ),
    'LARS: `backend="triton"`, a strided parameter': lambda: forced(strided()),
    "LARS: a wrapper that cannot be written": lambda: one_step(wrapped(ReadOnly), backend="torch"),
    "LARS: a wrapper that forgets what is written": lambda: one_step(
        wrapped(Deaf), backend="torch"
    ),
    "LARS: fewer parameters than names in a group": other_names,
    "LARS: a flat partition in the place of layers": flat_partition,
    "LARS: a parameter of FSDP1": flattened,
    "lars_step: a sharded parameter with a pending reduction": laid_out("pending", "pending"),
    "lars_step: a sharded gradient of a plain parameter": laid_out("plain", "shard"),
    "lars_step: a plain gradient of a sharded parameter": laid_out("shard", "plain"),
    "lars_step: a gradient of other placements": laid_out("shard", "pending"),
    "checkpoint with a momentum of other placements": checkpoint_laid_out_elsewhere,
    "ranks: parameters in another order": beside_another_rank(lambda lines: lines[::-1]),
    "ranks: fewer parameters": beside_another_rank(lambda lines: lines[:-1]),
    "ranks: another backend": beside_another_rank(another_backend),
    "overlap_with_backward: no LARS": refused_by_overlap(
        make=lambda model: torch.optim.SGD(model.parameters(), 0.1)
    ),
    "overlap_with_backward: twice": overlapped(
        lambda made: overlap_with_backward(made.model, made.optimizer)
    ),
    "overlap_with_backward: after remove()": overlapped(again),
    "NoiseScale: attached to a model with a hook": overlapped(
        lambda made: NoiseScale(1).attach(made.model)
    ),
    "overlap_with_backward: find_unused_parameters": refused_by_overlap(
        find_unused_parameters=True
    ),
    "overlap_with_backward: mixed precision of DDP": refused_by_overlap(
        lambda model: setattr(model, "mixed_precision", torch.bfloat16)
    ),
    "overlap_with_backward: a parameter of another model": refused_by_overlap(
        make=lambda model: LARS([*model.parameters(), parameter()])
    ),
    "overlap_with_backward: a closure": overlapped(lambda made: made.optimizer.step(lambda: None)),
    "overlap_with_backward: GradScaler": overlapped(after_backward(scaled)),
    "overlap_with_backward: GradScaler, later": overlapped(after_backward(scaled), rehearse=True),
    "overlap_with_backward: no synchronised backward pass": overlapped(without_synchronisation),
    "overlap_with_backward: clipped gradients": overlapped(after_backward(clipped)),
    "overlap_with_backward: clipped gradients, later": overlapped(
        after_backward(clipped), rehearse=True
    ),
    "overlap_with_backward: a gradient that was not reduced": overlapped(
        gradient_from_elsewhere, rehearse=True
    ),
    "overlap_with_backward: inside of `join()`": overlapped(joined),
    "overlap_with_backward: two backward passes": overlapped(twice),
    "Monitor: no matplotlib": without_matplotlib,
    "Monitor: a layer without records": lambda: monitored(parameter()).picture(layers=["other"]),
    "conventions: an unknown name": lambda: conventions.LAMB,
    "make_plan: other flags than tensors": planned([1, 2], adapt=[True]),
    "make_plan: other groups than tensors": planned([1, 2], groups=[0]),
    "make_plan: a group below 0": planned([1], groups=[-1]),
    "make_plan: too many tensors": planned([0] * (plan.MAX_TENSORS + 1)),
    "make_plan: unknown order": planned([1], order="random"),
    "make_plan: a chunk of 0": planned([1], chunk=0),
    "make_plan: a tensor of too many chunks": planned([2**62]),
}


# ------------------------------------------------------------------ warnings


def without_any_gradient() -> None:
    optimizer = LARS([nn.Parameter(MATRIX.clone())])
    optimizer.step()
    optimizer.step()


@contextlib.contextmanager
def nothing_warned() -> Iterator[None]:
    with patch.object(fallback, "_warned", set()):
        yield


def expecting_kernels(interpreting: Callable[[], bool]) -> Call:
    def call() -> None:
        with (
            nothing_warned(),
            patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
            patch.object(launch, "interpreting", interpreting),
        ):
            one_step(parameter())

    return call


def broken_triton() -> bool:
    raise ImportError("libcuda.so.1: cannot open shared object file")


def failing_once_and_for_all() -> None:
    with nothing_warned(), failing_launches():
        one_step(parameter())


WARNINGS: dict[str, Call] = {
    "warning: no parameter ever gets a gradient": without_any_gradient,
    "warning: TRITON_INTERPRET set too late": expecting_kernels(lambda: False),
    "warning: a triton that cannot be imported": expecting_kernels(broken_triton),
    "warning: a triton without `lars_resident`": without_gluon,
    "warning: a launch that fails": failing_once_and_for_all,
    "warning: param_groups, no name in exclude exists": lambda: param_groups(
        nn.Linear(3, 2), 0.1, exclude=["pos_embed", "cls_token"]
    ),
    "warning: Monitor, a gradient that is infinite": lambda: monitored(
        parameter(grad=torch.full((4, 3), math.inf))
    ),
    "warning: Monitor, weights of zero": lambda: monitored(parameter(torch.zeros(4, 3)), 12),
    "warning: Monitor, gradients of zero": lambda: monitored(parameter(grad=torch.zeros(4, 3)), 12),
    "warning: Monitor, a ratio that is always clipped": lambda: monitored(
        parameter(), 12, trust_coefficient=1e6, trust_clip=True
    ),
}
