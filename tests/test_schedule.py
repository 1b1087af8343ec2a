import copy
import math

import pytest
import torch

from lars_fused import WarmupPolynomialLR, scaled_lr

pytestmark = pytest.mark.cpu

NAN, INF = float("nan"), float("inf")


def sgd(*lrs):
    """An optimizer with one group per learning rate."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": x} for x in lrs])


def advance(optimizer, scheduler, steps):
    """The learning rates that `steps` steps are taken with, by step and group."""
    used = []
    for _ in range(steps):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def test_values_worked_by_hand():
    optimizer = sgd(8.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=4, total_steps=8)
    used = [lr for (lr,) in advance(optimizer, scheduler, 11)]
    # 8 · t/4, then 8 · (1 − (t − 4)/4)², then 0.
    assert used == [0.0, 2.0, 4.0, 6.0, 8.0, 4.5, 2.0, 0.5, 0.0, 0.0, 0.0]


def test_start_factor_end_and_power():
    optimizer = sgd(10.0)
    scheduler = WarmupPolynomialLR(
        optimizer, warmup_steps=2, total_steps=6, power=1.0, warmup_start_factor=0.5, end_lr=2.0
    )
    used = [lr for (lr,) in advance(optimizer, scheduler, 8)]
    assert used == [5.0, 7.5, 10.0, 8.0, 6.0, 4.0, 2.0, 2.0]


def test_without_warmup_it_starts_at_the_base():
    optimizer = sgd(4.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=0, total_steps=2)
    assert advance(optimizer, scheduler, 3) == [[4.0], [1.0], [0.0]]


def test_each_group_has_its_own_base():
    optimizer = sgd(8.0, 1.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=2, total_steps=4)
    used = advance(optimizer, scheduler, 4)
    assert used == [[0.0, 0.0], [4.0, 0.5], [8.0, 1.0], [2.0, 0.25]]


def test_a_tensor_is_changed_in_place():
    lr = torch.tensor(8.0)
    optimizer = sgd(lr)
    held = optimizer.param_groups[0]["lr"]
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=4, total_steps=8)
    assert [x for (x,) in advance(optimizer, scheduler, 6)] == [0.0, 2.0, 4.0, 6.0, 8.0, 4.5]
    assert optimizer.param_groups[0]["lr"] is held
    assert scheduler.base_lrs == [torch.tensor(8.0)]


@pytest.mark.parametrize("at", [0, 2, 5, 9])
def test_state_dict_round_trip(at):
    options = {"warmup_steps": 3, "total_steps": 9, "end_lr": 0.125}
    optimizer = sgd(8.0, 0.5)
    scheduler = WarmupPolynomialLR(optimizer, **options)
    advance(optimizer, scheduler, at)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = advance(optimizer, scheduler, 12)

    # Other values, to see that everything comes from the state.
    optimizer = sgd(1.0, 1.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=0, total_steps=100)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert advance(optimizer, scheduler, 12) == expected


@pytest.mark.parametrize("at", [1, 3, 7])
def test_resuming_through_last_epoch(at):
    options = {"warmup_steps": 3, "total_steps": 9}
    optimizer = sgd(8.0)
    scheduler = WarmupPolynomialLR(optimizer, **options)
    advance(optimizer, scheduler, at)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = advance(optimizer, scheduler, 9)

    optimizer = sgd(1.0)
    optimizer.load_state_dict(saved)
    scheduler = WarmupPolynomialLR(optimizer, **options, last_epoch=at - 1)
    assert advance(optimizer, scheduler, 9) == expected


def test_resuming_needs_the_initial_learning_rate():
    with pytest.raises(KeyError, match="initial_lr"):
        WarmupPolynomialLR(sgd(1.0), warmup_steps=1, total_steps=2, last_epoch=0)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("warmup_steps", -1, "an int >= 0"),
        ("warmup_steps", 1.0, "an int >= 0"),
        ("warmup_steps", True, "an int >= 0"),
        ("warmup_steps", NAN, "an int >= 0"),
        ("total_steps", 5, "an int >= 6"),
        ("total_steps", 10.0, "an int >= 6"),
        ("total_steps", None, "an int >= 6"),
        ("power", 0.0, "a finite number > 0"),
        ("power", NAN, "a finite number > 0"),
        ("power", "2", "a finite number > 0"),
        ("warmup_start_factor", -0.1, "a finite number >= 0 and <= 1"),
        ("warmup_start_factor", 1.1, "a finite number >= 0 and <= 1"),
        ("warmup_start_factor", NAN, "a finite number >= 0 and <= 1"),
        ("end_lr", -1e-3, "a finite number >= 0"),
        ("end_lr", INF, "a finite number >= 0"),
        ("last_epoch", -2, "an int >= -1"),
        ("last_epoch", 0.5, "an int >= -1"),
    ],
)
def test_bad_values_are_named_and_change_nothing(name, value, allowed):
    optimizer = sgd(8.0)
    options = {"warmup_steps": 5, "total_steps": 10, name: value}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        WarmupPolynomialLR(optimizer, **options)
    assert str(error.value) == (
        f"WarmupPolynomialLR: {name}={value!r} is not allowed; must be {allowed}"
    )
    assert optimizer.param_groups[0]["lr"] == 8.0
    assert "initial_lr" not in optimizer.param_groups[0]


def test_the_optimizer_must_be_one():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        WarmupPolynomialLR(torch.nn.Linear(1, 1), warmup_steps=1, total_steps=2)


def test_scaled_lr():
    assert scaled_lr(0.3, 4096) == pytest.approx(4.8)
    assert scaled_lr(0.3, 64) == pytest.approx(0.075)
    assert scaled_lr(0.3, 4096, rule="sqrt") == pytest.approx(1.2)
    assert scaled_lr(0.1, 1024, 32, "sqrt") == pytest.approx(0.1 * math.sqrt(32))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base_lr": -0.1}, "scaled_lr: base_lr=-0.1 is not allowed; must be a finite number >= 0"),
        ({"base_lr": NAN}, "scaled_lr: base_lr=nan is not allowed; must be a finite number >= 0"),
        ({"batch_size": 0}, "scaled_lr: batch_size=0 is not allowed; must be an int >= 1"),
        ({"batch_size": 1.5}, "scaled_lr: batch_size=1.5 is not allowed; must be an int >= 1"),
        (
            {"base_batch_size": -256},
            "scaled_lr: base_batch_size=-256 is not allowed; must be an int >= 1",
        ),
        ({"rule": "cubic"}, "scaled_lr: rule='cubic' is not allowed; must be 'linear' or 'sqrt'"),
    ],
)
def test_scaled_lr_checks(options, text):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        scaled_lr(**{"base_lr": 0.1, "batch_size": 256, **options})
    assert str(error.value) == text


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_resumes_whether_it_was_made_before_or_after_the_optimizer_was_loaded(warmup, tensor):
    def fresh():
        return sgd(torch.tensor(8.0, dtype=torch.float64) if tensor else 8.0)

    def scheduled(optimizer):
        return WarmupPolynomialLR(optimizer, warmup_steps=warmup, total_steps=100)

    first = fresh()
    scheduler = scheduled(first)
    advance(first, scheduler, 37)
    saved = copy.deepcopy((first.state_dict(), scheduler.state_dict()))
    expected = advance(first, scheduler, 5)
    for made_first in (True, False):
        optimizer = fresh()
        if made_first:
            resumed = scheduled(optimizer)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        if not made_first:
            resumed = scheduled(optimizer)
        resumed.load_state_dict(saved[1])
        assert advance(optimizer, resumed, 5) == expected


def test_loading_leaves_a_rate_that_another_scheduler_has_set():
    optimizer = sgd(8.0)
    ours = WarmupPolynomialLR(optimizer, warmup_steps=2, total_steps=10)
    saved = ours.state_dict()
    optimizer.param_groups[0]["lr"] = 3.0
    ours.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_a_group_that_is_added_goes_on_from_its_own_rate():
    optimizer = sgd(8.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=2, total_steps=6)
    advance(optimizer, scheduler, 3)  # after t = 3 steps: (1 - 1/4)² = 9/16
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.9})
    used = advance(optimizer, scheduler, 4)
    # γ₀ = 0.9 · 16/9 = 1.6, then 1.6 · (1/2)², 1.6 · (1/4)², 0.
    assert [row[0] for row in used] == [4.5, 2.0, 0.5, 0.0]
    assert [row[1] for row in used] == pytest.approx([0.9, 0.4, 0.1, 0.0])
    assert optimizer.param_groups[1]["initial_lr"] == pytest.approx(1.6)


def test_a_group_that_is_added_while_the_rate_is_0_takes_its_own_as_the_base():
    optimizer = sgd(8.0)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=4, total_steps=8)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    other = [torch.nn.Parameter(torch.ones(2))]
    optimizer.add_param_group({"params": other, "lr": 0.0, "initial_lr": 1.0})
    assert advance(optimizer, scheduler, 3)[1:] == [[2.0, 0.125, 0.25], [4.0, 0.25, 0.5]]
    again = WarmupPolynomialLR(optimizer, warmup_steps=4, total_steps=8)
    again.load_state_dict(scheduler.state_dict())
    assert advance(optimizer, again, 2) == [[6.0, 0.375, 0.75], [8.0, 0.5, 1.0]]
