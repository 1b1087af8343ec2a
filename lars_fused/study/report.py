"""What the demonstration leaves behind: tables as text, curves as a picture, numbers as files."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lars_fused.study.training import Run

COLOURS = {"LARS": "#0072b2", "SGD": "#d55e00", "SGD, tuned": "#009e73"}
"""Told apart by colour-blind readers too (Okabe and Ito)."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their contents: the first to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every recipe, in the order in which the recipes first come."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def spread(values: Sequence[float]) -> float:
    """Standard deviation between seeds; a single seed has none."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy_table(runs: Sequence[Run]) -> str:
    """Final test accuracy of every recipe: mean, standard deviation, and every seed."""
    rows = []
    for recipe, members in by_recipe(runs).items():
        final = [run.accuracy for run in members]
        row = [recipe, f"{statistics.mean(final):.2f} ± {spread(final):.2f}"]
        row += [f"{value:.1f}" for value in final]
        rows.append([*row, f"{statistics.mean(run.losses[-1] for run in members):.4f}"])
    seeds = [f"seed {run.seed}" for run in next(iter(by_recipe(runs).values()))]
    return table(["", "test accuracy, %", *seeds, "last training loss"], rows)


def verdict(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """What two recipes' accuracies show, in one sentence, whichever way they came out."""
    first, second = ours[0].recipe, theirs[0].recipe
    gap = statistics.mean(r.accuracy for r in ours) - statistics.mean(r.accuracy for r in theirs)
    wins = sum(a.accuracy > b.accuracy for a, b in zip(ours, theirs, strict=True))
    losses = sum(a.accuracy < b.accuracy for a, b in zip(ours, theirs, strict=True))
    if max(wins, losses) < len(ours):
        return (
            f"{first} against {second}: ahead in {wins} of {len(ours)} seeds, behind in {losses}, "
            f"{gap:+.2f} points on average: no difference is shown."
        )
    side = "ahead" if wins else "behind"
    return f"{first} against {second}: {side} in every seed, {gap:+.2f} points on average."


def layer_table(stats: dict[str, Any]) -> str:
    """The paper's Table 2 (first step): N(w), N(g), their ratio, and the trust ratio made of it."""
    rows = []
    for name, layer in stats.items():
        weight, gradient = layer.weight_norm, layer.gradient_norm
        ratio = f"{weight / gradient:.4g}" if gradient else "-"
        norms = [f"{weight:.4g}", f"{gradient:.4g}", ratio]
        rows.append([name, *norms, f"{layer.trust_ratio:.4g}"])
    return table(["layer", "N(w)", "N(g)", "N(w)/N(g)", "trust ratio"], rows)


def plot(
    runs: Sequence[Run], epochs_per_step: float, warmup: float, title: str, file: Path
) -> None:
    """Training loss and test accuracy against epochs: the seeds' mean as a line, range as a band.

    Args:
        runs: all runs; those of one recipe have equally many steps.
        epochs_per_step: the share of an epoch that a step is.
        warmup: the epoch at which warm-up ends.
        title: stands over both panels.
        file: the picture to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for recipe, members in by_recipe(runs).items():
        colour = COLOURS.get(recipe)
        evaluated = [step * epochs_per_step for step in members[0].evaluated]
        every_step = [step * epochs_per_step for step in range(1, len(members[0].losses) + 1)]
        losses = [run.losses for run in members]
        accuracies = [run.accuracies for run in members]
        for axes, x, series in ((left, every_step, losses), (right, evaluated, accuracies)):
            columns = list(zip(*series, strict=True))
            mean = [statistics.mean(column) for column in columns]
            label = f"{recipe}: {mean[-1]:.2f} % at the end" if axes is right else None
            axes.plot(x, mean, color=colour, label=label)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    left.set(yscale="log", ylabel="training loss (log scale)", title="Training loss")
    right.set(ylabel="test accuracy, %", title="Test accuracy", ylim=(None, 100.5))
    for axes in (left, right):
        axes.axvline(warmup, color="0.45", linestyle=":", linewidth=1.2, label="end of warm-up")
        axes.set(xlabel="epochs", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save(runs: Sequence[Run], stats: dict[str, Any], facts: dict[str, Any], folder: Path) -> None:
    """`curves.csv` has a row a step, `layers.csv` a row a layer, `summary.json` the rest."""
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["recipe", "seed", "step", "training_loss", "test_accuracy_percent"])
        for run in runs:
            accuracies = dict(zip(run.evaluated, run.accuracies, strict=True))
            for step, loss in enumerate(run.losses, 1):
                writer.writerow([run.recipe, run.seed, step, loss, accuracies.get(step, "")])
    columns = ["weight_norm", "gradient_norm", "decayed_norm", "trust_ratio", "effective_lr"]
    with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["layer", *columns])
        for name, layer in stats.items():
            writer.writerow([name, *(getattr(layer, column) for column in columns)])
    final = [
        {"recipe": run.recipe, "seed": run.seed, "accuracy": run.accuracy, "seconds": run.seconds}
        for run in runs
    ]
    text = json.dumps(facts | {"runs": final}, indent=2) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
