"""The noise scale: closed forms, every example's gradient, best batch sizes, plans."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import networks
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import noise_measure
from lars_fused.study.experiments.noise import Curve, Plan, best, fit, noise_scale, vertex
from lars_fused.study.experiments.noise_measure import combined, estimated, exact
from lars_fused.study.experiments.wells import Wells
from lars_fused.study.order import steps_for
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu


def test_equation_24() -> None:
    assert noise_scale(0.1, 1000, 10) == pytest.approx(9.9)
    assert noise_scale(0.1, 1000, 10, momentum=0.9) == pytest.approx(99.0)
    assert noise_scale(0.1, 1000, 1000) == 0.0
    # N ≫ B: γN/B, off by the share B/N.
    assert noise_scale(0.1, 10**6, 10) == pytest.approx(0.1 * 10**5, rel=1.1e-5)


FEATURES, SPREAD = 5, 0.5


def half_square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return 0.5 * (output[:, 0] - label).square().mean()


def linear_gaussian() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers x·w* + noise, a model at w* + δ: example gradients are x (x·δ − noise)."""
    x = torch.randn(4000, FEATURES)
    answers = x.sum(1) + SPREAD * torch.randn(len(x))
    model = nn.Linear(FEATURES, 1, bias=False)
    offset = torch.tensor([0.5, -0.3, 0.2, 0.4, -0.1])
    with torch.no_grad():
        model.weight.copy_(1.0 + offset)
    return model, x, answers, offset


def test_gradient_noise_of_a_linear_gaussian_problem() -> None:
    model, x, answers, offset = linear_gaussian()
    found = exact(model, x, answers, half_square)
    # The gradients of this sample by hand, in float64.
    wide = x.double()
    residual = wide @ model.weight.detach().double()[0] - answers.double()
    gradients = wide * residual[:, None]
    mean = gradients.mean(0)
    assert found.square == pytest.approx(float(mean @ mean), rel=1e-10)
    spread = float((gradients - mean).square().sum(1).mean())
    assert found.trace == pytest.approx(spread, rel=1e-10)
    # The population's, within the sample's standard error: G = δ and, by Isserlis' theorem,
    # E|x|²(x·δ)² = (d + 2)|δ|², so tr Σ = (d + 1)|δ|² + d σ².
    delta = float(offset.square().sum())
    trace = (FEATURES + 1) * delta + FEATURES * SPREAD**2
    error = float(gradients.square().sum(1).std()) / math.sqrt(len(x))
    assert abs(found.trace - trace) < 3 * error < 0.2 * trace
    # NoiseScale on batches of that sample, within its own standard errors.
    ours = estimated(
        model, x, answers, small=4, pieces=6, updates=40, repeats=8, seed=1, loss=half_square
    )
    for name in ("trace", "square", "value"):
        error = getattr(ours, f"{name}_error")
        assert abs(getattr(ours, name) - getattr(found, name)) < 3 * error, name
        assert 0 < error < 0.2 * getattr(found, name), name


def test_a_networks_gradients_one_by_one() -> None:
    """Vmap against a loop of backward passes; the model is left as it was."""
    model = networks.build("conv2", (1, 8, 8), 3, 0.4)
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9) % 3
    before = [p.clone() for p in model.parameters()]
    found = exact(model, images, labels)
    wide = networks.build("conv2", (1, 8, 8), 3, 0.4).double()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    every = []
    for i in range(9):
        wide.zero_grad()
        nn.functional.cross_entropy(wide(images[i : i + 1].double()), labels[i : i + 1]).backward()
        every.append(torch.cat([p.grad.flatten() for p in wide.parameters()]))
    stack = torch.stack(every)
    assert found.square == pytest.approx(float(stack.mean(0).square().sum()), rel=1e-9)
    assert found.trace == pytest.approx(float(stack.var(0, unbiased=False).sum()), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


def test_independent_estimates_are_combined() -> None:
    found = combined([10.0, 14.0, 12.0], [2.0, 2.0, 2.0])
    assert (found.trace, found.square, found.value) == (12.0, 2.0, 6.0)
    assert found.trace_error == pytest.approx(2 / math.sqrt(3))
    assert found.square_error == 0.0
    # Leaving one out: 6.5, 5.5 and 6; (n − 1)/√n times their deviation of ½.
    assert found.value_error == pytest.approx(1 / math.sqrt(3))


def test_networks_whose_examples_are_not_independent_are_refused() -> None:
    for name in ("mlp-bn", "c1"):
        model = networks.build(name, (1, 8, 8), 3, 0.1)
        with pytest.raises(StudyError, match=f"--network {name}: an example has no gradient"):
            noise_measure.check(name, model)
    noise_measure.check("mlp", networks.build("mlp", (1, 8, 8), 3))


def test_the_best_batch_is_a_parabolas_vertex() -> None:
    batches = (4, 8, 16, 32, 64)
    parabola = [90 - (math.log2(b) - 4.3) ** 2 for b in batches]
    assert vertex(batches, parabola) == pytest.approx(2**4.3)
    uneven = (4, 8, 32, 64)
    assert vertex(uneven, [90 - (math.log2(b) - 4.3) ** 2 for b in uneven]) == pytest.approx(2**4.3)
    assert vertex(batches, [1, 2, 3, 4, 5]) == 64
    seeds = tuple((m - 0.1, m + 0.1) for m in parabola)
    found = best(Curve(0.1, 1000, batches, seeds))
    assert found.batch == pytest.approx(2**4.3)
    assert found.low < found.batch < found.high
    assert (found.at_edge, found.enough) == (False, 16)
    # Two standard errors of a difference of two seeds, ±0.1 each: 2 √(0.02 / 2 · 2) = 0.28.
    level = best(Curve(0.1, 1000, (4, 8, 16), ((89.6, 89.8), (89.7, 89.9), (89.9, 90.1))))
    assert (level.at_edge, level.enough) == (True, 8)


def test_fitted_lines_on_made_data() -> None:
    x = [0.05, 0.1, 0.2, 0.4]
    line = fit(x, [320 * v for v in x])
    assert (line.points, line.factor) == (4, pytest.approx(320))
    assert (line.exponent, line.error) == (pytest.approx(1), pytest.approx(0, abs=1e-7))
    root = fit(x, [100 * math.sqrt(v) for v in x])
    assert root.exponent == pytest.approx(0.5)
    # Logs of 1, 2, 4 against logs of 1, 2, 2: slope ½, residuals −1/6, 1/3, −1/6 of log 2.
    bent = fit([1, 2, 4], [1, 2, 2])
    assert bent.exponent == pytest.approx(0.5)
    assert bent.error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 2))
    assert fit([], []) is None
    assert math.isnan(fit([0.1], [32.0]).exponent)
    assert math.isnan(fit([0.1, 0.2], [32.0, 64.0]).error)


BASE = Settings(
    data="synthetic", network="linear", optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1,
    decay="constant", evaluations=1,
)  # fmt: skip


def plan(**changes) -> Plan:
    made = Plan(
        base=BASE, lrs=(0.1, 0.4), batches=(8, 64, 512), sizes=(256, 2048), steps=10, seeds=2,
        examples=64, measured_at=(0.0, 1.0), small=4, pieces=2, updates=2, repeats=2,
        wells=Wells(), temperatures=(0.2, 0.45), well_batches=(1, 4), chains=100, time=1.0,
    )  # fmt: skip
    return replace(made, **changes)


def test_runs_of_a_curve_travel_equally_far() -> None:
    made = plan()
    every = made.runs(2048)
    assert len(every) == len(set(every)) == 2 * (3 + 3 + 2)  # N = 256 has no batch of 512
    for settings in every:
        size = settings.train_images or 2048
        assert steps_for(settings.epochs, settings.batch, size) == 10
        assert (settings.decay, settings.momentum) == ("constant", 0.0)
    # The curve at γ = 0.1 and all images belongs to both sweeps.
    assert made.curves(2048) == [(0.1, 2048), (0.4, 2048), (0.1, 256)]
    tilts = [(c.tilt, c.temperature) for c in made.well_cells()]
    assert tilts == [("gaussian", 0.2)] * 2 + [("gaussian", 0.45)] * 2 + [("signs", 0.2)] * 2
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    with pytest.raises(StudyError, match="--repeats 1 is not allowed: at least 2"):
        plan(repeats=1)
