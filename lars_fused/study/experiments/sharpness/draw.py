"""The pictures of the study: Figures 4, 5, 6 and 7 of the notes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lars_fused.study import pictures
from lars_fused.study.experiments.sharpness.functions import FUNCTIONS
from lars_fused.study.experiments.sharpness.plan import MATRICES, PATHS, Plan
from lars_fused.study.experiments.sharpness.surface import Point
from lars_fused.study.experiments.sharpness.work import Measurement

SIZE: dict[str, Any] = {"width": 4.4, "height": 3.6, "dpi": 95}
PATH_NAMES = {
    "linear": "(1 − α)xₛ + αxₗ",
    "sine": "cos(απ/2)xₛ + sin(απ/2)xₗ",
}


def of(found: Sequence[Measurement], optimizer: str, batch: int) -> list[Measurement]:
    """The seeds of one optimizer at one batch size."""
    return [
        m
        for m in found
        if (m.result.settings.optimizer, m.result.settings.batch) == (optimizer, batch)
    ]


def functions(file: Path) -> None:
    """Figure 6: the four functions of Table 1."""
    title = "Functions with flat and sharp minima"
    with pictures.figure(file, title, 4, width=2.9, height=2.7, dpi=80) as panels:
        for axes, (figure, (function, dimensions, formula)) in zip(
            panels, FUNCTIONS.items(), strict=True
        ):
            axes.set_title(f"{figure}: {formula}", fontsize=9)
            x = np.linspace(-1.2, 1.2, 49)
            if dimensions == 1:
                axes.plot(x, [function(np.array([one]))[0] for one in x])
                axes.set(xlabel="x", ylim=(0, 6))
                continue
            heights = [[function(np.array([a, b]))[0] for a in x] for b in x]
            drawn = axes.contourf(x, x, heights, levels=12, cmap="viridis")
            axes.figure.colorbar(drawn, ax=axes)
            axes.set(xlabel="x", ylabel="y")


def by_batch(found: Sequence[Measurement], plan: Plan, heading: str, file: Path) -> None:
    """Figure 7: test accuracy, and sharpness for every ε, against batch size."""
    names = list(plan.rates)
    with pictures.figure(file, heading, len(names), rows=2, **SIZE) as panels:
        for column, name in enumerate(names):
            batches = [b for b in plan.batches if of(found, name, b)]
            groups = [of(found, name, b) for b in batches]
            if not groups:
                continue
            for row, matrix in enumerate(MATRICES):
                axes = panels[row * len(names) + column]
                accuracy = [[m.result.accuracy for m in group] for group in groups]
                pictures.line(axes, batches, accuracy, "test accuracy (left)", 0)
                pictures.batch_axis(axes, plan.batches)
                right = axes.twinx()
                for number, epsilon in enumerate(plan.epsilons, 1):
                    seeds = [[m.sharpness[matrix, epsilon].value for m in g] for g in groups]
                    label = f"sharpness, ε = {epsilon:g} (right, log scale)"
                    pictures.line(right, batches, seeds, label, number)
                right.set_yscale("log")
                axes.set_title(f"{name.upper()}, A {matrix}", fontsize=10)
                if row == column == 0:
                    pictures.legend_below([axes, right])
        for row in range(2):
            panels[row * len(names)].set_ylabel("test accuracy, %")


def by_epoch(found: Sequence[Measurement], plan: Plan, heading: str, file: Path) -> None:
    """Figure 4: training and test accuracy by epoch, of the smallest and the largest batch."""
    names = list(plan.rates)
    with pictures.figure(file, heading, len(names), **SIZE) as panels:
        for axes, name in zip(panels, names, strict=True):
            for number, batch in enumerate((plan.batches[0], plan.batches[-1])):
                group = of(found, name, batch)
                if not group:
                    continue
                columns = list(zip(*(m.result.history.evaluations for m in group), strict=False))
                share = group[0].result.epochs_per_step
                epochs = [column[0]["step"] * share for column in columns]
                for figure, style in (("train_accuracy", "--"), ("test_accuracy", "-")):
                    means = [statistics.mean(e[figure] for e in column) for column in columns]
                    which = "training" if figure == "train_accuracy" else "test"
                    label = f"batch {batch:,}, {which}"
                    axes.plot(epochs, means, style, color=pictures.COLOURS[number], label=label)
            axes.set(xlabel="epochs", title=name.upper())
        panels[0].set_ylabel("accuracy, %, mean of the seeds")
        pictures.legend_below(panels)


def paths(found: dict[tuple[str, str], list[Point]], plan: Plan, heading: str, file: Path) -> None:
    """Figure 5: loss and accuracy from the small-batch (α = 0) to the large-batch solution (1)."""
    names = list(plan.rates)
    with pictures.figure(file, heading, len(names), rows=2, **SIZE) as panels:
        for row, path in enumerate(PATHS):
            for column, name in enumerate(names):
                axes, points = panels[row * len(names) + column], found.get((name, path))
                if points is None:
                    continue
                alphas = [p.alpha for p in points]
                right = axes.twinx()
                for style, which in (("-", "train"), ("--", "test")):
                    words = "training" if which == "train" else "test"
                    loss = [getattr(p, f"{which}_loss") for p in points]
                    accuracy = [getattr(p, f"{which}_accuracy") for p in points]
                    blue, orange = pictures.COLOURS[:2]
                    axes.plot(alphas, loss, style, color=blue, label=f"{words} loss (left, log)")
                    label = f"{words} accuracy (right, %)"
                    # Drawn on the right, named on the left, where the legend is made.
                    axes.plot([], [], style, color=orange, label=label)
                    right.plot(alphas, accuracy, style, color=orange)
                axes.set(yscale="log", xlabel=f"α of {PATH_NAMES[path]}")
                axes.set_title(f"{name.upper()}, {path} path", fontsize=10)
                right.set_ylim(0, 101)
                for end in (0.0, 1.0):
                    axes.axvline(end, color="0.5", linestyle=":", linewidth=0.9)
        pictures.legend_below(panels)
