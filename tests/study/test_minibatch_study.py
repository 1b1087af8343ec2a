"""`lars-study minibatch`: files, shares, interruption, wrong input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("skimage", reason="the extra `study` is not installed")

from lars_fused.study import data, loop, plans, runs
from lars_fused.study.cli import main
from lars_fused.study.experiments.minibatch import compare
from lars_fused.study.experiments.minibatch.plan import Plan
from lars_fused.study.loop import Trainer
from tests.study.commands import done_in_shares, finished, interrupted, refused
from tests.study.drawing import coarsely_drawn, undrawn
from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu

SMALL = [
    "minibatch", "--data=synthetic", "--train-images=128", "--batch=16", "--epochs=2",
    "--metrics=perceptual", "--prune", "--prune-seeds=2",
]  # fmt: skip
TABLES = ("distances.csv", "claims.csv", "prune.csv")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("minibatch")
    with pytest.MonkeyPatch.context() as patch:
        coarsely_drawn(patch)
        assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_the_command_leaves_its_tables_and_pictures(study: Path) -> None:
    table = rows(study / "distances.csv")
    assert len(table) == 2 * 8
    assert sorted({float(row["lr"]) for row in table}) == pytest.approx([0.01, 0.1])
    for row in table:
        assert float(row["distance"]) > 0
    for epoch in ("1", "2"):
        shares = [float(r["relative_distance"]) for r in table if r["epoch"] == epoch]
        assert sum(shares) == pytest.approx(8, rel=1e-5)
    for name in ("heat_perceptual", "layers_perceptual", "prune"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    arms = rows(study / "prune.csv")
    assert [(row["arm"], row["seed"]) for row in arms] == [
        (arm, seed) for arm in ("random", "sorted", "recommended") for seed in ("0", "1")
    ]
    assert {row["steps"] for row in arms} == {"16"}
    summary = summary_of(study)
    for verdict in summary["prune"]["verdicts"]:
        expected = [
            float(r["test_accuracy"]) - float(s["test_accuracy"])
            for r, s in zip([a for a in arms if a["arm"] == verdict["arm"]], arms[:2], strict=True)
        ]
        assert verdict["final"] == pytest.approx(expected)
    assert {"scikit-image", "torch"} <= summary["versions"].keys()
    assert not list(study.rglob("*.gradient"))


def test_arms_of_a_seed_begin_with_the_same_weights_and_differ_in_their_images(study: Path) -> None:
    plan = Plan.from_dict(plans.load(study)["plan"])
    found = {arm: runs.find(study, plan.arm(arm, 0)) for arm in ("random", "recommended")}
    made = [
        Trainer(replace(plan.arm(arm, 0), epochs=2.0), data.load("synthetic", 0, 128)).parameters
        for arm in found
    ]
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
    assert found["random"].history.losses != found["recommended"].history.losses
    assert found["random"].history.rates == found["recommended"].history.rates


def test_nothing_that_is_finished_is_done_again_and_shares_make_the_whole(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    merged = done_in_shares(SMALL, tmp_path)
    assert "share 2/2 is done" in capsys.readouterr().out
    monkeypatch.setattr(runs, "Trainer", None)
    monkeypatch.setattr(compare, "Trainer", None)
    assert main(["report", str(merged)]) == 0
    text = capsys.readouterr().out
    assert "Recommended mini-batches against random ones, 2 seeds, equal steps" in text
    for name in TABLES:
        assert (merged / name).read_bytes() == (study / name).read_bytes()
    assert main([*SMALL, f"--out={merged}"]) == 0
    text = capsys.readouterr().out
    assert "Gradient cache: 8 mini-batches of 17,610 numbers, 0.57 MB of" in text


def test_an_interrupted_study_goes_on_to_the_same_numbers(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    monkeypatch.setattr(compare, "CHECKPOINT_SECONDS", 0.0)  # every epoch is saved
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # and of other runs every step
    computed = interrupted(monkeypatch, compare._Start, "_compute", 8 + 4)
    assert main([*SMALL, f"--out={tmp_path}"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not list(tmp_path.rglob(compare.DISTANCES))
    # The second of two epochs, from the three gradients on that it had cached.
    del computed[:]
    steps = interrupted(monkeypatch, Trainer, "take_step", 8 + 2 * 16 + 5)
    assert main([*SMALL, f"--out={tmp_path}"]) == 130  # in the last of the first seed's three arms
    assert [(start.first, k) for start, k in computed] == [(8, k) for k in range(3, 8)]
    earlier = finished(tmp_path)
    assert len(earlier) == 1 + 1 + 2  # the network whose features are seen, comparison, two arms
    del steps[:]
    assert main([*SMALL, f"--out={tmp_path}"]) == 0
    assert len(steps) == 16 - 4 + 3 * 16  # the rest of the third arm, the second seed's three
    assert earlier.items() <= finished(tmp_path).items()
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=beauty"], "--metrics beauty is unknown; choose from intensity"),
        (["--metrics=edges,edges"], "names a metric twice"),
        (["--network=linear"], "this network has none"),
        (["--epochs=1.5"], "--epochs 1.5 is not allowed"),
        (["--batch=1000"], "--batch 1000 leaves 2 mini-batches"),
        (["--batch=9999"], "--batch 9,999 is larger"),
        (["--features=/nowhere"], "does not exist"),
        (["--prune", "--prune-seeds=1"], "1 is not in the range"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message) -> None:
    refused(["minibatch", "--data=synthetic", *arguments], message, tmp_path / "out", capsys)
