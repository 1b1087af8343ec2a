"""What a step costs the host: any machine, no GPU needed.

The launch itself is stubbed: the benchmark times everything that `step()` does in Python around it,
on tensors of one element each, against `torch.optim.SGD` on the same tensors. On a CPU, whole steps
on all cores follow, from small ones to models at full size, timed by the harness that times GPUs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import environment
from bench.cases import SWEEP, Case, model_case, slug, sweep_case
from bench.harness import COPY, Measured, Recorder, measure
from bench.models import adapted
from bench.peers import CPU_LADDER, EAGER, PORTABLE
from bench.timers import Budget, all_cores, interleave, per_call_us
from lars_fused import LARS
from lars_fused._engine import launch

pytestmark = pytest.mark.cpu

STUBBED = "lars_fused, launch stubbed"
FOREACH = "SGD(foreach=True)"
SGD: dict[str, dict[str, Any]] = {
    FOREACH: {"foreach": True},
    "SGD(fused=True)": {"fused": True},
    "SGD(foreach=False)": {"foreach": False},
}
MEMORY = "% of parameters, gradients and state"
RESNET = "host, ResNet-50"
COUNTS = (1000, 10_000)
SMALL = [n for n in SWEEP if n <= 10**6]
_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@contextlib.contextmanager
def stubbed_launches() -> Iterator[list[str]]:
    """The kernels' path on CPU tensors, without a launch; records the names of skipped ones."""
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

    `cold`: the CPU's caches are filled with other data before each sample, as a training step
    would, so that few tensors have no advantage over many.
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
def test_overhead(case, variant, overhead, replay, benchmark):
    benchmark.group = case
    pytest.importorskip("triton", reason="without triton there is no launch to prepare")
    replay(overhead(case)[variant])


# ---------------------------------------------------------------- whole steps on a CPU


def extra_memory(step: Callable[[], object]) -> int:
    """Peak bytes allocated during a call, beyond those allocated before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def note_memory(case: Case, recorder: Recorder) -> None:
    """Memory that our step and a plain loop need besides parameters, gradients and state.

    After a first step, which makes state. Ours then also keeps half a megabyte of scratch.
    """
    inputs = case.inputs(torch.device("cpu"))
    held = sum(t.nbytes for ts in (inputs.w, inputs.g, inputs.v) for t in ts)
    for name in (PORTABLE, "eager LARS", "foreach LARS"):
        step = CPU_LADDER[name](inputs).step
        step()
        most = extra_memory(step)
        recorder.add(
            case.name, name, [100 * most / held], dtype=case.dtype, kind="host", unit=MEMORY,
            n_tensors=len(case.shapes), n_params=case.n_params,
        )  # fmt: skip


# Case and seconds of samples. 16-bit parameters are compared with the plain loop.
CPU_CASES = {
    **{f"sweep-{n}": (sweep_case(n), 4.0) for n in SMALL},
    **{slug(n): (model_case(n), s) for n, s in
       (("ResNet-50", 30.0), ("ViT-B/16", 40.0), ("AlexNet", 30.0))},
    "resnet50-bf16": (model_case("ResNet-50", "bf16, fp32 momentum"), 20.0),
}  # fmt: skip
MIXED = {PORTABLE: CPU_LADDER[PORTABLE], **EAGER}


def builders(case: Case) -> dict[str, Any]:
    return CPU_LADDER if case.exact else MIXED


@pytest.fixture(scope="module")
def stepped(
    device: torch.device, recorder: Recorder, budget: Budget
) -> Callable[[str], Measured | None]:
    @functools.cache
    def by_name(name: str) -> Measured | None:
        if budget.left <= 0:
            return None
        case, seconds = CPU_CASES[name]
        with all_cores() as threads:
            recorder.note(threads={f"{case.name}, {case.dtype}": threads})
            found = measure(
                case, device, builders(case), recorder, rounds=60, seconds=seconds, host=False
            )
            if name == "resnet50":
                note_memory(case, recorder)
        return found

    return by_name


@pytest.fixture(scope="module", autouse=True)
def ours_first(pytestconfig: pytest.Config) -> None:
    """In the order in which the variants are listed, however long they take."""
    session = getattr(pytestconfig, "_benchmarksession", None)
    if session is not None:
        session.sort = "name"


def step_runs() -> list[Any]:
    return [
        pytest.param(name, variant, id=f"{name}-{at:02d} {variant}")
        for name, (case, _) in CPU_CASES.items()
        for at, variant in enumerate([*builders(case), COPY])
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU suite steps on the GPU")
@pytest.mark.parametrize(("name", "variant"), step_runs())
def test_steps(name, variant, stepped, replay, benchmark):
    benchmark.group = f"a step, {name}"
    found = stepped(name)
    if found is None:
        pytest.skip("the time is up")
    if variant in found.absent:
        pytest.skip(f"absent: {found.absent[variant]}")
    replay(found.times[variant])
