"""Hyper-parameters: what is refused, where, and that every one of them does something."""

import functools

import pytest
import torch

from lars_fused import LARS
from tests.cases import leave_to_the_interpreter
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
    twins,
)

pytestmark = COMPILED

SHAPES = [(5, 3), (4,)]


# ------------------------------------------------------------------ rows 1 and 2: parameters


@pytest.mark.row(1)
@pytest.mark.parametrize(
    ("params", "error"),
    [
        (torch.zeros(2, requires_grad=True), TypeError),
        ([], ValueError),
        ([1.0], TypeError),
        (["w"], TypeError),
        ([{"params": {torch.zeros(2, requires_grad=True)}}], TypeError),
        ([{"lr": 1.0}], KeyError),
    ],
    ids=["bare tensor", "empty", "number", "text", "set in group", "group without params"],
)
def test_parameters_of_the_wrong_kind_are_refused(params, error, backend):
    with pytest.raises(error):
        LARS(params, backend=backend)


@pytest.mark.row(2)
def test_non_leaf_and_doubled_and_half_named_parameters_are_refused(backend):
    a, b = make_params(SHAPES)
    with pytest.raises(ValueError, match="leaf"):
        LARS([a * 2], backend=backend)
    with pytest.raises(ValueError, match=r"duplicate|more than one parameter group"):
        LARS([{"params": [a]}, {"params": [a, b]}], backend=backend)
    with pytest.raises(ValueError, match="names"):
        LARS([("a", a), b], backend=backend)


# ------------------------------------------------------------------ rows 3 to 5: bad values


@pytest.mark.row(3)
def test_step_refuses_what_was_edited_between_two_steps(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, backend=backend)
    run(optimizer, params, 1)
    before, moments = copies(params), [v.clone() for v in momenta(optimizer, params)]
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert same_bits(copies(params), before)
    assert same_bits(momenta(optimizer, params), moments)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not same_bits(copies(params), before)


@pytest.mark.row(4)
def test_lr_tensor_of_two_elements_is_refused_everywhere(backend, device):
    a, b = make_params(SHAPES, device=device)
    two = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"^LARS: .*Tensor lr must be 1-element; "):
        LARS([a], lr=two, backend=backend)
    optimizer = LARS([a], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"^LARS: .*Tensor lr must be 1-element; "):
        optimizer.add_param_group({"params": [b], "lr": two})
    set_grads([a])
    optimizer.param_groups[0]["lr"] = two
    with pytest.raises(ValueError, match=r"^LARS: .*Tensor lr must be 1-element; "):
        optimizer.step()
    with pytest.raises(TypeError, match="floating-point"):
        LARS([a], lr=torch.tensor(1), backend=backend)
    with pytest.raises(ValueError, match="lr"):
        LARS([a], lr=torch.tensor(float("nan")), backend=backend)


@pytest.mark.row(4)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [True, False])
def test_lr_tensor_equals_the_float(shape, dtype, inside, backend, device):
    # A 0-dim parameter shows a learning rate that broadcasts; a second group a mixed list.
    lr = torch.full(shape, 0.25, dtype=dtype)
    results = []
    for rate in (0.25, lr):
        params = make_params([(3,), (), (2,)], device=device)
        groups = [{"params": params[:2], "lr": rate}, {"params": params[2:]}]
        optimizer = LARS(
            groups, lr=0.5, weight_decay=0.1, lr_in_momentum=inside, trust_clip=True,
            backend=backend,
        )  # fmt: skip
        run(optimizer, params, 2)
        results.append(copies(params))
    assert same_bits(*results)


@pytest.mark.interpret
@pytest.mark.row(4)
def test_lr_tensor_edited_in_place_is_seen(backend, device):
    (a, tensor), (b, number) = twins([(4,)], device, backend, lr=0.5)
    tensor.param_groups[0]["lr"] = torch.tensor(0.5)
    truth = Truth(a)
    for rate in (0.5, 0.25, 0.0, 1.5):
        tensor.param_groups[0]["lr"].fill_(rate)
        number.param_groups[0]["lr"] = rate
        run(tensor, a, 1)
        run(number, b, 1)
        truth.step([p.grad for p in a], lr=rate)
        assert same_bits(copies(a), copies(b))
    assert_true(a, truth, steps=4)


@pytest.mark.row(5)
@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(options, backend):
    with pytest.raises(ValueError, match="nesterov"):
        LARS(make_params(SHAPES), nesterov=True, **options, backend=backend)


@pytest.mark.parametrize(
    "options", [{"backend": "cuda"}, {"backend": None}, {"momentum_dtype": torch.int32}]
)
def test_engine_options_are_checked(options):
    with pytest.raises(ValueError, match="must be one of"):
        LARS(make_params(SHAPES), **options)


def test_engine_options_are_no_group_options(backend):
    a, b = make_params(SHAPES)
    optimizer = LARS([a], backend=backend)
    with pytest.raises(ValueError, match="momentum_dtype"):
        optimizer.add_param_group({"params": [b], "momentum_dtype": torch.bfloat16})


# ------------------------------------------------------------------ row 6: options that act

CHANGES = [
    {"lr": 0.7}, {"momentum": 0.5}, {"momentum": 0.0}, {"weight_decay": 0.3},
    {"trust_coefficient": 0.1}, {"eps": 0.5}, {"dampening": 0.3}, {"nesterov": True},
    {"denominator": "decayed"}, {"denominator": "gradient"}, {"lr_in_momentum": False},
    {"trust_clip": True}, {"decay_zero_norm": False}, {"adapt": False}, {"maximize": True},
    {"momentum_dtype": torch.bfloat16},
]  # fmt: skip


def three_steps(device, backend, options, per_group=False):
    """Two changed learning rates and one gradient of zeros: each option has a chance to act."""
    params = make_params([(6,), (5,)], device=device)
    base = {**STRONG, "trust_coefficient": 0.6}
    first, later = (base, options) if per_group else ({**base, **options}, {})
    optimizer = LARS([{"params": params, **later}], **first, backend=backend)
    truth = Truth(params, **{**base, **options})
    for step, factor in enumerate((1.0, 0.5, 2.0)):
        rate = {**base, **options}["lr"] * factor
        optimizer.param_groups[0]["lr"] = rate
        grads = make_grads(params, step)
        grads[1].zero_()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(grads, lr=rate)
    return params, truth


@functools.cache
def once(device, backend, **options):
    """A run that several tests look at."""
    return three_steps(device, backend, options)


@pytest.mark.interpret
@pytest.mark.row(6)
@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_every_option_changed_alone_changes_the_result(options, backend, device, tier):
    momentum = options.get("momentum_dtype", torch.float32)
    leave_to_the_interpreter(tier, torch.float32, torch.float32, momentum)
    plain, _ = once(device, backend)
    changed, truth = once(device, backend, **options)
    difference = max((a - b).abs().max().item() for a, b in zip(plain, changed, strict=True))
    assert difference > 1e-4
    assert_true(changed, truth, steps=3)


@pytest.mark.row(6)
@pytest.mark.parametrize("options", CHANGES[:-1], ids=str)
def test_every_option_acts_in_a_group(options, any_backend, device):
    constructed, _ = once(device, any_backend, **options)
    grouped, _ = three_steps(device, any_backend, options, per_group=True)
    assert same_bits(constructed, grouped)


@pytest.mark.row(6)
@pytest.mark.parametrize("options", CHANGES[:-1], ids=str)
def test_every_option_acts_when_edited_between_steps(options, backend, device):
    params = make_params([(6,), (5,)], device=device)
    base = {**STRONG, "trust_coefficient": 0.6}
    optimizer = LARS(params, **base, backend=backend)
    truth = Truth(params, **base)
    for step, edit in enumerate(({}, options)):
        optimizer.param_groups[0].update(edit)
        grads = make_grads(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(grads, **edit)
    assert_true(params, truth, steps=2)


@pytest.mark.row(6)
def test_master_weights_keep_small_updates(backend, device):
    steps, options = 4, {"lr": 1e-3, "trust_coefficient": 1.0, "momentum": 0.0}
    (plain, without), (mastered, _) = twins([(8,)], device, backend, torch.bfloat16, **options)
    optimizer = LARS(mastered, **options, master_weights=True, backend=backend)
    start = plain[0].detach().clone()
    for _ in range(steps):
        for params, o in ((plain, without), (mastered, optimizer)):
            params[0].grad = start.clone()
            o.step()
    assert torch.equal(plain[0], start)  # a change below half a unit is lost
    master = optimizer.state[mastered[0]]["master_param"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, start.float() * (1 - 1e-3) ** steps, rtol=1e-5, atol=0)
    assert torch.equal(mastered[0], master.bfloat16())
