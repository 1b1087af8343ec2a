"""fp16 and bf16 storage beside fp32 arithmetic: parameters, gradients, momentum, masters, norms."""

import pytest
import torch

from bench.variants import set_gradient
from lars_fused import LARS
from tests import oracle
from tests.cases import leave_to_the_interpreter
from tests.tools import COMPILED

pytestmark = COMPILED

LOW = [torch.float16, torch.bfloat16]
OPTIONS = {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.05}
SHAPES = [(3, 5), (9,)]


def values(seed, dtype, device, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=generator)).to(device, dtype) for s in SHAPES]


def parameters(dtype, device):
    return [torch.nn.Parameter(t) for t in values(0, dtype, device)]


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        set_gradient(p, g.clone())
    optimizer.step()
    for p, g in zip(params, grads, strict=True):
        assert torch.equal(p.grad, g)


def truth_of(w, g, v):
    return oracle.in_float64(w, g, v, {**oracle.DEFAULTS, **OPTIONS})


def assert_stored(actual, wide):
    """Equal to the float64 value in the dtype of storage, one ulp apart at most."""
    one_ulp = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual.detach().cpu().double(), wide.to(actual.dtype).double(), rtol=one_ulp, atol=1e-7
    )


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("momentum_dtype", [torch.float32, *LOW], ids=str)
def test_momentum_has_its_own_dtype(dtype, momentum_dtype, backend, device, tier):
    leave_to_the_interpreter(tier, dtype, dtype, momentum_dtype)
    params = parameters(dtype, device)
    optimizer = LARS(params, **OPTIONS, momentum_dtype=momentum_dtype, backend=backend)
    for t in range(3):
        grads = values(10 + t, dtype, device)
        held = [optimizer.state[p].get("momentum_buffer") for p in params]
        expected = [truth_of(*each) for each in zip(params, grads, held, strict=True)]
        step(optimizer, params, grads)
        for p, (w, v) in zip(params, expected, strict=True):
            assert optimizer.state[p]["momentum_buffer"].dtype == momentum_dtype
            assert_stored(p, w)
            assert_stored(optimizer.state[p]["momentum_buffer"], v)


def test_the_default_momentum_is_fp32(backend, device):
    params = parameters(torch.bfloat16, device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    step(optimizer, params, values(1, torch.bfloat16, device))
    for p in params:
        assert set(optimizer.state[p]) == {"momentum_buffer"}
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_masters_train_as_fp32_does_and_the_parameters_are_their_copies(dtype, backend, device):
    """The same gradients into fp32 parameters: masters and momentum are bitwise theirs."""
    options = {**OPTIONS, "lr": 0.05}  # steps below half an ulp of the low precision
    params = parameters(dtype, device)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    start = [p.detach().clone() for p in params]
    low = LARS(params, **options, master_weights=True, backend=backend)
    full = LARS(wide, **options, backend=backend)
    for t in range(3):
        grads = values(10 + t, dtype, device)
        step(low, params, grads)
        step(full, wide, [g.float() for g in grads])
        for p, w in zip(params, wide, strict=True):
            assert set(low.state[p]) == {"momentum_buffer", "master_param"}
            assert low.state[p]["master_param"].dtype == torch.float32
            assert torch.equal(low.state[p]["master_param"], w)
            assert torch.equal(low.state[p]["momentum_buffer"], full.state[w]["momentum_buffer"])
            assert torch.equal(p, w.to(dtype))
    if dtype == torch.bfloat16:  # the point of masters: bf16 alone would not have seen this
        pairs = list(zip(params, start, strict=True))
        assert all((low.state[p]["master_param"] != s.float()).all() for p, s in pairs)
        assert any((p == s).any() for p, s in pairs)


def test_masters_of_parameters_that_need_none(backend, device):
    p = torch.nn.Parameter(torch.ones(2, 3, device=device))
    optimizer = LARS([p], master_weights=True, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state[p]) == {"momentum_buffer"}


def test_masters_and_plain_parameters_step_together(backend, device):
    """bf16, fp16 and fp32 in one group are what they are apart."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    joint, apart = ([torch.nn.Parameter(values(i, d, device)[0]) for i, d in enumerate(dtypes)]
                    for _ in range(2))  # fmt: skip
    one = LARS(joint, **OPTIONS, master_weights=True, backend=backend)
    many = [LARS([p], **OPTIONS, master_weights=True, backend=backend) for p in apart]
    for t in range(2):
        grads = [values(20 + t, d, device)[0] for d in dtypes]
        step(one, joint, grads)
        for optimizer, p, g in zip(many, apart, grads, strict=True):
            step(optimizer, [p], [g])
    for p, q in zip(joint, apart, strict=True):
        assert torch.equal(p, q)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_take_low_precision_gradients(dtype, backend, device, tier):
    leave_to_the_interpreter(tier, torch.float32, dtype, torch.float32)
    params, wide = (parameters(torch.float32, device) for _ in range(2))
    low = LARS(params, **OPTIONS, backend=backend)
    full = LARS(wide, **OPTIONS, backend=backend)
    for t in range(2):
        grads = values(10 + t, dtype, device)
        step(low, params, grads)
        step(full, wide, [g.float() for g in grads])
        for p, w in zip(params, wide, strict=True):
            assert torch.equal(p, w)


def test_low_precision_parameters_take_fp32_gradients(backend, device):
    """Not rounded to the parameter's dtype on the way: those below bf16's ulp still count."""
    params = parameters(torch.bfloat16, device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    grads = [1 + g * 1e-4 for g in values(10, torch.float32, device)]
    expected = [truth_of(p, g, None) for p, g in zip(params, grads, strict=True)]
    step(optimizer, params, grads)
    for p, (_, v) in zip(params, expected, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"].cpu().double()
        torch.testing.assert_close(buffer, v, rtol=1e-6, atol=0)


def test_a_norm_that_fp16_cannot_hold(backend, device):
    """1,000 elements of 3,000 and of 2,500: both norms pass 65,504."""
    p = torch.nn.Parameter(torch.full((40, 25), 3000.0, dtype=torch.float16, device=device))
    optimizer = LARS([p], momentum=0.0, trust_coefficient=0.1, backend=backend)
    p.grad = torch.full_like(p, 2500.0)
    optimizer.step()
    stats = optimizer.layer_stats()[0]
    assert stats.weight_norm == pytest.approx(3000 * 1000**0.5, rel=1e-6)
    assert stats.gradient_norm == pytest.approx(2500 * 1000**0.5, rel=1e-6)
    assert stats.trust_ratio == pytest.approx(0.1 * 3000 / 2500, rel=1e-6)
    torch.testing.assert_close(p.detach(), torch.full_like(p, 3000 - 0.12 * 2500))


def test_a_loss_scale_beyond_fp16_is_divided_out_in_fp32(backend, device):
    """Scaled gradients near fp16's top, whose norm and whose square pass it."""
    p, q = (torch.nn.Parameter(values(0, torch.float16, device)[0]) for _ in range(2))
    scale = 2.0**15
    g = values(1, torch.float16, device)[0]
    optimizers = [LARS([x], **OPTIONS, backend=backend) for x in (p, q)]
    p.grad, q.grad = g.clone(), g * scale
    assert q.grad.isfinite().all()
    assert not q.grad.norm().isfinite()
    optimizers[1].grad_scale = torch.tensor(scale, device=device)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(q, p)
    assert optimizers[1].layer_stats()[0].gradient_norm == pytest.approx(
        g.float().norm().item(), rel=1e-6
    )
