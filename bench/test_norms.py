"""Norms of all tensors of a model: `multi_tensor_l2norm` against PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from bench import environment
from bench.cases import Case, model_case, slug, sweep_case
from bench.harness import GateError, Recorder
from bench.timers import Budget, all_cores, interleave, timer_for
from bench.variants import Variant
from lars_fused import multi_tensor_l2norm

pytestmark = [pytest.mark.cpu, pytest.mark.gpu]

CASES = ("ResNet-50", "ViT-B/16", "one 100M tensor")
ON_CPU = ("small", "ResNet-50", "one 100M tensor")
ERROR = "1e-9, relative error"
SMALL = 10**6
OURS = "multi_tensor_l2norm"
FUNCTIONS: dict[str, Callable[[list[torch.Tensor]], object]] = {
    OURS: multi_tensor_l2norm,
    "torch._foreach_norm": torch._foreach_norm,
    "one vector_norm a tensor": lambda tensors: [torch.linalg.vector_norm(t) for t in tensors],
}


def _case(name: str) -> Case:
    return sweep_case(SMALL) if name == "small" else model_case(name)


@pytest.fixture(scope="module")
def measured(
    device: torch.device, recorder: Recorder, budget: Budget
) -> Callable[[str], dict[str, list[float]] | None]:
    @functools.cache
    def by_name(name: str) -> dict[str, list[float]] | None:
        if budget.left <= 0:
            return None
        case = _case(name)
        tensors = case.inputs(device).w
        truth = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
        error = ((multi_tensor_l2norm(tensors).to(truth) - truth).abs() / truth).max()
        recorder.add(
            f"norms, {case.name}", OURS, [float(error) * 1e9], unit=ERROR, n_tensors=len(tensors),
            n_params=case.n_params, kind=timer_for(device).kind,
        )  # fmt: skip
        if not error <= 1e-6:
            recorder.note(gate={f"norms, {case.name}": f"relative error {float(error):.3g}"})
            raise GateError(f"norms of {case.name}: relative error {float(error):.3g}")
        timer = timer_for(device)
        calls = {
            n: Variant(functools.partial(f, tensors), list, graph=n != OURS)
            for n, f in FUNCTIONS.items()
        }
        for variant in calls.values():
            for _ in range(3):
                variant.step()
        with all_cores() as threads:
            recorder.note(threads={f"norms, {case.name}": threads})
            samples = interleave({n: timer.ready(v) for n, v in calls.items()}, 30, 3.0)
        facts = {"n_tensors": len(tensors), "n_params": case.n_params, "kind": timer.kind}
        utc = environment.now()
        for n, taken in samples.items():
            recorder.add(f"norms, {case.name}", n, taken, **facts, bytes=4 * case.n_params, utc=utc)
        return samples

    return by_name


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, id=slug(n)) for n in dict.fromkeys((*ON_CPU, *CASES))]
)
def test_norms(name, function, measured, replay, device, benchmark):
    benchmark.group = f"norms, {name}"
    if name not in (ON_CPU if device.type == "cpu" else (*CASES, "small")):
        pytest.skip("needs a GPU: torch.cuda finds none")
    samples = measured(name)
    if samples is None:
        pytest.skip("the time is up")
    replay(samples[function])
