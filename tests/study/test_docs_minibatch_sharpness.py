"""The tables of docs/study.md about mini-batches and sharpness are those of docs/study/*.csv."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.study.tables import rows, summary_of
from tests.study.test_docs import RESULTS, grouped, mean_spread, table_after

pytestmark = pytest.mark.cpu

COMPARED = sorted(path.parent for path in RESULTS.glob("*/claims.csv"))
MEASURED = sorted(path.parent for path in RESULTS.glob("*/sharpness.csv"))


def test_there_is_something_to_compare() -> None:
    assert COMPARED
    assert MEASURED


@pytest.mark.parametrize("study", COMPARED, ids=lambda s: s.name)
def test_distances_by_quarter_of_the_order(study: Path) -> None:
    cells = grouped(study / "distances.csv", "metric", "lr")
    shown = table_after(f"{study.name}: quarters")
    assert len(shown) == len(cells)
    for line, ((metric, lr), found) in zip(shown, cells.items(), strict=True):
        assert line[:2] == [metric, f"{float(lr):.3g}"]
        batches = max(int(row["mini_batch"]) for row in found)
        groups: dict[str, list[float]] = {}
        for row in found:
            place = (int(row["mini_batch"]) - 0.5) / batches
            share = float(row["relative_distance"])
            groups.setdefault(f"quarter {int(4 * place)}", []).append(share)
            groups.setdefault("middle" if abs(place - 0.5) <= 0.4 else "ends", []).append(share)
        means = {name: statistics.mean(values) for name, values in groups.items()}
        assert line[2:6] == [f"{means[f'quarter {q}']:.3f}" for q in range(4)]
        assert line[6] == f"{means['ends'] / means['middle']:.3f}"


@pytest.mark.parametrize("study", COMPARED, ids=lambda s: s.name)
def test_claims_and_how_they_came_out(study: Path) -> None:
    found = [
        [r["metric"], r["phase"], r["text"], f"{float(r['ratio']):.3f}",
         f"{100 * float(r['epochs']):.0f}", "yes" if r["held"] == "True" else "**no**"]
        for r in rows(study / "claims.csv")
    ]  # fmt: skip
    assert table_after(f"{study.name}: claims") == found


@pytest.mark.parametrize("study", COMPARED, ids=lambda s: s.name)
def test_pruned_runs_and_the_verdict(study: Path) -> None:
    summary = summary_of(study)
    arms = grouped(study / "prune.csv", "arm")
    shown = table_after(f"{study.name}: prune")
    assert [line[0] for line in shown] == [arm for (arm,) in arms]
    verdicts = {v["arm"]: v["sentence"].split(":")[0].lower() for v in summary["prune"]["verdicts"]}
    for (arm, final, average, verdict), runs in zip(shown, arms.values(), strict=True):
        assert final == mean_spread([float(r["test_accuracy"]) for r in runs])
        assert average == mean_spread([float(r["mean_test_accuracy"]) for r in runs])
        assert verdict == verdicts.get(arm, "")


@pytest.mark.parametrize("study", MEASURED, ids=lambda s: s.name)
def test_table_1_of_the_notes(study: Path) -> None:
    cells = grouped(study / "functions.csv", "figure", "matrix", "epsilon")
    shown = table_after(f"{study.name}: functions")
    assert len(shown) == len(cells) == 16
    for line, ((figure, matrix, epsilon), draws) in zip(shown, cells.items(), strict=True):
        values = [float(r["sharpness"]) for r in draws]
        assert line[:4] == [figure, matrix, epsilon, draws[0]["printed"]]
        assert line[4] == f"{statistics.median(values):.1e}"
        spread = f"{min(values):.1e} to {max(values):.1e}" if matrix == "random" else ""
        assert line[5] == spread


@pytest.mark.parametrize("study", MEASURED, ids=lambda s: s.name)
def test_sharpness_against_batch_size(study: Path) -> None:
    cells = grouped(study / "sharpness.csv", "optimizer", "batch")
    shown = table_after(f"{study.name}: sharpness")
    assert {(line[0], line[1].replace(",", "")) for line in shown} == set(cells)
    for line in shown:
        found = cells[line[0], line[1].replace(",", "")]
        boxes: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in found:
            boxes.setdefault((row["matrix"], row["epsilon"]), []).append(row)
        first = next(iter(boxes.values()))
        assert line[2] == first[0]["steps"]
        assert line[3] == mean_spread([float(r["test_accuracy"]) for r in first])
        values = [mean_spread([float(r["sharpness"]) for r in each]) for each in boxes.values()]
        assert line[4:] == values
