"""Values at the ends of a dtype's range, zeros, NaN and infinities."""

import math

import pytest
import torch

from lars_fused import LARS
from tests.oracle import Truth, assert_true
from tests.tools import (
    COMPILED,
    STRONG,
    copies,
    make_grads,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
)

pytestmark = COMPILED

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# dtype, size of the weights, size of the gradients. Squares of most leave the range of fp32.
EXTREMES = [
    (F32, 3e19, 1.0), (F32, 1.0, 3e19), (F32, 3e18, 3e18), (F32, 3e19, 3e19), (F32, 1e-25, 1.0),
    (F32, 1.0, 1e-25), (F32, 1e-23, 1e-23), (F32, 1e-40, 1.0), (F32, 1.0, 1e-40),
    (F32, 1e-40, 1e-40), (F32, 1e3, 1e-40), (F32, 1e37, 1e37), (F16, 3000.0, 1.0),
    (F16, 1.0, 3000.0), (F16, 3000.0, 3000.0), (F16, 1e-6, 1.0), (F16, 1.0, 1e-6),
    (F16, 1e-6, 1e-6), (BF16, 1e19, 1.0), (BF16, 1.0, 1e19), (BF16, 1e19, 1e19),
    (BF16, 1e-39, 1e-39), (BF16, 1e30, 1e-30), (BF16, 1e-30, 1e37),
    (BF16, 1e37, 1e-37), (F32, 1e35, 1e-40),
]  # fmt: skip


def scaled(values, size, dtype, device):
    return (values * size).to(device, dtype)


@pytest.mark.row(24)
@pytest.mark.parametrize(("dtype", "w_size", "g_size"), EXTREMES, ids=str)
@pytest.mark.parametrize("denominator", ["sum", "decayed", "gradient"])
def test_finite_input_of_any_size_agrees_with_float64(
    dtype, w_size, g_size, denominator, backend, device
):
    draw = torch.Generator().manual_seed(5)
    values = [torch.rand(6, generator=draw, dtype=torch.float64) + 0.5 for _ in range(3)]
    p = torch.nn.Parameter(scaled(values[0], w_size, dtype, device))
    # A decay that does not drown the gradient, and no eps that would hide the norms. Over the
    # gradient's norm alone a decayed weight may grow without bound, in exact arithmetic too.
    decay = 0.0 if denominator == "gradient" else 1e-4
    options = {**STRONG, "eps": 0.0, "denominator": denominator, "weight_decay": decay}
    truth, optimizer = Truth([p], **options), LARS([p], **options, backend=backend)
    for value in values[1:]:
        p.grad = scaled(value, g_size, dtype, device)
        optimizer.step()
        truth.step([p.grad])
    assert_true([p], truth, steps=2)
    w_norm = optimizer.layer_stats()[0].weight_norm
    assert math.isfinite(w_norm)
    assert w_norm > 0


@pytest.mark.interpret
@pytest.mark.row(24)
def test_one_extreme_chunk_among_ordinary_ones(backend, device, small_chunks):
    for size in (1e30, 1e-30):
        p = make_params([(700,)], device=device)[0]
        with torch.no_grad():
            p[256:512] *= size
        truth, optimizer = Truth([p], **STRONG), LARS([p], **STRONG, backend=backend)
        set_grads([p])
        optimizer.step()
        truth.step([p.grad])
        assert_true([p], truth)


@pytest.mark.row(25)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("zero", ["weights", "gradients", "both"])
@pytest.mark.parametrize("denominator", ["sum", "decayed", "gradient"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zeros(eps, zero, denominator, decay, backend, device):
    params = make_params([(5,), (3,)], device=device)
    grads = make_grads(params)
    if zero != "gradients":
        params[0].data.zero_()
    if zero != "weights":
        grads[0].zero_()
    options = {**STRONG, "eps": eps, "denominator": denominator, "weight_decay": decay}
    truth, optimizer = Truth(params, **options), LARS(params, **options, backend=backend)
    before = copies(params)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(grads)
        if zero == "weights":
            assert bool((params[0] != before[0]).all())
            if not optimizer.layer_stats()[0].weight_norm:
                assert optimizer.layer_stats()[0].trust_ratio == 1.0
        elif zero == "both" or decay == 0:
            assert torch.equal(params[0], before[0])
    assert_true(params, truth, steps=2)


@pytest.mark.interpret
@pytest.mark.row(26, 27)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["gradient", "weight", "momentum"])
def test_a_bad_element_stays_in_its_tensor(bad, of, backend, device, small_chunks):
    shapes = [(3, 2), (600,), (4,)]
    spoilt, clean = (make_params(shapes, device=device) for _ in range(2))
    optimizers = [LARS(ps, **STRONG, backend=backend) for ps in (spoilt, clean)]
    for params, optimizer in zip((spoilt, clean), optimizers, strict=True):
        run(optimizer, params, 1)
        set_grads(params, 1)
    where = {
        "gradient": spoilt[1].grad,
        "weight": spoilt[1].data,
        "momentum": momenta(optimizers[0], spoilt)[1],
    }[of]
    where[300] = bad
    for optimizer in optimizers:
        optimizer.step()
    for i in (0, 2):
        assert same_bits([spoilt[i]], [clean[i]])
        assert same_bits(momenta(optimizers[0], spoilt)[i : i + 1],
                         momenta(optimizers[1], clean)[i : i + 1])  # fmt: skip
    assert not torch.isfinite(spoilt[1][300])
    stats = optimizers[0].layer_stats()
    if of == "gradient":
        assert not math.isfinite(stats[1].gradient_norm)
    if of == "weight":
        assert not math.isfinite(stats[1].weight_norm)
    assert all(math.isfinite(x) for i in (0, 2) for x in stats[i])
