"""Every figure that docs/study.md shows is one that a file in docs/study/ holds."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "study"
STUDIES = sorted(path.parent for path in RESULTS.glob("*/summary.json"))

SWEEPS = [s for s in STUDIES if (s / "accuracy_by_batch.csv").exists()]
RULE_POINT = ("rule", "network", "lr", "beta1", "beta2", "momentum", "weight_decay")
LAYERS = [s for s in STUDIES if (s / "first_step.csv").exists()]


def table_after(mark: str) -> list[list[str]]:
    """The cells of the Markdown table that follows `<!-- mark -->`, without its head."""
    match = re.search(rf"<!-- {re.escape(mark)} -->\n\n((?:\|.*\n)+)", TEXT)
    assert match, f"docs/study.md has no table marked {mark}"
    lines = match[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def mean_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def grouped(path: Path, *names: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows(path):
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found


@pytest.mark.parametrize("study", SWEEPS, ids=lambda s: s.name)
def test_accuracy_against_batch_size(study: Path) -> None:
    cells = grouped(study / "accuracy_by_batch.csv", "method", "batch")
    shown = table_after(f"{study.name}: accuracy_by_batch")
    assert len(shown) == len(cells)
    for method, batch, steps, lr, accuracy in shown:
        runs = cells[method, batch.replace(",", "")]
        edge = "*" if runs[0]["at_edge"] == "True" else ""
        assert lr == f"{float(runs[0]['lr']):.4g}{edge}"
        assert accuracy == mean_spread([float(run["test_accuracy"]) for run in runs])
        assert steps.replace(",", "") == runs[0]["steps"]
        assert len(runs) == summary_of(study)["plan"]["seeds"]


@pytest.mark.parametrize("study", SWEEPS, ids=lambda s: s.name)
def test_accuracy_against_epochs(study: Path) -> None:
    cells = grouped(study / "accuracy_by_epochs.csv", "method", "epochs")
    if len({epochs for _, epochs in cells}) < 2:
        pytest.skip("trained for one length alone")
    shown = table_after(f"{study.name}: accuracy_by_epochs")
    assert len(shown) == len(cells)
    for method, epochs, accuracy in shown:
        runs = cells[method, f"{float(epochs)}"]
        assert accuracy == mean_spread([float(run["test_accuracy"]) for run in runs])


@pytest.mark.parametrize("study", LAYERS, ids=lambda s: s.name)
def test_spread_of_ratios_and_the_bound(study: Path) -> None:
    summary = summary_of(study)
    shown = table_after(f"{study.name}: layers")
    assert len(shown) == len(summary["first_step"])
    for line, first, bound in zip(shown, summary["first_step"], summary["bounds"], strict=True):
        batch, low, high, factor, held = line
        assert batch.replace(",", "") == str(first["batch"])
        assert low == f"{first['lowest'][1]:.3g} ({first['lowest'][0]})"
        assert high == f"{first['highest'][1]:.3g} ({first['highest'][0]})"
        assert factor == f"{first['highest'][1] / first['lowest'][1]:.0f}"
        assert held == f"{bound['tensors'] - bound['broken']} of {bound['tensors']}"
        ratios = [
            (float(row["ratio"]), row["tensor"])
            for row in rows(study / "first_step.csv")
            if row["batch"] == str(first["batch"])
            and float(row["weight_norm"])
            and float(row["gradient_norm"])
        ]
        assert [min(ratios)[1], max(ratios)[1]] == [first["lowest"][0], first["highest"][0]]


@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_the_command_that_made_it_and_its_pictures_are_shown(study: Path) -> None:
    command = summary_of(study)["command"]
    # The shell's line breaks and the quotes around nothing are all that may differ.
    shown = " ".join(TEXT.replace("\\\n", " ").split())
    assert " ".join(command) in shown
    pictures = {f"study/{study.name}/{p.name}" for p in study.glob("*.png")}
    assert pictures
    assert pictures <= set(re.findall(r"\]\((study/[^)]+\.png)\)", TEXT))


def test_percentages_in_sentences_are_means_of_a_file() -> None:
    known = set()
    for study in SWEEPS:
        for file, name in (("batch", "batch"), ("epochs", "epochs")):
            for runs in grouped(study / f"accuracy_by_{file}.csv", "method", name).values():
                known.add(f"{statistics.mean(float(r['test_accuracy']) for r in runs):.2f}")
    for study in LAYERS:
        accuracies = summary_of(study)["accuracy"]
        known |= {f"{value:.2f}" for value in accuracies.values()}
    for file, group, columns in (
        ("by_batch.csv", ("lr", "images", "batch"), ("test_accuracy",)),
        ("points.csv", RULE_POINT, ("best_validation", "test_at_best", "last_validation")),
    ):
        for path in RESULTS.glob(f"*/{file}"):
            for runs in grouped(path, *group).values():
                known |= {f"{statistics.mean(float(r[c]) for r in runs):.2f}" for c in columns}
    said = re.findall(r"(\d+\.\d\d) %", TEXT)
    assert said
    assert [number for number in said if number not in known] == []


def test_the_results_are_small_and_of_no_machine_in_particular() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    for folder in RESULTS.iterdir():  # one measurement each
        size = sum(path.stat().st_size for path in files if folder in path.parents)
        assert size < 700_000, folder
    for path in files:
        if path.suffix in (".json", ".csv"):
            assert not re.search(r'"/|:/', path.read_text().replace("://", "")), path
