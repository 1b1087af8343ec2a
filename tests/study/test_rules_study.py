"""`lars-study rules`: grids, best epochs, files, shares, interruption, wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import loop, plans, runs
from lars_fused.study.cli import main
from lars_fused.study.data import load
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import coursework, rules
from lars_fused.study.experiments.rules import Plan, best, outcome, peak
from lars_fused.study.history import History
from lars_fused.study.loop import Trainer
from lars_fused.study.settings import Settings
from tests.study.commands import done_in_shares, finished, interrupted, refused
from tests.study.drawing import coarsely_drawn, undrawn
from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu

BASE = Settings(
    data="synthetic", network="mlp", batch=3, epochs=1.0, momentum=0.0, weight_decay=0.0,
    decay="constant", pixels="unit", evaluations=1,
)  # fmt: skip


def plan(**changes) -> Plan:
    made = Plan(
        base=replace(BASE, batch=50, validation=100, test_too=True),
        rules=rules.RULES,
        sgd_lrs=coursework.SGD_RATES,
        rmsprop_lrs=coursework.RMSPROP_RATES,
        adam_lrs=coursework.ADAM_RATES,
        adam_beta1=coursework.ADAM_BETA1,
        adam_beta2=coursework.ADAM_BETA2,
        lars_lrs=coursework.LARS_RATES,
        lars_momenta=coursework.LARS_MOMENTA,
        lars_decays=coursework.LARS_DECAYS,
        seeds=2,
        networks=("mlp", "mlp-bn"),
        network_seeds=3,
    )
    return replace(made, **changes)


def test_the_grids_are_the_texts_and_lars_has_as_many_points() -> None:
    made = plan()
    assert [len(made.grid(rule)) for rule in rules.RULES] == [5, 6, 32, 32]
    assert [s.lr for s in made.grid("sgd")] == [0.1, 0.03, 0.01, 0.003, 0.001]
    assert {(s.lr, s.beta2) for s in made.grid("rmsprop")} >= {(0.3, 0.9), (0.001, 0.9)}
    adam = {(s.lr, s.beta1, s.beta2) for s in made.grid("adam")}
    assert {(0.1, 0.0, 0.9), (0.0001, 0.9, 0.9999), (0.001, 0.9, 0.999)} <= adam
    for rule in rules.RULES:
        for s in made.grid(rule):
            assert (s.batch, s.network, s.decay) == (50, "mlp", "constant")
            assert (s.momentum, s.weight_decay) == (0, 0) or rule == "lars"
    every = made.runs()
    assert len(every) == len(set(every))
    # Sections 4 to 6 train the 100-100 network at a point of Adam's grid: two seeds are shared.
    assert len(every) == 2 * 75 + 2 * 3 - 2
    assert made.network("mlp") in made.grid("adam")
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_unfair_or_empty_plans_are_refused() -> None:
    with pytest.raises(StudyError, match="Adam has 32 points and that of LARS 28"):
        plan(lars_lrs=coursework.LARS_RATES[:7])
    assert plan(lars_lrs=(1.0,), rules=("sgd", "lars")).rules == ("sgd", "lars")
    with pytest.raises(StudyError, match="--rules lamb is unknown; choose from sgd"):
        plan(rules=("lamb",))
    with pytest.raises(StudyError, match="nothing to train"):
        plan(rules=(), networks=())


def result(settings: Settings, validation: list[float], training: float = 90.0) -> runs.Result:
    history = History(
        losses=[1.0],
        rates=[settings.lr],
        evaluations=[
            {"step": 4 * i, "train_loss": 0.5, "train_accuracy": training, "test_loss": 1.0,
             "test_accuracy": v, "unseen_loss": 1.0, "unseen_accuracy": v - 2}
            for i, v in enumerate(validation, 1)
        ],
    )  # fmt: skip
    return runs.Result(settings, history, 4 * len(validation), 200, 10, 0.0, runs.facts(ONE))


class ONE:
    size, device = 1, torch.device("cpu")


def test_the_best_epoch_and_what_is_lost_after_it(tmp_path: Path) -> None:
    made = plan()
    point = made.grid("sgd")[0]  # 200 images in batches of 50: 4 steps an epoch
    found = peak(result(point, [70.0, 82.0, 82.0, 79.5]))
    assert found.epoch == 2.0  # of equals the first
    assert (found.fallen, found.gap) == (2.5, 10.5)
    assert found.at["unseen_accuracy"] == 80.0
    for lr, validation in ((0.1, [[70.0, 82.0], [60.0, 80.0]]), (0.03, [[50.0, 83.0]])):
        for seed, values in enumerate(validation):
            settings = replace(point, lr=lr, seed=seed)
            runs.write(runs.folder_of(tmp_path, settings), result(settings, values))
    (done,) = rules.outcomes(made.grid("sgd"), 2, tmp_path)  # 0.03 lacks its second seed
    assert (done.validation, done.test, done.first) == ([82.0, 80.0], [80.0, 78.0], [70.0, 60.0])
    assert done.mean == 81.0
    other = outcome(replace(point, lr=0.03), 1, tmp_path)
    assert best([done, other]) is other


SMALL = [
    "rules", "--data=synthetic", "--train-images=200", "--epochs=2", "--batch=25", "--width=0.1",
    "--sgd-lrs=0.1", "--rmsprop-lrs=0.01,0.001", "--adam-lrs=0.01", "--adam-beta1=0,0.9",
    "--adam-beta2=0.9", "--lars-lrs=3,30", "--lars-momenta=0.9", "--lars-decays=0",
    "--networks=mlp,mlp-bn,mlp-bn-frozen,conv2", "--network-seeds=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rules")
    with pytest.MonkeyPatch.context() as patch:
        coarsely_drawn(patch)
        assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_a_study_leaves_its_tables_and_pictures(study: Path, monkeypatch, capsys) -> None:
    names = ("rates", "accuracy_by_epoch", "training_loss", "adam_grid", "lars_grid", "networks")
    for name in names:
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    points = rows(study / "points.csv")
    assert len(points) == 1 + 2 + 2 + 2 + 4 * 2
    curves = rows(study / "by_epoch.csv")
    assert [float(r["epoch"]) for r in curves[:2]] == [1.0, 2.0]  # 175 images: 7 steps an epoch
    plan_ = Plan.from_dict(plans.load(study)["plan"])
    assert (plan_.base.validation, plan_.base.evaluations, plan_.base.pixels) == (25, 2, "unit")
    row = next(r for r in points if r["rule"] == "lars" and r["lr"] == "3.0")
    again = Trainer(plan_.grid("lars")[0], load("synthetic", 0, 200)).run().evaluations
    assert max(e["test_accuracy"] for e in again) == float(row["best_validation"])
    moved = summary_of(study)["batch_norm_moved"]
    assert set(moved) == {"mlp-bn", "mlp-bn-frozen"}
    assert all(value > 0 for value in moved["mlp-bn"].values())
    assert set(moved["mlp-bn-frozen"].values()) == {0.0}
    # The published numbers of section 6 stand beside.
    undrawn(monkeypatch)
    assert main(["report", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, x in enumerate(lines) if x.startswith("The run with the best valid"))
    tested = [line.split() for line in lines[start:]]
    assert next(x for x in tested if x[:1] == ["mlp"])[-5:] == [
        "7",
        "84.2",
        "0.493",
        "82.22",
        "0.547",
    ]


def test_shares_that_are_merged_are_the_whole_study(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    merged = done_in_shares(SMALL, tmp_path)
    assert main(["report", str(merged)]) == 0
    for name in ("points.csv", "by_epoch.csv"):
        assert (merged / name).read_bytes() == (study / name).read_bytes()


def test_an_interrupted_study_goes_on_to_the_same_numbers(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # every step is saved
    steps = interrupted(monkeypatch, Trainer, "take_step", 3 * 14 + 6)  # in the fourth run
    assert main([*SMALL, f"--out={tmp_path}"]) == 130
    earlier = finished(tmp_path)
    assert len(earlier) == 3
    assert main([*SMALL, f"--out={tmp_path}"]) == 0
    assert len(steps) == 15 * 14 + 1  # the interrupted step alone is taken twice
    assert earlier.items() <= finished(tmp_path).items()
    for name in ("points.csv", "by_epoch.csv"):
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lars-lrs=1,2"], "they are compared only if they are tuned alike"),
        (["--rules=lamb"], "--rules lamb is unknown"),
        (["--networks=vgg"], "--network vgg is unknown"),
        (["--rules=none", "--networks=none"], "leave nothing to train"),
        (["--batch=3000"], "--batch 3000 is too large for 2,048 training images"),
        (["--adam-beta1=1"], "--beta1 1.0 is not allowed"),
        (["--adam-beta2=-1"], "the numbers must be not negative"),
        (["--sgd-lrs=0"], "--lr 0.0 is not allowed"),
        (["--validation=5000"], "--validation 5000 is not allowed"),
        (["--epochs=0"], "0 is not in the range"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, capsys, arguments, message) -> None:
    refused(["rules", "--data=synthetic", *arguments], message, tmp_path / "out", capsys)
