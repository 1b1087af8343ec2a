"""Row 48: CUDA graph capture."""

import pytest
import torch

from lars_fused import LARS
from tests.tools import STRONG, copies, make_grads, make_params, same_bits, twins

pytestmark = pytest.mark.gpu

SHAPES = [(300, 40), (5,), (20_000,)]
CAPTURABLE = {**STRONG, "capturable": True}


def fixed_gradients(params):
    for p in params:
        p.grad = torch.zeros_like(p)


def fill(params, step):
    for p, value in zip(params, make_grads(params, step), strict=True):
        p.grad.copy_(value)


def captured(optimizer, params):
    """Warm up with one step on a side stream, as torch's documentation says, then capture one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.row(48)
def test_replays_equal_steps_and_see_gradients_and_rate():
    (a, graphed), (b, stepped) = twins(SHAPES, "cuda", "triton", **CAPTURABLE)
    rate = torch.tensor(0.5, device="cuda")
    graphed.param_groups[0]["lr"] = rate
    fixed_gradients(a)
    fixed_gradients(b)
    fill(a, 0)
    graph = captured(graphed, a)
    fill(b, 0)
    stepped.step()
    for step, lr in enumerate((0.5, 0.25, 0.0, 1.0), start=1):
        rate.fill_(lr)
        stepped.param_groups[0]["lr"] = lr
        fill(a, step)
        fill(b, step)
        graph.replay()
        stepped.step()
        assert same_bits(copies(a), copies(b)), f"after replay {step}"


@pytest.mark.row(48)
def test_new_tensors_and_steps_between_replays():
    (a, graphed), (b, stepped) = twins(SHAPES, "cuda", "triton", **CAPTURABLE)
    fixed_gradients(a)
    fixed_gradients(b)
    fill(a, 0)
    fill(b, 0)
    graph = captured(graphed, a)
    stepped.step()
    static = [p.grad for p in a]
    for step in range(1, 5):
        for p, g in zip(a, static, strict=True):
            p.grad = g
        fill(a, step)
        fill(b, step)
        graph.replay()
        stepped.step()
        junk = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(32)]
        for p, g in zip(a, make_grads(a, 100 + step), strict=True):  # at other addresses
            p.grad = g
        fill(b, 100 + step)
        graphed.step()
        stepped.step()
        del junk
    assert same_bits(copies(a), copies(b))


@pytest.mark.row(48, 37)
def test_a_capture_survives_a_rebuild_of_the_optimizer():
    """A group added and a state loaded later: the graph keeps the tables it was captured with."""
    (a, graphed), (b, stepped) = twins(SHAPES, "cuda", "triton", **CAPTURABLE)
    fixed_gradients(a)
    fixed_gradients(b)
    fill(a, 0)
    fill(b, 0)
    graph = captured(graphed, a)
    stepped.step()
    graphed.add_param_group({"params": make_params([(3,)], device="cuda")})
    graphed.step()
    stepped.step()
    torch.cuda.empty_cache()
    junk = [torch.full((4096,), float("nan"), device="cuda") for _ in range(256)]
    for step in range(1, 4):
        fill(a, step)
        fill(b, step)
        graph.replay()
        stepped.step()
    assert same_bits(copies(a), copies(b))
    del junk


@pytest.mark.row(48)
def test_capture_without_capturable_is_refused():
    params = make_params(SHAPES, device="cuda")
    optimizer = LARS(params, **STRONG, backend="triton")
    fixed_gradients(params)
    optimizer.step()
    before = copies(params)
    with (
        pytest.raises(RuntimeError, match="capturable=False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    torch.cuda.synchronize()
    assert same_bits(copies(params), before)
    optimizer.step()


@pytest.mark.row(48)
def test_capture_without_a_warm_up_is_refused():
    params = make_params(SHAPES, device="cuda")
    optimizer = LARS(params, **CAPTURABLE, backend="triton")
    fixed_gradients(params)
    with pytest.raises(RuntimeError, match="warm-up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()


@pytest.mark.row(48)
def test_two_captures_need_a_step_between_them():
    (a, graphed), (b, stepped) = twins(SHAPES, "cuda", "triton", **CAPTURABLE)
    fixed_gradients(a)
    fixed_gradients(b)
    fill(a, 0)
    fill(b, 0)
    first = captured(graphed, a)
    second = captured(graphed, a)  # its warm-up is the step between
    stepped.step()
    stepped.step()
    for step, graph in enumerate((first, second, first), start=1):
        fill(a, step)
        fill(b, step)
        graph.replay()
        stepped.step()
    assert same_bits(copies(a), copies(b))
    with (
        pytest.raises(RuntimeError, match="outside of a capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        graphed.step()
    torch.cuda.synchronize()


@pytest.mark.row(28, 48)
def test_overflow_in_a_replay_changes_nothing():
    params = make_params(SHAPES, device="cuda")
    optimizer = LARS(params, **CAPTURABLE, backend="triton")
    fixed_gradients(params)
    fill(params, 0)
    optimizer.grad_scale = torch.full((1,), 4.0, device="cuda")
    optimizer.found_inf = torch.zeros(1, device="cuda")
    graph = captured(optimizer, params)
    graph.replay()
    before = copies(params)
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert same_bits(copies(params), before)
    assert same_bits([optimizer.state[p]["momentum_buffer"] for p in params], moments)
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert not same_bits(copies(params), before)
