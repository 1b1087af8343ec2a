"""A kernel that fails in the middle of a run: under "auto" the portable path takes over exactly."""

import warnings

import pytest
import torch
import torch.distributed as dist

from lars_fused import LARS, lars_step
from lars_fused._engine import launch
from tests import internals
from tests.engine.test_partition import mixed, report_of

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_momentum_of_earlier_steps_is_kept(failing, monkeypatch):
    calls = []

    def run(*args):
        calls.append(args)
        if len(calls) > failing:
            raise RuntimeError("launch failed")
        real(*args)

    internals.forget_warnings(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, generator=generator)
    grads = [torch.randn(3, 5, generator=generator) for _ in range(3)]
    runs = {}
    for backend in ("torch", "auto"):
        p = torch.nn.Parameter(w.clone())
        optimizer = LARS([p], 2.0, weight_decay=0.1, dampening=0.5, trust_coefficient=0.05,
                         backend=backend)  # fmt: skip
        if backend == "auto":
            real = internals.replace_launch(monkeypatch, run)
        for g in grads:
            p.grad = g
            if backend == "auto" and len(calls) == failing:
                with pytest.warns(RuntimeWarning, match="kernel could not be launched"):
                    optimizer.step()
            else:
                optimizer.step()
        runs[backend] = p.detach()
    torch.testing.assert_close(runs["auto"], runs["torch"], rtol=1e-6, atol=1e-7)


def failing_launches(monkeypatch, times):
    """The first so many launches fail, as where another process disturbs the cache of kernels."""
    left = [times]

    def run(*args):
        if left[0]:
            left[0] -= 1
            raise FileNotFoundError(2, "No such file or directory", "lars_step.json")
        real(*args)

    real = internals.replace_launch(monkeypatch, run)


def two_steps(p, backend="auto"):
    optimizer = LARS([p], 2.0, weight_decay=0.1, backend=backend)
    for step in range(2):
        p.grad = torch.full_like(p, 0.3 + step)
        optimizer.step()
    return optimizer


def test_a_launch_that_fails_once_is_tried_again_and_stays_on_the_kernels(monkeypatch):
    """Alone it would leave the other replicas by rounding."""
    w = torch.randn(3, 5)
    expected, p = (torch.nn.Parameter(w.clone()) for _ in range(2))
    two_steps(expected, "triton")
    internals.forget_warnings(monkeypatch)
    failing_launches(monkeypatch, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = two_steps(p)
    assert torch.equal(p, expected)
    assert optimizer.backend == "triton"


def test_a_rank_does_not_fall_back_alone(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    p = torch.nn.Parameter(torch.ones(3, 5))
    failing_launches(monkeypatch, 10)
    with pytest.raises(RuntimeError, match=r"on rank 1, twice \(FileNotFound.*backend='torch' on "):
        two_steps(p)
    assert torch.equal(p, torch.ones(3, 5))


def test_what_ran_is_what_backend_says(monkeypatch):
    p = torch.nn.Parameter(torch.ones(3, 5))
    assert LARS([p]).backend == "triton"
    internals.forget_warnings(monkeypatch)
    failing_launches(monkeypatch, 10)
    with pytest.warns(RuntimeWarning, match="kernel could not be launched"):
        optimizer = two_steps(p)
    assert optimizer.backend == "torch"
    assert (
        "not triton, since the kernel could not be launched (FileNotFound"
        in optimizer.backend_report()
    )


def test_the_report_says_what_the_kernels_left_and_why():
    optimizer = mixed()
    optimizer.step()
    first, *others = report_of(optimizer)
    assert first == "triton: 3 tensors"
    assert sorted(line.partition(",")[0] for line in others) == [
        "fused: 1 tensor (layer4); not triton", "reference: 1 tensor (layer3); not triton",
    ]  # fmt: skip
    optimizer.zero_grad()
    for p in optimizer.param_groups[0]["params"][:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert report_of(optimizer) == ["triton: 2 tensors"]


def test_lars_step_speaks_for_itself(monkeypatch):
    """Its warnings and errors do not name an optimizer that the caller never made."""

    def step():
        w = torch.ones(3, 5)
        lars_step([w], [torch.ones(3, 5)], [torch.zeros(3, 5)], lr=0.1)
        return w

    internals.forget_warnings(monkeypatch)
    failing_launches(monkeypatch, 2)
    with pytest.warns(RuntimeWarning, match=r"^lars_step: falling back to the portable path"):
        step()
    failing_launches(monkeypatch, 10)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    with pytest.raises(RuntimeError, match=r"^lars_step: the kernel could not be launched on rank"):
        step()
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"^lars_step: .* use the optimizer, LARS\(\.\.\., capt"):
        step()
