"""What a step costs the host: any machine, no GPU needed.

The launch itself is stubbed: what is timed is all that `step()` does in Python before and after it,
on tensors of one element each, beside `torch.optim.SGD` on the same. On a CPU, small steps of the
portable path follow, timed by the same harness that times GPUs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import environment
from bench.cases import SWEEP, model_case, sweep_case
from bench.harness import COPY, Measured, Recorder, measure
from bench.models import adapted
from bench.peers import PORTABLE_LADDER
from bench.timers import Budget, interleave, per_call_us
from lars_fused import LARS, launch

pytestmark = pytest.mark.cpu

STUBBED = "lars_fused, launch stubbed"
FOREACH = "SGD(foreach=True)"
SGD: dict[str, dict[str, Any]] = {
    FOREACH: {"foreach": True},
    "SGD(fused=True)": {"fused": True},
    "SGD(foreach=False)": {"foreach": False},
}
RESNET = "host, ResNet-50"
COUNTS = (1000, 10_000)
SMALL = [n for n in SWEEP if n <= 10**6]
_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@contextlib.contextmanager
def stubbed_launches() -> Iterator[list[str]]:
    """The kernels' path on CPU tensors, without a launch; the names of those left out."""
    made: list[str] = []
    before = launch.run, launch.why_not
    launch.run = lambda name, *_: made.append(name)
    launch.why_not = lambda device: None
    try:
        yield made
    finally:
        launch.run, launch.why_not = before


def parameters(count: int | None) -> list[torch.nn.Parameter]:
    """One element each, with as many dimensions as ResNet-50's; `count`: that many matrices."""
    shapes = (
        [(1, 1)] * count if count else [(1,) * len(s) for _, s in model_case("ResNet-50").shapes]
    )
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def groups(params: list[torch.nn.Parameter], **left_out: Any) -> list[dict[str, Any]]:
    """As `param_groups` splits them: weights, then biases and normalisation layers."""
    yes = [p for p in params if adapted("", tuple(p.shape))]
    no = [p for p in params if not adapted("", tuple(p.shape))]
    others = [{"params": no, "weight_decay": 0.0, **left_out}] if no else []
    return [{"params": yes}, *others]


def host_times(
    count: int | None, rounds: int, calls: int, names: tuple[str, ...] = (), cold: bool = False
) -> dict[str, list[float]]:
    """Microseconds of one step: interleaved, each sample the mean of some calls.

    `cold`: the CPU's caches are filled with something else before each sample, as by a training
    step, so that few tensors have no advantage over many.
    """
    other = torch.zeros(1 << 24 if cold else 1)
    steps: dict[str, Callable[[], object]] = {}
    for name, kind in SGD.items():
        if not names or name in names:
            steps[name] = torch.optim.SGD(groups(parameters(count)), **_OPTIONS, **kind).step
    with stubbed_launches() as made:
        ours = LARS(groups(parameters(count), adapt=False), **_OPTIONS, backend="triton")
        steps[STUBBED] = ours.step
        for step in steps.values():
            for _ in range(3):
                step()
        if made != ["lars_step"] * 3:
            raise AssertionError(f"three steps made the launches {made}")
        del made[:]

        def sample(step: Callable[[], object]) -> float:
            other.add_(1)
            return per_call_us(step, calls)

        return interleave(
            {n: functools.partial(sample, step) for n, step in steps.items()}, rounds, 20.0
        )


@pytest.fixture(scope="module")
def overhead(recorder: Recorder) -> Callable[[str], dict[str, list[float]]]:
    @functools.cache
    def by_case(case: str) -> dict[str, list[float]]:
        count = None if case == RESNET else int(case.split()[1])
        tensors = count or len(model_case("ResNet-50").shapes)
        found = host_times(count, 40, 10) if count is None else host_times(count, 20, 1, cold=True)
        utc = environment.now()
        for name, samples in found.items():
            recorder.add(
                case, name, samples, n_tensors=tensors, n_params=tensors, kind="host", utc=utc
            )
        return found

    return by_case


@pytest.mark.parametrize("variant", [STUBBED, *SGD])
@pytest.mark.parametrize("case", [RESNET, *(f"host, {n} tensors" for n in COUNTS)])
def test_overhead(case, variant, overhead, replay):
    pytest.importorskip("triton", reason="without triton there is no launch to prepare")
    replay(overhead(case)[variant])


@pytest.fixture(scope="module")
def small(
    device: torch.device, recorder: Recorder, budget: Budget
) -> Callable[[int], Measured | None]:
    @functools.cache
    def by_count(n_params: int) -> Measured | None:
        if budget.left <= 0:
            return None
        case = sweep_case(n_params)
        return measure(case, device, PORTABLE_LADDER, recorder, rounds=20, seconds=3.0)

    return by_count


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU suite sweeps on the GPU")
@pytest.mark.parametrize("variant", [COPY, *PORTABLE_LADDER])
@pytest.mark.parametrize("n_params", SMALL)
def test_small_steps(n_params, variant, small, replay):
    found = small(n_params)
    if found is None:
        pytest.skip("the time is up")
    if variant in found.absent:
        pytest.skip(f"absent: {found.absent[variant]}")
    replay(found.times[variant])
