"""Tensors that cannot be updated: an error that names them, before anything is changed."""

import re

import pytest
import torch

from lars_fused import LARS
from tests.tools import (
    BOTH,
    STRONG,
    copies,
    make_grads,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
)

pytestmark = BOTH


def refuses(optimizer, params, text, position=1):
    """step() raises with the documented beginning, and nothing at all has changed."""
    weights = [p for i, p in enumerate(params) if i != position]
    before, state = copies(weights), [v.clone() if v is not None else None
                                      for v in momenta(optimizer, weights)]  # fmt: skip
    held = {p: dict(s) for p, s in optimizer.state.items()}
    where = re.escape(f"LARS: param_groups[0]['params'][{position}] (shape ")
    with pytest.raises(RuntimeError, match=f"^{where}.*{text}"):
        optimizer.step()
    assert same_bits(copies(weights), before)
    assert same_bits(momenta(optimizer, weights), state)
    assert {p: set(s) for p, s in optimizer.state.items()} == {p: set(s) for p, s in held.items()}


@pytest.mark.row(17)
@pytest.mark.parametrize("after", [0, 2])
def test_sparse_gradients_are_refused(after, backend, device):
    params = make_params([(3, 2), (4, 3), (2,)], device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, after)
    set_grads(params, after)
    params[1].grad = torch.ones_like(params[1]).to_sparse()
    refuses(optimizer, params, "sparse")
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()  # usable again


def unusual(kind, device):
    if kind == "expanded":
        return torch.ones(1, 3, device=device).expand(4, 3), "share memory"
    if kind == "overlapping":
        return torch.ones(9, device=device).as_strided((4, 3), (1, 2)), "share memory"
    if kind == "complex":
        return torch.ones(4, 3, dtype=torch.complex64, device=device), "complex"
    if kind == "sparse csr":  # torch allows a CSR gradient for such a parameter only
        return torch.ones(4, 3, device=device).to_sparse_csr(), "sparse"
    return torch.ones(4, 3, device="meta"), "meta device"


@pytest.mark.row(16, 17, 18, 20)
@pytest.mark.parametrize("kind", ["expanded", "overlapping", "complex", "sparse csr", "meta"])
def test_parameters_that_cannot_be_updated_are_refused(kind, any_backend, device):
    value, text = unusual(kind, device)
    params = make_params([(3, 2), (4, 3)], device=device)
    params[1] = torch.nn.Parameter(value)
    optimizer = LARS(params, **STRONG, backend=any_backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()  # without a gradient it is in nobody's way
    params[1].grad = torch.ones_like(params[1])
    refuses(optimizer, params, text)


@pytest.mark.row(19)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integer_parameters(dtype, any_backend, device):
    params = make_params([(3, 2), (4,)], device=device)
    params[1] = torch.zeros(4, dtype=dtype, device=device)
    optimizer = LARS(params, **STRONG, backend=any_backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not params[1].any()
    params[1].grad = torch.ones(4, dtype=dtype, device=device)
    refuses(optimizer, params, "dtype")


@pytest.mark.row(20)
def test_meta_parameters_work_once_they_have_memory(backend, device):
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = LARS(model.parameters(), **STRONG, backend=backend)
    optimizer.step()
    model.to_empty(device=device)
    fresh = list(model.parameters())
    optimizer.param_groups[0]["params"] = fresh
    with torch.no_grad():
        for p, q in zip(fresh, make_params([p.shape for p in fresh]), strict=True):
            p.copy_(q)
    other = make_params([p.shape for p in fresh], device=device)
    run(optimizer, fresh, 2)
    run(LARS(other, **STRONG, backend=backend), other, 2)
    assert same_bits(copies(fresh), copies(other))


@pytest.mark.row(21)
@pytest.mark.parametrize("gradient", [torch.int32, torch.complex64])
def test_gradients_of_a_dtype_without_meaning_are_refused(gradient, any_backend, device):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    params = make_params([(3, 2), (4,)], device=device)
    optimizer = LARS(params, **STRONG, backend=any_backend)
    set_grads(params)
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = torch.ones(4, dtype=gradient, device=device)
    refuses(optimizer, params, "gradient has dtype")


@pytest.mark.row(22)
@pytest.mark.parametrize("after", [0, 2])
def test_gradient_of_another_shape_is_refused(after, backend, device):
    params = make_params([(3, 2), (4,)], device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, after)
    set_grads(params, after)
    params[1].grad.data = torch.ones(2, 2, device=device)  # torch itself checks an assignment
    refuses(optimizer, params, "gradient has shape")


@pytest.mark.row(35)
@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
@pytest.mark.parametrize(
    ("value", "text"),
    [(torch.zeros(5), "has shape"), (torch.zeros(4, dtype=torch.int64), "dtype"), (3.0, "float")],
    ids=["shape", "dtype", "number"],
)
def test_state_that_does_not_fit_is_refused(key, value, text, backend, device):
    params = make_params([(3, 2), (4,)], torch.bfloat16, device)
    optimizer = LARS(params, **STRONG, master_weights=True, backend=backend)
    run(optimizer, params, 1)
    right = optimizer.state[params[1]][key]
    optimizer.state[params[1]][key] = value
    set_grads(params, 1)
    refuses(optimizer, params[:1], text, position=1)
    optimizer.state[params[1]][key] = right
    optimizer.step()


def test_a_forced_kernel_backend_never_falls_back(tier, device):
    if tier == "cpu":
        p = make_params([(3,)])[0]
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"cannot update it.*TRITON_INTERPRET"):
            LARS([p], backend="triton").step()
        return
    base = make_params([(4, 3)], device=device)[0].detach()
    cases = {
        "float64": torch.nn.Parameter(base.double()),
        "not adjacent": torch.nn.Parameter(base[:, ::2]),
    }
    for text, p in cases.items():
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=text):
            LARS([p], backend="triton").step()
    p = torch.nn.Parameter(base)
    p.grad = torch.ones(3, 4, device=device).t()
    with pytest.raises(RuntimeError, match="use equal strides"):
        LARS([p], backend="triton").step()


def test_the_error_names_the_parameter(backend, device):
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = LARS(model.named_parameters(), **STRONG, backend=backend)
    for p, g in zip(model.parameters(), make_grads(list(model.parameters())), strict=True):
        p.grad = g
    model.bias.grad = torch.ones(2, device=device).to_sparse()
    expected = (
        rf"param_groups\[0\]\['params'\]\[1\] \('bias', shape \(2,\), torch.float32, {device}"
    )
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
