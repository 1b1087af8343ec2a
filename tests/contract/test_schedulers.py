"""Learning-rate schedulers: the same as setting the rate by hand, and it has an effect."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from tests.tools import BOTH, STRONG, copies, same_bits, set_grads, twins

pytestmark = BOTH

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, power=2.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.8, total_steps=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}
STEPS = 4
INTERPRETED = {("StepLR", False), ("ExponentialLR", True), ("OneCycleLR", False)}


@pytest.mark.row(44)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_equals_rates_set_by_hand(name, tensor, tier, backend, device):
    if tier == "interpret" and (name, tensor) not in INTERPRETED:
        pytest.skip("for time: to the kernels a rate is a rate, whoever sets it")
    (scheduled, a), (by_hand, b), (constant, c) = twins([(4,)], device, backend, count=3, **STRONG)
    if tensor:
        a.param_groups[0]["lr"] = torch.tensor(STRONG["lr"], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](a)
        rates = []
        for step in range(STEPS):
            rates.append(float(a.param_groups[0]["lr"]))
            b.param_groups[0].update(lr=rates[-1], momentum=a.param_groups[0]["momentum"])
            for params, optimizer in ((scheduled, a), (by_hand, b), (constant, c)):
                set_grads(params, step)
                optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(set(rates)) > 1
    assert same_bits(copies(scheduled), copies(by_hand))
    assert not same_bits(copies(scheduled), copies(constant))
    assert isinstance(a.param_groups[0]["lr"], torch.Tensor) == tensor


@pytest.mark.row(44)
def test_one_cycle_moves_the_momentum_too(backend, device):
    ((params, optimizer),) = twins([(4,)], device, backend, count=1, **STRONG)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    seen = set()
    for step in range(STEPS):
        set_grads(params, step)
        optimizer.step()
        scheduler.step()
        seen.add(optimizer.param_groups[0]["momentum"])
    assert len(seen) > 1


@pytest.mark.row(44)
def test_scheduler_state_resumes(backend, device):
    (resumed, a), (straight, b) = twins([(4,)], device, backend, **STRONG)
    schedulers = [lr_scheduler.StepLR(o, 1, 0.5) for o in (a, b)]
    for step in range(4):
        for params, optimizer, scheduler in zip(
            (resumed, straight), (a, b), schedulers, strict=True
        ):
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
        if step == 1:
            saved = a.state_dict(), schedulers[0].state_dict()
            ((other, a),) = twins([(4,)], device, backend, count=1)
            other[0].data.copy_(resumed[0])
            resumed = other
            a.param_groups[0]["initial_lr"] = STRONG["lr"]
            schedulers[0] = lr_scheduler.StepLR(a, 1, 0.5)
            a.load_state_dict(saved[0])
            schedulers[0].load_state_dict(saved[1])
    assert same_bits(copies(resumed), copies(straight))
