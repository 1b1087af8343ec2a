"""The training loop: accumulation, resumption, schedules, a model whose optimum is known."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lars_fused import WarmupPolynomialLR
from lars_fused.study import data, networks
from lars_fused.study.errors import StudyError
from lars_fused.study.evaluation import evaluated
from lars_fused.study.loop import Trainer
from lars_fused.study.optimizers import MomentumCorrection, optimizer_for, schedule_for
from lars_fused.study.settings import CHOICES, CONVENTIONS, Settings

pytestmark = pytest.mark.cpu

BASE = Settings(data="synthetic", batch=64, epochs=0.25, lr=2.0, evaluations=2)


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.load("synthetic")


def trained(settings: Settings, images: data.Data, **options) -> Trainer:
    trainer = Trainer(settings, images, **options)
    trainer.run()
    return trainer


def state(trainer: Trainer) -> list[torch.Tensor]:
    tensors = [t.clone() for t in trainer.model.state_dict().values()]
    held = [t for s in trainer.optimizer.state.values() for t in s.values()]
    return [*tensors, *(torch.as_tensor(t) for t in held if t is not None)]


def same(first: Trainer, second: Trainer) -> bool:
    pairs = zip(state(first), state(second), strict=True)
    histories = asdict(first.history) == asdict(second.history)
    return histories and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("micro", [7, 32])
def test_an_accumulated_batch_is_the_whole_batch(images, optimizer: str, micro: int) -> None:
    settings = replace(BASE, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 2.0)
    whole = trained(settings, images)
    parts = trained(replace(settings, micro_batch=micro), images)
    assert len(parts.history.losses) == 8
    # The same sums in another order: each of 8 steps adds float32's rounding of a sum of 64 terms.
    tolerance = 8 * 64 * torch.finfo(torch.float32).eps
    for a, b in zip(state(whole), state(parts), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance * float(a.abs().max()))
    assert parts.history.losses == pytest.approx(whole.history.losses, rel=tolerance)


def test_the_loss_is_normalised_over_the_global_batch(images) -> None:
    """The gradient of a first step is that of the mean over the batch, by hand."""
    settings = replace(BASE, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, micro_batch=9)
    trainer = Trainer(settings, images)
    before = [p.detach().clone() for p in trainer.parameters]
    torch.manual_seed(settings.seed)
    model = networks.build("mlp", images.shape, 10)
    chosen = trainer.order.chosen(0)
    x, y = images.train.images.take(chosen), images.train.labels[chosen]
    nn.functional.cross_entropy(model(x), y).backward()
    trainer.take_step()
    for old, new, other in zip(before, trainer.parameters, model.parameters(), strict=True):
        assert torch.allclose(old - new, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lars", "network": "c1", "width": 0.1, "micro_batch": 32, "layers": 4},
        {"optimizer": "sgd", "lr": 0.1, "momentum_correction": False, "warmup_epochs": 0.1},
        {"optimizer": "adam", "lr": 1e-3, "decay": "cosine", "augment": "extended"},
        {"optimizer": "rmsprop", "lr": 1e-3, "decay": "step"},
    ],
    ids=lambda changes: changes["optimizer"],
)
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(images, tmp_path, changes, stop) -> None:
    settings = replace(BASE, **changes)
    whole = trained(settings, images)
    file = tmp_path / "checkpoint.pt"
    Trainer(settings, images, checkpoint=file).run(stop_after=stop)
    torch.manual_seed(12345)  # whatever the process did before must not matter
    resumed = Trainer(settings, images, checkpoint=file)
    assert resumed.step == stop
    resumed.run()
    assert same(whole, resumed)


def test_the_seed_fixes_everything(images) -> None:
    settings = replace(BASE, network="c1", width=0.1, augment="minimal", epochs=0.1)
    runs = [trained(replace(settings, seed=seed), images) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert runs[0].history.losses != runs[2].history.losses


def test_softmax_regression_reaches_its_known_optimum() -> None:
    """Equal images with labels 3 : 1: no linear model can do better than the frequencies.

    The least loss is the entropy of (3/4, 1/4), reached where the outputs are those frequencies.
    """
    pixels = torch.ones(8, 1, 6, 6)
    split = data.Split(data.in_memory(pixels), torch.tensor([0, 0, 1, 0, 0, 0, 1, 0]))
    made = data.Data("made", split, split, ("a", "b"))
    settings = Settings(
        network="linear", optimizer="sgd", lr=0.05, momentum=0.0, weight_decay=0.0, batch=8,
        micro_batch=3, epochs=60, decay="constant", evaluations=1,
    )  # fmt: skip
    trainer = trained(settings, made)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert trainer.history.losses[-1] == pytest.approx(entropy, rel=1e-6)
    output = trainer.model(split.images.take(torch.arange(1))).softmax(1)
    assert output[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-5)
    # Where everything decays, the gradient of the loss, p − 3/4 for each of the 36 weights and the
    # bias of the first class, is balanced by β w.
    decayed = trained(replace(settings, weight_decay=1.0, adapt_all=True, epochs=200), made)
    with torch.no_grad():
        p = float(decayed.model(split.images.take(torch.arange(1))).softmax(1)[0, 0])
    for parameter in decayed.parameters:
        assert parameter[0].tolist() == pytest.approx(
            (0.75 - p) * torch.ones_like(parameter[0]).numpy(), abs=1e-4
        )
    assert 0.7 < p < 0.75


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_trains(images, name: str) -> None:
    trainer = Trainer(replace(BASE, convention=name, trust_coefficient=0.01), images)
    group = trainer.optimizer.param_groups[0]
    assert group["trust_coefficient"] == 0.01
    start = [p.detach().clone() for p in trainer.parameters]
    trainer.take_step()
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.parameters, strict=True))


@pytest.mark.parametrize("decay", CHOICES["decay"])
def test_rates_by_hand(images, decay: str) -> None:
    settings = replace(
        BASE, optimizer="sgd", lr=0.05, scaling="linear", base_batch=32, decay=decay,
        epochs=20 / 32, warmup_epochs=4 / 32, warmup_start=0.2, milestones=(0.5, 0.75),
    )  # fmt: skip
    rates = trained(settings, images).history.rates  # 20 steps, 4 of warm-up
    assert rates[:4] == pytest.approx([0.1 * (0.2 + 0.8 * t / 4) for t in range(4)])
    left = range(4, 20)
    expected = {
        "poly": [0.1 * (1 - (t - 4) / 16) ** 2 for t in left],
        "cosine": [0.05 * (1 + math.cos(math.pi * (t - 4) / 16)) for t in left],
        "step": [0.1 * (0.1 if t >= 10 else 1) * (0.1 if t >= 15 else 1) for t in left],
        "constant": [0.1] * 16,
    }[decay]
    assert rates[4:] == pytest.approx(expected)


def test_warm_up_is_the_librarys() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    settings = Settings(decay="constant", warmup_start=0.3, optimizer="sgd", lr=0.7)
    ours, theirs = (torch.optim.SGD([parameter], 0.7) for _ in range(2))
    schedule = schedule_for(settings, ours, 6, 20)
    other = WarmupPolynomialLR(theirs, warmup_steps=6, total_steps=20, warmup_start_factor=0.3)
    for _ in range(6):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-15)
        for one in (ours, schedule, theirs, other):
            one.step()


@pytest.mark.parametrize(
    ("scaling", "expected"), [("none", 0.1), ("linear", 0.8), ("sqrt", 0.1 * 8**0.5)]
)
def test_scaling_of_the_rate(scaling: str, expected: float) -> None:
    settings = Settings(lr=0.1, batch=2048, base_batch=256, scaling=scaling)
    assert settings.peak_lr == pytest.approx(expected)


@pytest.mark.parametrize("wanted", [None, True, False])
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_momentum_correction_by_hand(optimizer: str, wanted: bool | None) -> None:
    """Two steps with gradients 1 and 1 at rates 1 and 0.1, momentum 0.5, on one number.

    v₁ moves w by 1. Then, with the buffer following the rate: 0.1 (0.5 · 1 + 1) = 0.15; without
    correction the old step keeps its old rate: 0.5 · 1 + 0.1 · 1 = 0.6.
    """
    model = nn.Linear(1, 1, bias=False)
    settings = Settings(
        optimizer=optimizer, lr=1.0, momentum=0.5, weight_decay=0.0, momentum_correction=wanted
    )
    built = optimizer_for(settings, model, torch.device("cpu"))
    for group in built.param_groups:
        group["adapt"] = False  # plain momentum SGD, in LARS's form of it
    correction = MomentumCorrection(wanted, built)
    moved = []
    for step, lr in enumerate((1.0, 0.1)):
        built.param_groups[0]["lr"] = lr
        model.weight.grad = torch.ones(1, 1)
        before = model.weight.item()
        correction.before_step(first=step == 0)
        built.step()
        moved.append(before - model.weight.item())
    follows = optimizer == "sgd" if wanted is None else wanted
    assert moved == pytest.approx([1.0, 0.15 if follows else 0.6], abs=1e-6)


def test_recorded_norms_are_those_before_the_step(images) -> None:
    settings = replace(BASE, network="alexnet-bn", width=1 / 16, layers=2, epochs=4 / 32)
    trainer = Trainer(settings, images)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    history = trainer.run()
    assert [seen["step"] for seen in history.layers] == [1, 3]
    first = history.layers[0]
    for name, norm, gradient, ratio in zip(
        history.layer_names, first["weight"], first["gradient"], first["trust_ratio"], strict=True
    ):
        assert norm == pytest.approx(start[name].norm().item(), rel=1e-6)
        adapted = start[name].ndim > 1
        expected = 0.001 * norm / (gradient + 5e-4 * norm) if adapted else 1.0
        assert ratio == pytest.approx(expected, rel=1e-5)


def test_a_run_that_diverges_ends_and_says_so(images) -> None:
    settings = replace(
        BASE, optimizer="sgd", lr=1e4, network="f2", width=0.05, epochs=3, momentum=0
    )
    history = trained(settings, images).history
    settings = replace(settings, lr=1e30, network="mlp")
    history = trained(settings, images).history
    assert 0 < history.diverged < 96
    assert len(history.losses) == history.diverged
    assert history.evaluations[-1]["step"] == history.diverged


def test_evaluation_takes_a_last_smaller_batch_and_leaves_the_model_alone(images) -> None:
    model = networks.build("c1", images.shape, 10, 0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss, accuracy = evaluated(model, images.train, torch.device("cpu"))  # 2,048: 1000, 1000, 48
    model.eval()
    output = model(images.train.images.take(torch.arange(2048)))
    labels = images.train.labels
    assert loss == pytest.approx(nn.functional.cross_entropy(output, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (output.argmax(1) == labels).float().mean().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_image_for_batch_normalisation_is_refused_before_the_start(images) -> None:
    with pytest.raises(StudyError, match="batch normalisation needs two"):
        Trainer(replace(BASE, network="mlp-bn", batch=5, micro_batch=1), images)
    Trainer(replace(BASE, network="mlp", batch=5, micro_batch=1), images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr 0.0 is not allowed: it must be a positive number"),
        ({"epochs": math.nan}, "--epochs nan"),
        ({"momentum": 1.0}, r"--momentum 1.0 is not allowed: it must be in \[0, 1\)"),
        ({"optimizer": "lamb"}, "--optimizer lamb is not allowed: it must be one of lars, sgd"),
        ({"batch": 0}, "--batch 0 is not allowed: it must be at least 1"),
        ({"milestones": (0.7, 0.3)}, "--milestones"),
        ({"warmup_start": 1.5}, "--warmup-start"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0 is not allowed: it must be not negative"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message) -> None:
    with pytest.raises(StudyError, match=message):
        replace(BASE, **changes)


def test_settings_survive_json_and_name_their_run(tmp_path: Path) -> None:
    settings = replace(BASE, milestones=(0.25, 0.5), momentum_correction=True)
    assert Settings.from_dict(settings.as_dict()) == settings
    keys = {replace(settings, **c).key for c in ({}, {"seed": 1}, {"epochs": 0.5}, {"width": 0.5})}
    assert len(keys) == 4
    with pytest.raises(StudyError, match="another version: zeal"):
        Settings.from_dict(settings.as_dict() | {"zeal": 1})
