"""The tables of docs/study.md on noise and learning rules are those of the files beside it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.study.tables import summary_of
from tests.study.test_docs import STUDIES, grouped, mean_spread, table_after

pytestmark = pytest.mark.cpu

NOISE = [s for s in STUDIES if (s / "by_batch.csv").exists()]
RULES = [s for s in STUDIES if (s / "points.csv").exists()]


@pytest.mark.parametrize("study", NOISE, ids=lambda s: s.name)
def test_best_batch_sizes(study: Path) -> None:
    held, points = summary_of(study), grouped(study / "by_batch.csv", "lr", "images", "batch")
    shown = table_after(f"{study.name}: best")
    assert len(shown) == len(held["best"])
    for line, best in zip(shown, held["best"], strict=True):
        lr, images, batch, interval, enough, accuracy = line
        assert (float(lr), images) == (best["lr"], f"{best['images']:,}")
        assert batch == f"{best['batch']:.0f}{'*' if best['at_edge'] else ''}"
        assert interval == f"{best['low']:.0f} to {best['high']:.0f}"
        assert enough == f"{best['enough']}"
        means = {
            int(b): [float(r["test_accuracy"]) for r in runs]
            for (rate, size, b), runs in points.items()
            if (float(rate), int(size)) == (best["lr"], best["images"])
        }
        top = max(means, key=lambda b: statistics.mean(means[b]))
        assert accuracy == mean_spread(means[top])


@pytest.mark.parametrize("study", NOISE, ids=lambda s: s.name)
def test_gradient_noise_and_shares(study: Path) -> None:
    held = summary_of(study)
    for line, point in zip(
        table_after(f"{study.name}: gradients"), held["gradient_noise"], strict=True
    ):
        exact, ours = point["exact"], point["estimated"]
        value = ours["trace"] / ours["square"]
        assert line == [
            f"{point['step']}",
            f"{exact['trace'] / exact['square']:.1f}",
            f"{value:.1f} ± {ours['value_error']:.1f}",
        ]
    if not (study / "wells.csv").exists():  # the made loss has no data: one study shows it
        return
    cells = {(w["tilt"], w["temperature"], w["batch"]): w for w in held["wells"]}
    batches = sorted({w["batch"] for w in held["wells"]})
    groups = list(dict.fromkeys((w["tilt"], w["temperature"]) for w in held["wells"]))
    for line, key in zip(table_after(f"{study.name}: wells"), groups, strict=True):
        first = cells[(*key, batches[0])]
        assert line[1] == f"{first['lr'] / first['batch']:.3g}"
        assert line[2] == f"{first['equation_25']:.3f}"
        assert line[3:] == [f"{cells[(*key, b)]['flat_share']:.3f}" for b in batches]


@pytest.mark.parametrize("study", RULES, ids=lambda s: s.name)
def test_rules_and_networks(study: Path) -> None:
    held = summary_of(study)
    for part in ("rules", "networks"):
        shown = table_after(f"{study.name}: {part}")
        assert len(shown) == len(held[part])
        for line, (name, one) in zip(shown, held[part].items(), strict=True):
            epochs = f"{statistics.mean(one['epochs']):.1f}"
            assert line[0] == name
            if part == "rules":
                assert line[1] == one["at"]
            assert line[-6:-1] == [
                said(one["validation"]),
                epochs,
                f"{one['fallen']:.2f}",
                f"{one['gap']:.2f}",
                said(one["test"]),
            ]


def said(values: list[float]) -> str:
    return mean_spread(values) if len(values) > 1 else f"{values[0]:.2f}"
