"""N(g + βw) of a step that did not need it, found afterwards from what the step left."""

import math

import pytest
import torch

from lars_fused import LARS
from tests.cases import OPTIONS, TERMS
from tests.tools import make_params, set_grads

pytestmark = pytest.mark.cpu

# Rows of a batch, a batch of its own row length, and a window.
SHAPES = [(3, 2), (40, 5), (70, 80), (300, 101)]


def stepped(steps=2, dtype=torch.float32, **options):
    """An optimizer after some steps, and N(g + βw) before the last of them."""
    params = make_params(SHAPES, dtype=dtype)
    optimizer = LARS(params, **{**TERMS, **options}, backend="torch")
    truth = []
    for step in range(steps):
        set_grads(params, step)
        decay, sign = (
            optimizer.defaults["weight_decay"],
            -1 if optimizer.defaults["maximize"] else 1,
        )
        truth = [float((sign * p.grad.double() + decay * p.double()).norm()) for p in params]
        optimizer.step()
    return params, optimizer, truth


def decayed(optimizer):
    return [row.decayed_norm for row in optimizer.layer_stats().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_what_it_was_before_the_step(name, dtype):
    options = {k: v for k, v in OPTIONS[name].items() if k != "lr"}
    _, optimizer, truth = stepped(dtype=dtype, **options)
    # A bf16 weight was rounded by the step: by 2^-9 of itself, and w is part of d.
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert decayed(optimizer) == pytest.approx(truth, rel=rtol)


def test_with_a_loss_scale_it_is_of_the_unscaled_gradient():
    params = make_params(SHAPES)
    set_grads(params)
    decay = TERMS["weight_decay"]
    truth = [float((p.grad.double() / 8 + decay * p.double()).norm()) for p in params]
    optimizer = LARS(params, **TERMS, backend="torch")
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert decayed(optimizer) == pytest.approx(truth, rel=1e-5)


def test_a_learning_rate_that_was_changed_since_does_not_matter():
    _, optimizer, truth = stepped(lr=torch.tensor(0.1), lr_in_momentum=False)
    optimizer.param_groups[0]["lr"].fill_(7.0)
    assert decayed(optimizer) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("what", ["weight", "gradient", "momentum"])
def test_of_a_tensor_that_was_written_since_it_is_not_known(what):
    params, optimizer, truth = stepped()
    p = params[1]
    written = {
        "weight": p.data, "gradient": p.grad, "momentum": optimizer.state[p]["momentum_buffer"]
    }[what]  # fmt: skip
    written.view(-1)[0] += 1.0  # .data hides this from autograd's version counter
    found = decayed(optimizer)
    assert math.isnan(found.pop(1))
    del truth[1]
    assert found == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("blurs", "seen"), [(1.5, False), (5.0, True)])
def test_a_write_is_told_from_twice_what_rounding_may_be(blurs, seen):
    """Momentum of bf16 that took the whole step: w = w' + v, up to half an ulp of v."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64))
    p.grad = torch.randn_like(p)
    truth = float((p.grad.double() + 1e-3 * p.detach().double()).norm())
    optimizer = LARS([p], 0.1, weight_decay=1e-3, adapt=False, momentum_dtype=torch.bfloat16,
                     backend="torch")  # fmt: skip
    optimizer.step()
    lost = 2**-8 * float(optimizer.state[p]["momentum_buffer"].double().norm())
    p.data.mul_(1 + blurs * lost / float(p.detach().norm()))
    (found,) = decayed(optimizer)
    assert math.isnan(found) if seen else found == pytest.approx(truth, rel=1e-2)


def test_without_gradients_it_is_not_known():
    _, optimizer, _ = stepped()
    optimizer.zero_grad()
    rows = optimizer.layer_stats().values()
    assert all(math.isnan(row.decayed_norm) for row in rows)
    assert all(row.gradient_norm > 0 < row.weight_norm for row in rows)


def test_a_denominator_that_needs_it_keeps_it():
    _, optimizer, truth = stepped(denominator="decayed")
    optimizer.zero_grad()
    assert decayed(optimizer) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_with_a_zero_norm(zero):
    params = make_params(SHAPES)
    set_grads(params)
    for p in params:
        (p.data if zero == "weight" else p.grad).zero_()
    decay = TERMS["weight_decay"]
    truth = [float((p.grad.double() + decay * p.double()).norm()) for p in params]
    optimizer = LARS(params, **TERMS, backend="torch")
    optimizer.step()
    assert decayed(optimizer) == pytest.approx(truth, rel=1e-5)


# A large step, or momentum of few bits, leaves less of the weights than their rounding alone would.
BLURRED = {
    "bfloat16 momentum": {"lr": 20.0, "weight_decay": 1e-2, "momentum_dtype": torch.bfloat16},
    "a step beyond the weights": {"lr": 1000.0, "weight_decay": 1e-4, "adapt": False},
    "a step far beyond the weights": {"lr": 3e4, "weight_decay": 1e-4, "adapt": False},
    "nesterov": {"lr": 1000.0, "weight_decay": 1e-4, "adapt": False, "nesterov": True},
    "no weights left, and little decay": {
        "lr": 1e4, "weight_decay": 1e-4, "adapt": False, "momentum": 0.0
    },
    "weights lost in a step of few bits": {
        "lr": 1e6, "weight_decay": 1e-4, "adapt": False, "momentum_dtype": torch.bfloat16
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BLURRED)
def test_rounding_is_not_taken_for_writing(name):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = LARS([p], **BLURRED[name], backend="torch")
    decay = BLURRED[name]["weight_decay"]
    for _ in range(8):
        p.grad = torch.randn_like(p)
        before = p.detach().double()
        if float(before.norm()) > 1e5:  # the weights have exploded: begin anew
            p.data.normal_()
            before = p.detach().double()
        truth = float((p.grad.double() + decay * before).norm())
        optimizer.step()
        assert decayed(optimizer) == pytest.approx([truth], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_a_million_elements(dtype):
    """Their norms were summed in fp32, in blocks."""
    p = torch.nn.Parameter(torch.randn(1024, 1024).to(dtype))
    p.grad = torch.randn_like(p)
    truth = float((p.grad.double() + 0.1 * p.detach().double()).norm())
    optimizer = LARS([p], 0.1, weight_decay=0.1, backend="torch")
    optimizer.step()
    assert decayed(optimizer) == pytest.approx([truth], rel=1e-4)


@pytest.mark.parametrize(("lr", "known"), [(5e4, True), (2e5, False)])
def test_it_may_be_off_by_a_hundredth_and_no_more(lr, known):
    """Weights and momentum are rounded to the size of the step, lr·N(g), and w counts for 0.1.

    Half an ulp of each, and four of the arithmetic with each: 9 · 2^-23 · lr · 0.1 = 0.5 % and 2 %.
    """
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64))
    p.grad = torch.randn_like(p)
    optimizer = LARS([p], lr, weight_decay=0.1, adapt=False, backend="torch")
    optimizer.step()
    assert math.isnan(*decayed(optimizer)) != known


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"nesterov": True}])
def test_where_the_step_left_nothing_of_the_weights_it_is_not_known(options):
    """w' = w - (g + w): any w gives the same, but for the momentum of before."""
    p = torch.nn.Parameter(torch.randn(64, 64))
    p.grad = torch.randn_like(p)
    optimizer = LARS([p], 1.0, weight_decay=1.0, adapt=False, backend="torch", **options)
    optimizer.step()
    assert math.isnan(*decayed(optimizer))
