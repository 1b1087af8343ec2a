"""`lars-study sharpness`: files, shares, interruption, damaged files, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import data, loop, plans, runs
from lars_fused.study.cli import main
from lars_fused.study.experiments.sharpness import work
from lars_fused.study.experiments.sharpness.maximise import sharpness
from lars_fused.study.experiments.sharpness.plan import Plan
from lars_fused.study.experiments.sharpness.subspace import RandomColumns
from lars_fused.study.experiments.sharpness.surface import (
    Surface,
)
from lars_fused.study.loop import Trainer
from lars_fused.study.settings import Settings
from tests.study.commands import done_in_shares, finished, interrupted, refused
from tests.study.drawing import coarsely_drawn, undrawn
from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu

SMALL = [
    "sharpness", "--data=synthetic", "--train-images=256", "--network=mlp-bn", "--epochs=2",
    "--batches=32,128", "--optimizers=lars", "--seeds=2", "--epsilons=0.001,0.0005",
    "--columns=5", "--images=100", "--points=4", "--draws=3",
]  # fmt: skip
TABLES = ("sharpness.csv", "paths.csv", "functions.csv", "accuracy_by_epoch.csv")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sharpness")
    with pytest.MonkeyPatch.context() as patch:
        coarsely_drawn(patch)
        assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_the_command_leaves_its_tables_and_pictures(study: Path) -> None:
    table = rows(study / "sharpness.csv")
    assert len(table) == 2 * 2 * 4  # seeds, batches, boxes
    for row in table:
        value = 100 * (float(row["largest_loss"]) - float(row["loss"])) / (1 + float(row["loss"]))
        assert float(row["sharpness"]) == pytest.approx(value)
    assert {(r["optimizer"], r["batch"], r["steps"]) for r in table} == {
        ("lars", "32", "16"),
        ("lars", "128", "4"),
    }
    for name in ("sharpness_by_batch", "accuracy_by_epoch", "paths", "functions"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    ends = [r for r in rows(study / "paths.csv") if r["alpha"] in ("0.0", "1.0")]
    assert len(ends) == 2 * 2  # paths, ends; of the first seed
    accuracies = {r["batch"]: float(r["test_accuracy"]) for r in table if r["seed"] == "0"}
    for row in ends:
        batch = "32" if row["alpha"] == "0.0" else "128"  # the small batch is at α = 0
        assert float(row["test_accuracy"]) == accuracies[batch]
    summary = summary_of(study)
    assert len(summary["functions"]) == 16
    assert all(f["agrees"] for f in summary["functions"] if not f["random"])
    assert summary["versions"]["scipy"]


def test_each_number_is_that_of_a_sharpness_measured_anew(study: Path) -> None:
    plan = Plan.from_dict(plans.load(study)["plan"])
    row = rows(study / "sharpness.csv")[-1]
    settings = plan.settings(row["optimizer"], int(row["batch"]), int(row["seed"]))
    loaded = data.load("synthetic", 0, 256)
    network = work.network(loaded, settings)
    network.load_state_dict(work.weights(study, settings))
    surface = Surface(network, data.first(loaded, 100).train)
    space = RandomColumns(len(surface.start), 5, work.MATRIX_SEED)
    again = sharpness(surface, surface.start, space, float(row["epsilon"]))
    assert (row["matrix"], again.value) == ("random", float(row["sharpness"]))


def test_nothing_that_is_finished_is_done_again_and_shares_make_the_whole(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    merged = done_in_shares(SMALL, tmp_path)
    assert "share 2/2 is done" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "1")]) == 0
    assert "2 of 4 runs are finished and measured" in capsys.readouterr().out
    for module, name in ((runs, "Trainer"), (work, "sharpness"), (work, "along")):
        monkeypatch.setattr(module, name, None)
    assert main([*SMALL, f"--out={merged}"]) == 0
    for name in TABLES:
        assert (merged / name).read_bytes() == (study / name).read_bytes()
    file = next((merged / "sharpness").glob("*.json"))
    file.write_text(file.read_text()[:30])
    capsys.readouterr()
    assert main(["report", str(merged)]) == 1
    shown = capsys.readouterr()
    assert f"{file} is not a whole JSON file" in shown.err
    assert shown.err.count("\n") == 1
    file.write_text('{"of": {}, "measured": {}}')
    assert main(["report", str(merged)]) == 1
    assert "holds another measurement than its name says" in capsys.readouterr().err


def test_an_interrupted_study_goes_on_to_the_same_numbers(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # every step is saved
    boxes = interrupted(monkeypatch, work, "sharpness", 3)  # of the first network
    assert main([*SMALL, f"--out={tmp_path}"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    steps = interrupted(monkeypatch, Trainer, "take_step", 7)
    assert main([*SMALL, f"--out={tmp_path}"]) == 130  # in the second network
    assert len(boxes) == 3 + 2
    earlier = finished(tmp_path)
    assert len(earlier) == 1 + 4  # the first network, its four boxes
    assert main([*SMALL, f"--out={tmp_path}"]) == 0
    assert len(steps) == 7 + 10 + 4 + 16  # on from the sixth step of sixteen
    assert len(boxes) == 5 + 3 * 4
    assert earlier.items() <= finished(tmp_path).items()
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()


def test_a_plan_survives_json_and_both_ends_are_on_every_path() -> None:
    plan = Plan(Settings(), {"adam": 1e-3}, (32, 64), 1, (1e-3,), 100, 0, 10, 25, 100)
    assert plan.alphas[0] == -1
    assert plan.alphas[-1] == 2
    assert {0.0, 1.0} <= set(plan.alphas)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers=lamb"], "--optimizers lamb is unknown; choose from adam, sgd, lars"),
        (["--optimizers=adam,adam"], "names one twice"),
        (["--batches=64"], "needs a small and a large batch size"),
        (["--batches=64,9999"], "--batch 9,999 is larger"),
        (["--epsilons=0.1,-1"], "the numbers must be positive"),
        (["--images=5000"], "--images 5000 is more than the 2,048"),
        (["--columns=0"], "0 is not in the range"),
        (["--scaling=cubic"], "'cubic' is not one of"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message) -> None:
    refused(["sharpness", "--data=synthetic", *arguments], message, tmp_path / "out", capsys)
