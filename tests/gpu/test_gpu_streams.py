"""Rows 47 and 49: side streams, and tables that are used again while a copy is in flight."""

import pytest
import torch

from lars_fused import LARS
from tests.oracle import Truth, assert_true
from tests.tools import STRONG, copies, make_grads, make_params, same_bits

pytestmark = pytest.mark.gpu

SHAPES = [(300, 40), (5,), (20_000,)]
SLEEP = 20_000_000  # clock cycles: some 10 ms


@pytest.mark.row(47)
def test_gate_the_step_runs_on_the_current_stream():
    """Behind a blocked stream the gradient is written late: another stream would read it stale."""
    params = make_params(SHAPES, device="cuda")
    optimizer, truth = LARS(params, **STRONG, backend="triton"), Truth(params, **STRONG)
    for p in params:
        p.grad = torch.zeros_like(p)
    blocker, caller = torch.cuda.Stream(), torch.cuda.Stream()
    for step in range(20):
        values = make_grads(params, step)
        torch.cuda.synchronize()
        with torch.cuda.stream(blocker):
            torch.cuda._sleep(SLEEP)
            gate = torch.cuda.Event()
            gate.record()
        with torch.cuda.stream(caller):
            caller.wait_event(gate)
            for p, value in zip(params, values, strict=True):
                p.grad.copy_(value)
            optimizer.step()
            result = copies(params)
        torch.cuda.synchronize()
        truth.step(values)
        assert same_bits(result, copies(params)), "the step was not done on the caller's stream"
    assert_true(params, truth, steps=20)


@pytest.mark.row(47)
def test_steps_on_changing_streams_are_ordered():
    params = make_params(SHAPES, device="cuda")
    optimizer, truth = LARS(params, **STRONG, backend="triton"), Truth(params, **STRONG)
    streams = [torch.cuda.Stream() for _ in range(2)]
    # The tables and the queue belong to the optimizer, which orders them; the tensors of the test
    # are the caller's, who waits by one event.
    done = torch.cuda.Event()
    done.record()
    for step in range(100):
        values = make_grads(params, step)
        torch.cuda.synchronize() if step % 10 == 0 else None
        with torch.cuda.stream(streams[step % 2]) as _:
            streams[step % 2].wait_event(done)
            streams[step % 2].wait_stream(torch.cuda.default_stream())
            for p, value in zip(params, values, strict=True):
                value.record_stream(streams[step % 2])
                p.grad = value
            optimizer.step()
            done = torch.cuda.Event()
            done.record()
        truth.step(values)
    torch.cuda.synchronize()
    assert_true(params, truth, steps=100)


@pytest.mark.row(47)
def test_freed_temporaries_are_not_read():
    """A gradient that is freed right after step() may be allocated again at once."""
    params = make_params(SHAPES, device="cuda")
    optimizer, truth = LARS(params, **STRONG, backend="triton"), Truth(params, **STRONG)
    for step in range(100):
        for p, value in zip(params, make_grads(params, step), strict=True):
            p.grad = value
        truth.step([p.grad for p in params])
        torch.cuda._sleep(SLEEP // 20)
        optimizer.step()
        optimizer.zero_grad()
        for p in params:
            torch.full_like(p, float("nan"))  # takes the memory that has just been freed
    assert_true(params, truth, steps=100)


@pytest.mark.row(49)
def test_a_thousand_steps_without_a_synchronisation():
    """The host runs far ahead: tables are overwritten while earlier copies are in flight."""
    params = make_params([(7,), (5,), (11_000,)], device="cuda")
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ahead, slow = (LARS(ps, **STRONG, backend="triton") for ps in (params, others))
    # Gradients at new addresses and a new rate every step: each step uploads both tables.
    draws = [make_grads(params, step) for step in range(16)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP * 10)
    for step in range(1000):
        ahead.param_groups[0]["lr"] = 0.1 + step % 13 * 0.01
        for p, g in zip(params, draws[step * 7 % 16], strict=True):
            p.grad = g
        ahead.step()
    for step in range(1000):
        slow.param_groups[0]["lr"] = 0.1 + step % 13 * 0.01
        for p, g in zip(others, draws[step * 7 % 16], strict=True):
            p.grad = g
        slow.step()
        torch.cuda.synchronize()
    assert same_bits(copies(params), copies(others))
