"""What the demonstration leaves behind: tables as text, curves as a picture, numbers as files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lars_fused.study import files, pictures
from lars_fused.study.history import History
from lars_fused.study.tables import mean_spread, table


class Run(NamedTuple):
    """One training run of a recipe."""

    recipe: str
    seed: int
    history: History
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last step, in percent."""
        return self.history.accuracy


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of every recipe, in the order in which the recipes first come."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.recipe, []).append(run)
    return grouped


def accuracy_table(runs: Sequence[Run]) -> str:
    """Final test accuracy of every recipe: mean, standard deviation, and every seed."""
    rows = []
    for recipe, members in by_recipe(runs).items():
        final = [run.accuracy for run in members]
        loss = statistics.mean(run.history.losses[-1] for run in members)
        seeds = [f"{value:.1f}" for value in final]
        rows.append([recipe, mean_spread(final), *seeds, f"{loss:.4f}"])
    names = [f"seed {run.seed}" for run in next(iter(by_recipe(runs).values()))]
    return table(["", "test accuracy, %", *names, "last training loss"], rows)


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
        runs: all runs; all runs of one recipe have the same number of steps.
        epochs_per_step: the share of an epoch that a step is.
        warmup: the epoch at which warm-up ends.
        title: stands over both panels.
        file: the picture to write.
    """
    with pictures.figure(file, title, 2) as (left, right):
        for number, (recipe, members) in enumerate(by_recipe(runs).items()):
            first = members[0].history
            steps = [step * epochs_per_step for step in range(1, len(first.losses) + 1)]
            looked = [e["step"] * epochs_per_step for e in first.evaluations]
            losses = list(zip(*(run.history.losses for run in members), strict=True))
            evaluations = zip(*(run.history.evaluations for run in members), strict=True)
            accuracies = [[e["test_accuracy"] for e in column] for column in evaluations]
            label = f"{recipe}: {statistics.mean(accuracies[-1]):.2f} % at the end"
            pictures.line(left, steps, losses, recipe, number)
            pictures.line(right, looked, accuracies, label, number)
        left.set(yscale="log", ylabel="training loss (log scale)", title="Training loss")
        right.set(ylabel="test accuracy, %", title="Test accuracy", ylim=(None, 100.5))
        for axes in (left, right):
            axes.axvline(warmup, color="0.45", linestyle=":", linewidth=1.2, label="end of warm-up")
            axes.set(xlabel="epochs", xlim=(0, None))
        right.legend(frameon=False, fontsize=8)


def save(runs: Sequence[Run], stats: dict[str, Any], facts: dict[str, Any], folder: Path) -> None:
    """`curves.csv` has a row a step, `layers.csv` a row a layer, `summary.json` the rest."""
    rows: list[list[Any]] = []
    for run in runs:
        accuracies = {e["step"]: e["test_accuracy"] for e in run.history.evaluations}
        for step, loss in enumerate(run.history.losses, 1):
            rows.append([run.recipe, run.seed, step, loss, accuracies.get(step)])
    header = ["recipe", "seed", "step", "training_loss", "test_accuracy_percent"]
    files.write_csv(folder / "curves.csv", header, rows)
    columns = ["weight_norm", "gradient_norm", "decayed_norm", "trust_ratio", "effective_lr"]
    rows = [[name, *(getattr(layer, c) for c in columns)] for name, layer in stats.items()]
    files.write_csv(folder / "layers.csv", ["layer", *columns], rows)
    final = [
        {"recipe": run.recipe, "seed": run.seed, "accuracy": run.accuracy, "seconds": run.seconds}
        for run in runs
    ]
    files.write_json(folder / "summary.json", facts | {"runs": final})
