"""Rows 4, 22, 34 and 35 on a GPU: where tensors are, and which device is current."""

import pytest
import torch

from lars_fused import LARS
from tests.oracle import Truth, assert_true
from tests.tools import (
    STRONG,
    copies,
    make_grads,
    make_params,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = pytest.mark.gpu

SHAPES = [(3, 4), (5,), (20_000,)]
several_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs: torch.cuda finds fewer"
)


@pytest.mark.row(22)
@several_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("of", [0, 1])
def test_current_device_times_tensor_device(current, of):
    params = make_params(SHAPES, device=f"cuda:{of}")
    truth, optimizer = Truth(params, **STRONG), LARS(params, **STRONG, backend="triton")
    with torch.cuda.device(current):
        for step in range(2):
            grads = make_grads(params, step)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
            truth.step(grads)
        assert torch.cuda.current_device() == current
    assert_true(params, truth, steps=2)


@pytest.mark.row(22)
@several_gpus
def test_parameters_on_two_gpus_and_the_cpu_in_one_optimizer():
    places = ["cuda:0", "cuda:1", "cpu"]
    params = [p for where in places for p in make_params(SHAPES[:2], device=where)]
    truth, optimizer = Truth(params, **STRONG), LARS(params, **STRONG)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        truth.step([p.grad for p in params])
    assert_true(params, truth, steps=2)


@pytest.mark.row(22)
def test_a_gpu_and_the_cpu_in_one_optimizer():
    params = [p for where in ("cuda", "cpu") for p in make_params(SHAPES[:2], device=where)]
    truth, optimizer = Truth(params, **STRONG), LARS(params, **STRONG)
    assert optimizer.backend == "triton+torch"
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        truth.step([p.grad for p in params])
    assert_true(params, truth, steps=2)


@pytest.mark.row(22)
def test_gradient_on_another_device_is_refused():
    params = make_params(SHAPES[:2], device="cuda")
    optimizer = LARS(params, **STRONG)
    run(optimizer, params, 1)
    set_grads(params, 1)
    params[1].data = params[1].data.cpu()  # its gradient stays behind
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"\[1\].*its gradient is on cuda"):
        optimizer.step()
    assert same_bits(copies(params), before)


@pytest.mark.row(4)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_lr_tensor_on_either_device(shape, dtype, where):
    (a, tensor), (b, number) = twins(SHAPES, "cuda", "triton", **STRONG)
    tensor.param_groups[0]["lr"] = torch.full(shape, 0.5, dtype=dtype, device=where)
    for rate in (0.5, 0.25, 0.0):
        tensor.param_groups[0]["lr"].fill_(rate)
        number.param_groups[0]["lr"] = rate
        run(tensor, a, 1)
        run(number, b, 1)
    assert same_bits(copies(a), copies(b))


@pytest.mark.row(34)
@pytest.mark.parametrize(("start", "end"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("masters", [False, True])
def test_a_model_moved_with_its_state(start, end, masters):
    dtype = torch.bfloat16 if masters else torch.float32
    options = {**STRONG, "master_weights": masters}
    model = torch.nn.Linear(4, 3).to(start, dtype)
    params = list(model.parameters())
    optimizer = LARS(params, **options)
    run(optimizer, params, 2)
    model.to(end)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    still = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
    other = LARS(still, **options, backend="torch")
    other.load_state_dict(optimizer.state_dict())
    for p in params:
        p.grad = None
    run(optimizer, params, 2, first=2)
    run(other, still, 2, first=2)
    for p, q in zip(params, still, strict=True):
        bound = {"rtol": 2**-7, "atol": 1e-6} if masters else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(p.cpu(), q, **bound)
    assert all(v.device.type == end for s in optimizer.state.values() for v in s.values())


@pytest.mark.row(35)
def test_state_on_the_cpu_for_a_gpu_parameter_is_moved():
    (a, moved), (b, kept) = twins(SHAPES, "cuda", "triton", **STRONG)
    run(moved, a, 1)
    run(kept, b, 1)
    for s in moved.state.values():
        s["momentum_buffer"] = s["momentum_buffer"].cpu()
    run(moved, a, 1, first=1)
    run(kept, b, 1, first=1)
    assert same_bits(copies(a), copies(b))


@pytest.mark.row(35)
def test_checkpoint_from_the_cpu():
    (a, gpu), (b, kept) = twins(SHAPES, "cuda", "triton", **STRONG)
    run(gpu, a, 2)
    run(kept, b, 2)
    saved = gpu.state_dict()
    for s in saved["state"].values():
        s["momentum_buffer"] = s["momentum_buffer"].cpu()
    resumed = LARS(a, backend="triton")
    resumed.load_state_dict(saved)
    run(resumed, a, 1, first=2)
    run(kept, b, 1, first=2)
    assert same_bits(copies(a), copies(b))
