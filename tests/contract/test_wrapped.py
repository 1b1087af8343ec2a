"""Tensors without memory of their own, such as torchao's float8 and int8 weights.

No kernel gets an address that is none, and the step is right or refused.
"""

import pytest
import torch

from lars_fused import LARS, lars_step, multi_tensor_l2norm
from tests import internals
from tests.contract.wrapped_tensors import Deaf, ReadOnly, Wrapped
from tests.tools import BOTH

pytestmark = BOTH


def pair(kind, device, **how):
    w = torch.randn(3, 5, device=device)
    return torch.nn.Parameter(kind(w.clone(), **how)), torch.nn.Parameter(w.clone())


@pytest.mark.parametrize("offset", [0, 4], ids=["at 0", "at 16"])
@pytest.mark.parametrize("wrapped_gradient", [False, True], ids=["plain grad", "wrapped grad"])
def test_a_step_of_wrapped_parameters_is_that_of_plain_ones(wrapped_gradient, offset, device):
    """An offset makes an address that is not 0, and not real either."""
    p, q = pair(Wrapped, device, offset=offset)
    other, same = (torch.nn.Parameter(torch.ones(4, 2, device=device)) for _ in range(2))
    options = {"lr": 1.0, "weight_decay": 0.1, "trust_coefficient": 0.05}
    mine, plain = LARS([p, other], **options), LARS([q, same], **options, backend="torch")
    for _ in range(3):
        q.grad = torch.randn(3, 5, device=device)
        p.grad = Wrapped(q.grad.clone()) if wrapped_gradient else q.grad.clone()
        other.grad = same.grad = torch.randn(4, 2, device=device)
        mine.step()
        plain.step()
    torch.testing.assert_close(p.inner, q.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other, same, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_becomes_a_wrapper_on_the_way(device):
    p = torch.nn.Parameter(torch.ones(3, 5, device=device))
    q = torch.nn.Parameter(p.detach().clone())
    mine, plain = LARS([p], 1.0), LARS([q], 1.0, backend="torch")
    for step in range(4):
        q.grad = torch.randn(3, 5, device=device)
        p.grad = Wrapped(q.grad.clone()) if step in (1, 2) else q.grad.clone()
        mine.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [ReadOnly, Deaf])
def test_what_torch_operations_cannot_update_is_refused_before_anything(kind, device, monkeypatch):
    """Also where kernels would update the other parameters first."""
    launched = internals.record_launches(monkeypatch)
    p, _ = pair(kind, device)
    other = torch.nn.Parameter(torch.ones(4, 2, device=device))
    p.grad, other.grad = torch.ones(3, 5, device=device), torch.ones(4, 2, device=device)
    optimizer = LARS([("odd", p), ("other", other)], 1.0)
    before = p.inner.clone()
    with pytest.raises(RuntimeError, match=f"'odd'.*cannot update it as a .*{kind.__name__}"):
        optimizer.step()
    assert torch.equal(p.inner, before)
    assert torch.equal(other, torch.ones_like(other))
    assert launched == []
    assert not optimizer.state


def test_forced_kernels_refuse_with_the_reason(backend, device):
    if backend != "triton":
        pytest.skip("needs kernels that could run")
    p, _ = pair(Wrapped, device)
    p.grad = torch.ones(3, 5, device=device)
    with pytest.raises(RuntimeError, match="Wrapped, which has no memory of its own"):
        LARS([p], 1.0, backend="triton").step()
    with pytest.raises(RuntimeError, match="Wrapped, which has no memory of its own"):
        lars_step([p.detach()], [p.grad], [None], backend="triton")
    with pytest.raises(RuntimeError, match="Wrapped, which has no memory of its own"):
        multi_tensor_l2norm([p.detach()], backend="triton")


def test_norms_of_wrapped_tensors(device):
    p, q = pair(Wrapped, device)
    found = multi_tensor_l2norm([p.detach(), q.detach()])
    torch.testing.assert_close(found[0], found[1])
