"""The demonstration: its data, its fairness to the optimizers, its replay, and all of it once."""

from __future__ import annotations

import copy
import csv
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from lars_fused.study import data as study_data
from lars_fused.study import demo, demo_report, digits
from lars_fused.study.demo_recipes import lars, sgd, sgd_tuned, shared
from lars_fused.study.history import History
from lars_fused.study.loop import Trainer
from lars_fused.study.networks.alexnet import small_alexnet_bn
from lars_fused.study.optimizers import optimizer_for
from lars_fused.study.replay import Recorder, replay

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the extra `study` is incomplete: {MISSING}")
cpu = pytest.mark.cpu


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load()


def trained(recipe, seed: int = 0, recorder: Recorder | None = None) -> History:
    settings = replace(recipe.settings, seed=seed, evaluations=1)
    every = study_data.load("digits")
    return Trainer(settings, every, model=small_alexnet_bn, recorder=recorder).run()


@pytest.fixture(scope="module")
def recorded() -> Recorder:
    recorder = Recorder(3)
    trained(lars(shared(1, 256)), recorder=recorder)
    return recorder


def run(recipe: str, seed: int, accuracy: float) -> demo_report.Run:
    evaluation = {
        "step": 1, "train_loss": 1.0, "train_accuracy": 1.0, "test_loss": 1.0,
        "test_accuracy": accuracy,
    }  # fmt: skip
    return demo_report.Run(recipe, seed, History([1.0], [1.0], [evaluation]))


@cpu
def test_the_split_is_fixed_and_no_image_is_on_both_sides(data: digits.Digits) -> None:
    assert (len(data.train_labels), len(data.test_labels)) == (1297, 500)
    again = digits.load()
    assert all(torch.equal(a, b) for a, b in zip(data, again, strict=True))
    # The bundle holds 1,797 different images, so equal pixels would be the same image.
    train = {image.numpy().tobytes() for image in data.train_images}
    test = {image.numpy().tobytes() for image in data.test_images}
    assert len(train) == 1297
    assert len(test) == 500
    assert not train & test
    for labels in (data.train_labels, data.test_labels):
        assert labels.bincount().min() >= 0.08 * len(labels)  # ten classes, none rare


@cpu
def test_pixels_are_standardised_by_the_training_images_alone(data: digits.Digits) -> None:
    assert data.train_images.mean().abs() < 1e-6
    assert data.train_images.std().sub(1).abs() < 1e-6
    assert data.test_images.mean().abs() > 1e-4


@cpu
def test_the_network_is_an_alexnet_bn_in_small() -> None:
    network = small_alexnet_bn()
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d"] * 5 + ["Linear"] * 3
    assert len(norms) == 7
    assert [layer.bias is not None for layer in layers] == [False] * 7 + [True]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@cpu
def test_all_optimizers_get_the_same_groups_schedule_start_and_batches() -> None:
    base = replace(shared(1, 256), seed=1)
    shares: dict[str, list[float]] = {}
    first_losses = set()
    for recipe in (lars(base), sgd(base), sgd_tuned(base)):
        optimizer = optimizer_for(recipe.settings, small_alexnet_bn(), torch.device("cpu"))
        decays = [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
        assert decays == [(5e-4, 8), (0.0, 15)]
        assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
        history = trained(recipe, seed=1)
        peak = recipe.settings.peak_lr
        shares[recipe.name] = [round(rate / peak, 9) for rate in history.rates]
        first_losses.add(history.losses[0])
    assert shares["LARS"] == shares["SGD"] == shares["SGD, tuned"]
    # 5 steps: one of warm-up at a tenth of the rate, then (1 - t/4) squared.
    assert shares["LARS"] == [0.1, 1.0, 0.5625, 0.25, 0.0625]
    assert len(first_losses) == 1


@cpu
def test_the_rate_of_sgd_follows_the_linear_rule() -> None:
    small, large = (sgd(shared(40, batch)).settings.peak_lr for batch in (32, 1024))
    assert large == pytest.approx(32 * small)
    assert small == 0.1


@cpu
def test_training_learns_and_a_seed_repeats_it() -> None:
    runs = [trained(lars(shared(2, 128)), seed) for seed in (0, 0, 1)]
    assert runs[0].losses[0] > 2.0
    assert runs[0].losses[-1] < 1.2
    assert len(runs[0].losses) == 20
    assert runs[0].evaluations[-1]["step"] == 20
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


@cpu
def test_replay_repeats_the_recorded_steps_exactly(recorded: Recorder) -> None:
    same = replay(recorded, "torch")
    assert (same.steps, same.absolute, same.relative) == (3, 0.0, 0.0)
    assert same.values == sum(p.numel() for p in small_alexnet_bn().parameters())
    assert not torch.equal(recorded.weights[0][0], recorded.weights[2][0])


@cpu
@pytest.mark.parametrize("what", ["weight", "rate", "gradient", "option"])
def test_replay_sees_a_step_that_went_otherwise(recorded: Recorder, what: str) -> None:
    other = copy.deepcopy(recorded)
    if what == "weight":
        largest = other.weights[2][0].abs().max()
        other.weights[2][0].view(-1)[0] += 0.25
        seen = replay(other, "torch")
        assert seen.absolute == pytest.approx(0.25, rel=1e-5)
        assert seen.relative == pytest.approx(0.25 / max(largest, other.weights[2][0].abs().max()))
        return
    if what == "rate":
        other.lrs[1][0] *= 2
    elif what == "gradient":
        other.gradients[2][3] = -other.gradients[2][3]
    else:
        other.options[0]["trust_coefficient"] *= 2
    assert replay(other, "torch").relative > 1e-4


@cpu
def test_first_step_statistics_name_every_parameter(recorded: Recorder) -> None:
    torch.manual_seed(0)
    network = dict(small_alexnet_bn().named_parameters())
    stats = recorded.layer_stats
    assert set(stats) == set(network)
    for name in ("conv1.weight", "fc8.weight"):
        weight_norm = network[name].detach().norm().item()
        assert stats[name].weight_norm == pytest.approx(weight_norm, rel=1e-5)
        denominator = stats[name].gradient_norm + 5e-4 * weight_norm
        expected = 0.005 * weight_norm / denominator
        assert stats[name].trust_ratio == pytest.approx(expected, rel=1e-4)
        row = next(
            r for r in demo_report.layer_table(stats).splitlines() if r.startswith(name + " ")
        )
        assert f"{weight_norm:.4g}" in row
    assert stats["fc8.bias"].trust_ratio == 1.0


@cpu
def test_the_table_of_accuracies_holds_mean_deviation_and_every_seed() -> None:
    runs = [run("LARS", 0, 98.0), run("LARS", 1, 99.0), run("SGD", 0, 97.0), run("SGD", 1, 97.0)]
    lars_row, sgd_row = demo_report.accuracy_table(runs).splitlines()[2:]
    assert lars_row.split() == ["LARS", "98.50", "±", "0.71", "98.0", "99.0", "1.0000"]
    assert sgd_row.split() == ["SGD", "97.00", "±", "0.00", "97.0", "97.0", "1.0000"]


@cpu
@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((98, 99), (97, 96), "ahead in every seed, +2.00 points on average."),
        ((90, 91), (97, 96), "behind in every seed, -6.00 points on average."),
        ((98, 96), (97, 96), "ahead in 1 of 2 seeds, behind in 0, +0.50 points on average: no "),
    ],
)
def test_the_verdict_goes_whichever_way_it_came_out(ours, theirs, expected) -> None:
    sentence = demo_report.verdict(
        [run("LARS", i, value) for i, value in enumerate(ours)],
        [run("SGD", i, value) for i, value in enumerate(theirs)],
    )
    assert sentence.startswith("LARS against SGD: ")
    assert expected in sentence


@cpu
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch=1298", "--batch must lie in 2..1297"),
        ("--seeds=0", "--seeds must be at least 1"),
        ("--epochs=nan", "--epochs must be positive"),
    ],
)
def test_unusable_options_are_refused_by_name(argument, message, capsys) -> None:
    with pytest.raises(SystemExit):
        demo.options([argument])
    assert message in capsys.readouterr().err


# Read by Python as it starts: the replay through the kernels is a process of its own.
QUICKLY = """
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()
"""


@cpu
def test_the_whole_of_it_in_small(tmp_path: Path, monkeypatch, capsys) -> None:
    """All but the number of images, which is a fifth; the replay is a process, as always."""
    pytest.importorskip("triton", reason="without triton there is nothing to replay through")
    whole = study_data.load("digits")
    fewer = replace(
        whole,
        train=whole.train.subset(torch.arange(256)),
        test=whole.test.subset(torch.arange(100)),
    )
    monkeypatch.setattr(demo, "load", lambda name: fewer)
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text(QUICKLY, encoding="utf-8")
    path = [str(startup), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main(["--quick", "--batch=128", f"--out={tmp_path}"]) == 0
    shown = capsys.readouterr()
    assert "No GPU: LARS trains with the portable backend" in shown.out
    assert "\r" not in shown.err, "a progress bar was drawn without a terminal"
    assert "The first LARS step replayed through the real kernels" in shown.out
    assert str(tmp_path.resolve()) in shown.out
    assert "conv1.weight" in shown.out

    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "curves.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * 6  # recipes, seeds, steps
    with (tmp_path / "layers.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 23
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["runs"]) == 3 * 2
    assert summary["replay"]["backend"] == "triton"
    # Both backends compute in float32 and round each stored value once: a few units in the last
    # place of the largest weight, after three steps, is all that may lie between them.
    assert summary["replay"]["relative"] <= 8 * torch.finfo(torch.float32).eps
