"""Plans of the experiments, shares of a sweep, and what reports make of finished runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")

from lars_fused.study import data, plans, runs
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import batch_size, batch_size_report, layers, layers_report
from lars_fused.study.experiments.batch_size import METHODS, Cell, Plan
from lars_fused.study.history import History
from lars_fused.study.loop import Trainer
from lars_fused.study.settings import Settings
from tests.study.commands import done_in_shares
from tests.study.drawing import coarsely_drawn
from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu

BASE = Settings(data="synthetic", network="linear", epochs=1.0)
IMAGES = 2048


def plan(**changes) -> Plan:
    made = Plan(
        base=BASE,
        methods=("sgd-linear", "sgd-warmup", "lars"),
        batches=(64, 512, 2048),
        sgd_grid=(0.01, 0.1, 1.0),
        lars_grid=(1.0, 10.0, 100.0),
        seeds=2,
        tuning_seeds=1,
        validation=400,
        warmup_epochs=0.25,
        longer=(1.0, 2.0),
    )
    return replace(made, **changes)


def result(settings: Settings, accuracy: float, loss: float = 1.0) -> runs.Result:
    history = History(
        losses=[loss],
        rates=[settings.peak_lr],
        evaluations=[
            {"step": 1, "train_loss": loss, "train_accuracy": accuracy, "test_loss": loss,
             "test_accuracy": accuracy}
        ],
    )  # fmt: skip
    return runs.Result(settings, history, 1, IMAGES, 10, 0.0, {})


def test_a_cell_is_tuned_on_held_out_images_and_then_trained_on_all() -> None:
    cell = Cell(plan(), "sgd-warmup", 512)
    seen: list[Settings] = []

    def trained(settings: Settings) -> runs.Result:
        seen.append(settings)
        return result(settings, 90 if settings.peak_lr == pytest.approx(0.8) else 50)

    outcome = batch_size.complete(cell, IMAGES, trained)
    tuning, final = seen[:3], seen[3:]
    # Linear scaling from batch 64 to 512: eight times every rate of the grid.
    assert [s.peak_lr for s in tuning] == pytest.approx([0.08, 0.8, 8.0])
    assert {s.validation for s in tuning} == {400}
    assert {s.validation for s in final} == {0}
    assert [s.seed for s in final] == [0, 1]
    assert not {s.seed for s in tuning} & {s.seed for s in final}
    assert [s.peak_lr for s in final] == pytest.approx([0.8, 0.8])
    assert {s.warmup_epochs for s in seen} == {0.25}
    assert (outcome.lr, outcome.at_edge, outcome.longer) == (pytest.approx(0.8), False, {})


def test_the_largest_batch_shrinks_where_images_are_held_out_but_keeps_its_rate() -> None:
    cell = Cell(plan(), "sgd-linear", 2048)
    tuning = [s for (s,) in cell.tuning(IMAGES)]
    assert {s.batch for s in tuning} == {1648}
    assert [s.peak_lr for s in tuning] == pytest.approx([0.32, 3.2, 32.0])
    assert {s.warmup_epochs for s in tuning} == {0.0}
    longer = cell.longer(0.1)
    assert list(longer) == [1.0, 2.0]
    assert longer[1.0] == cell.final(0.1)  # the same runs, so none is repeated
    assert Cell(plan(), "lars", 64).longer(1.0) == {}


def test_the_choice_and_its_ties() -> None:
    cell = Cell(plan(), "lars", 64)
    settings = [s for (s,) in cell.tuning(IMAGES)]

    def choice(*pairs: tuple[float, float]) -> int:
        tuned = [[result(s, *pair)] for s, pair in zip(settings, pairs, strict=True)]
        return batch_size.chosen(tuned)

    assert choice((50, 1.0), (60, 9.0), (55, 0.1)) == 1
    assert choice((60, 1.0), (60, 0.5), (60, 2.0)) == 1  # of equals the lower loss
    assert choice((60, math.nan), (60, 5.0), (10, 0.1)) == 1  # a diverged run is no equal
    outcome = batch_size.complete(cell, IMAGES, lambda s: result(s, s.lr))
    assert outcome.at_edge


def test_methods_must_be_tuned_alike_and_known() -> None:
    with pytest.raises(StudyError, match="tuned alike"):
        plan(lars_grid=(1.0, 2.0))
    with pytest.raises(StudyError, match="--methods lamb is unknown; choose from sgd-linear"):
        plan(methods=("lamb",))
    made = plan()
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    lars, sgd = (Cell(made, m, 64).settings(1.0, 0) for m in ("lars", "sgd-linear"))
    assert (lars.convention, lars.trust_coefficient, lars.scaling) == ("PAPER", 0.0, "none")
    assert (sgd.scaling, sgd.base_batch) == ("linear", 64)
    assert {METHODS[m].warmup for m in ("sgd-warmup", "lars")} == {True}


def lars_study(arguments: list[str], capsys) -> str:
    from lars_fused.study.cli import main

    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


SWEEP = [
    "batch-size", "--data=synthetic", "--network=linear", "--epochs=0.5", "--batches=256,all",
    "--methods=sgd-linear,lars", "--sgd-grid=0.01,0.1", "--lars-grid=5,20", "--seeds=2",
    "--longer=1,2",
]  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    from lars_fused.study.cli import main

    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        coarsely_drawn(patch)
        assert main([*SWEEP, f"--out={out}"]) == 0
    return out


def test_a_sweep_leaves_its_tables_pictures_and_settings(sweep: Path) -> None:
    table = rows(sweep / "accuracy_by_batch.csv")
    assert len(table) == 2 * 2 * 2  # methods, batches, seeds
    assert {row["batch"] for row in table} == {"256", "2048"}
    assert {row["steps"] for row in table if row["batch"] == "256"} == {"4"}
    assert len(rows(sweep / "accuracy_by_lr.csv")) == 2 * 2 * 2
    assert len(rows(sweep / "accuracy_by_epochs.csv")) == 2 * 2 * 2
    for name in ("accuracy_by_batch", "accuracy_by_lr", "accuracy_by_epochs", "loss_gap"):
        assert (sweep / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = summary_of(sweep)
    assert summary["plan"]["base"]["network"] == "linear"
    assert summary["command"][0] == "lars-study"
    assert {"torch", "python", "lars_fused"} <= summary["versions"].keys()
    for cell in summary["cells_finished"]:
        found = [
            float(row["test_accuracy"])
            for row in table
            if (row["method"], int(row["batch"])) == (cell["method"], cell["batch"])
        ]
        assert cell["mean"] == pytest.approx(sum(found) / 2)


def test_each_number_of_the_table_is_that_of_a_run_made_anew(sweep: Path) -> None:
    row = rows(sweep / "accuracy_by_batch.csv")[-1]
    cell = Plan.from_dict(plans.load(sweep)["plan"])
    method = METHODS[row["method"]]
    settings = replace(
        cell.base, optimizer=method.optimizer, scaling="none", lr=float(row["lr"]),
        batch=int(row["batch"]), seed=int(row["seed"]),
        warmup_epochs=cell.warmup_epochs if method.warmup else 0.0,
    )  # fmt: skip
    history = Trainer(settings, data.load("synthetic")).run()
    assert history.accuracy == float(row["test_accuracy"])
    assert history.evaluations[-1]["test_loss"] == float(row["test_loss"])


def test_finished_runs_are_found_and_not_repeated(sweep: Path, monkeypatch, capsys) -> None:
    def no_run(*args, **kwargs):
        raise AssertionError("a finished run was trained again")

    before = {p: p.stat().st_mtime_ns for p in sweep.rglob("result.json")}
    monkeypatch.setattr(runs, "Trainer", no_run)
    monkeypatch.setattr(batch_size_report, "draw", lambda *args: [])
    lars_study([*SWEEP, f"--out={sweep}"], capsys)
    assert before == {p: p.stat().st_mtime_ns for p in sweep.rglob("result.json")}


def test_shares_that_are_merged_are_the_whole_sweep(
    sweep: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(batch_size_report, "draw", lambda *args: [])
    merged = done_in_shares(SWEEP, tmp_path, 3)
    assert "share 3/3 is done" in capsys.readouterr().out
    alone = lars_study(["report", str(tmp_path / "1")], capsys)
    assert "2 of 4 cells are finished" in alone
    lars_study(["report", str(merged)], capsys)
    for name in ("batch", "lr", "epochs"):
        file = f"accuracy_by_{name}.csv"
        assert (merged / file).read_bytes() == (sweep / file).read_bytes()
    assert {p.name for p in (merged / "runs").iterdir()} == {
        p.name for p in (sweep / "runs").iterdir()
    }


def test_norms_by_layer_at_the_first_step_and_the_bound(tmp_path, monkeypatch, capsys) -> None:
    coarsely_drawn(monkeypatch)
    text = lars_study(
        ["layers", "--data=synthetic", "--network=alexnet", "--width=0.03125", "--epochs=0.5",
         "--batches=128", f"--out={tmp_path}"],
        capsys,
    )  # fmt: skip
    for name in ("layers_b128.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    first = rows(tmp_path / "first_step.csv")
    assert [row["tensor"] for row in first[:2]] == ["conv1.weight", "conv1.bias"]
    for row in first:
        weight, gradient = float(row["weight_norm"]), float(row["gradient_norm"])
        if row["tensor"].endswith("weight"):
            expected = 0.001 * weight / (gradient + 5e-4 * weight)
            assert float(row["trust_ratio"]) == pytest.approx(expected, rel=1e-5)
            assert float(row["ratio"]) == pytest.approx(weight / gradient)
    # The paper's legible numbers stand beside, and what is illegible is a question mark.
    line = next(x for x in text.splitlines() if x.startswith("fc6.weight"))
    assert line.split()[-3:] == ["6.4", "0.005", "1345"]
    line = next(x for x in text.splitlines() if x.startswith("conv2.weight"))
    assert line.split()[-3:] == ["?", "0.002", "83.5"]
    assert {row["held"] for row in rows(tmp_path / "bounds.csv")} <= {"True", "False"}
    assert "It held for " in text


def recorded(weights: list[float], rates: list[float]) -> runs.Result:
    settings = Settings(optimizer="lars", trust_coefficient=0.1, momentum=0.5, layers=3)
    history = History(rates=rates, layer_names=["w", "b"])
    for step, weight in enumerate(weights, 1):
        history.layers.append(
            {"step": step, "lr": rates[step - 1], "weight": [weight, 1.0], "gradient": [2.0, 0.0],
             "trust_ratio": [0.05, 1.0]}
        )  # fmt: skip
    return runs.Result(settings, history, len(rates), IMAGES, 2, 0.0, {})


def test_equation_7_by_hand() -> None:
    """η = 0.1 and rates 1, 2: after one step the bound is e^0.1 N(w₀), after two e^0.3 N(w₀)."""
    growth = [1.0, math.exp(0.1) * 0.99, math.exp(0.3) * 1.01]
    (bound,) = layers.bounds(recorded([4 * g for g in growth], [1.0, 2.0, 1.0]))
    assert (bound.name, bound.start) == ("w", 4.0)  # b is not adapted
    assert bound.grown == pytest.approx(growth[2])
    assert bound.used == pytest.approx(1.01)
    assert not bound.held
    # With 1 − μ = 0.5 the exponents double: the later step is the further below its bound.
    assert bound.with_momentum == pytest.approx(0.99 * math.exp(0.1 - 0.2))
    (kept,) = layers.bounds(recorded([4.0, 4.1, 4.2], [1.0, 2.0, 1.0]))
    assert kept.held


def test_the_spread_of_ratios_leaves_out_tensors_without_a_norm() -> None:
    rows = layers.first_step(recorded([4.0], [1.0]))
    assert [row.ratio for row in rows] == [2.0, math.inf]
    low, high = layers.spread(rows)
    assert (low.name, high.name) == ("w", "w")
    assert "a factor of 1: from 2 (w) to 2 (w)" in layers_report.spread_sentence(rows)
