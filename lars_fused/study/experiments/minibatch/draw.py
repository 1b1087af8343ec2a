"""The pictures of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lars_fused.study import pictures
from lars_fused.study.experiments.minibatch.compare import Distances
from lars_fused.study.experiments.minibatch.findings import by_layer, relative
from lars_fused.study.experiments.minibatch.plan import ARMS, METRICS, Plan
from lars_fused.study.runs import Result

HEAT = "YlGnBu"
"""Light for near, dark for far, as in the text's figures."""


def _heat(axes: Any, values: Tensor, label: str, extent: Sequence[float] | None = None) -> None:
    """A heat map with its scale below it; one cell is a square of no particular size."""
    drawn = axes.imshow(
        values.numpy(), cmap=HEAT, aspect="auto", interpolation="nearest", extent=extent
    )
    bar = axes.figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.85, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def heat_maps(distances: Distances, metric: str, heading: str, file: Path) -> None:
    """Figures 1 to 4: above as there, D itself; below D over its mean in the epoch."""
    phases = distances.phases()
    both = (distances.total, "N(∇k − ∇e)"), (relative(distances.total), "over the epoch's mean")
    title = f"{heading}\nsorted by {METRICS[metric]}; light = near to the full gradient"
    size: dict[str, Any] = {"rows": 2, "width": 3.6, "height": 3.2, "dpi": 90}
    with pictures.figure(file, title, len(phases), **size) as panels:
        for row, (values, label) in enumerate(both):
            for number, phase in enumerate(phases):
                axes = panels[row * len(phases) + number]
                rows = values[list(phase)]
                extent = (0.5, rows.shape[1] + 0.5, phase.stop + 0.5, phase.start + 0.5)
                _heat(axes, rows, label, extent)
                rate = distances.rates[phase.start]
                last = f"–{phase.stop}" if len(phase) > 1 else ""
                axes.set_title(f"epoch {phase.start + 1}{last}, lr {rate:.3g}", fontsize=9)
                axes.set_xlabel("mini-batch, by ascending score", fontsize=8)
            panels[row * len(phases)].set_ylabel("epoch")


def layer_maps(distances: Distances, metric: str, heading: str, file: Path) -> None:
    """By tensor: the distance of each mini-batch over the tensor's mean, averaged over a phase."""
    phases, names = distances.phases(), distances.names
    title = f"{heading}\nby tensor, sorted by {METRICS[metric]}; light = near"
    height = min(9.0, 2.2 + 0.17 * len(names))
    size: dict[str, Any] = {"width": 3.8, "height": height, "dpi": 90}
    with pictures.figure(file, title, len(phases), **size) as panels:
        for axes, rows, phase in zip(panels, by_layer(distances), phases, strict=True):
            extent = (0.5, rows.shape[1] + 0.5, len(names) - 0.5, -0.5)
            _heat(axes, rows, "N(∇k − ∇e) over the tensor's mean", extent)
            axes.set_title(f"lr {distances.rates[phase.start]:.3g}", fontsize=9)
            axes.set_xlabel("mini-batch, by ascending score", fontsize=8)
            axes.set_yticks([])
        if len(names) <= 60:
            panels[0].set_yticks(range(len(names)), names, fontsize=6)


def prune_curves(arms: dict[str, list[Result]], plan: Plan, heading: str, file: Path) -> None:
    """Test accuracy and training loss by step, all arms; dotted where the rate changes."""
    title = f"{heading}\nmini-batches as recommended against random ones, {plan.prune_seeds} seeds"
    with pictures.figure(file, title, 2, width=5.0, height=3.9, dpi=100) as panels:
        for number, (arm, results) in enumerate(arms.items()):
            columns = list(zip(*(r.history.evaluations for r in results), strict=False))
            steps = [column[0]["step"] for column in columns]
            for axes, name in zip(panels, ("test_accuracy", "train_loss"), strict=True):
                seeds = [[e[name] for e in column] for column in columns]
                pictures.line(axes, steps, seeds, ARMS[arm], number)
        total = max(r.steps for r in next(iter(arms.values())))
        for axes in panels:
            axes.set_xlabel("steps")
            for end in plan.base.milestones:
                axes.axvline(end * total, color="0.5", linestyle=":", linewidth=0.9)
        panels[0].set_ylabel("test accuracy, %")
        panels[1].set(ylabel="training loss (log scale)", yscale="log")
        pictures.legend_below(panels)
