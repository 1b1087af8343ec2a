"""What is said to streams and devices that are not there: an order, memory in use, dtypes."""

from __future__ import annotations

import pytest
import torch

from lars_fused import LARS, clip_grad_norm_
from tests import internals
from tests.emulated_gpu import emulated_gpu

pytestmark = pytest.mark.interpret


@pytest.fixture
def gpu():
    with emulated_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("launches", [1, 2])
def test_a_step_on_another_stream_waits_for_the_last_and_keeps_its_tables(gpu, launches):
    p = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = LARS([p], backend="triton")
    first, other = torch.cuda.current_stream(), torch.cuda.Stream()
    with internals.forced_launches(launches):
        optimizer.step()
    optimizer.step()
    assert (first.waited_for, first.told_of) == ([], set())
    with torch.cuda.stream(other):
        optimizer.step()
        optimizer.step()
    (work,) = internals.launches(optimizer)
    assert other.waited_for == [first]
    assert other.told_of == {table.data_ptr() for table in work.tables()}
    optimizer.step()
    assert first.waited_for == [other]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_clipped_by_a_factor_of_their_own_dtype(gpu, monkeypatch, dtype):
    """One of another dtype would be a launch for each tensor."""
    params = [torch.nn.Parameter(torch.ones(9, device="cuda", dtype=dtype)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    multiply, seen = torch._foreach_mul_, []

    def spy(tensors, factor):
        seen.append((len(tensors), factor.is_cuda, factor.dtype))
        multiply(tensors, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", spy)
    clip_grad_norm_(params, 1.0)
    assert seen == [(3, True, dtype)]
    assert params[0].grad[0].item() == pytest.approx(27**-0.5, rel=1e-2)
