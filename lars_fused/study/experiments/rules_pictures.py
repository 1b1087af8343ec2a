"""Pictures of a study of learning rules: Figures 2 to 7 of the coursework, and its networks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lars_fused.study import pictures
from lars_fused.study.experiments.rules import Outcome, Plan, best, described
from lars_fused.study.tables import counted

PRODUCTS = {
    "adam": ("beta1", "beta2", ("β1", "β2")),
    "lars": ("momentum", "weight_decay", ("μ", "weight decay")),
}
"""The options beside lr: one panel for each value of the first, a column for the second."""

NAMES = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam", "lars": "LARS"}


def epochs(o: Outcome) -> list[float]:
    """Of the evaluations that all seeds have."""
    result = min((p.result for p in o.peaks), key=lambda r: len(r.history.evaluations))
    return [e["step"] * result.epochs_per_step for e in result.history.evaluations]


def by_epoch(o: Outcome, name: str) -> list[list[float]]:
    """A figure of every evaluation, by seed."""
    columns = zip(*(p.result.history.evaluations for p in o.peaks), strict=False)
    return [[e[name] for e in column] for column in columns]


def rates(grids: Mapping[str, Sequence[Outcome]], heading: str, out: Path) -> str:
    """Figure 2 for every rule: best accuracy and its epoch against lr; other options at best."""
    with pictures.figure(out / "rates.png", heading, 2, width=5.2) as (left, right):
        for number, (rule, points) in enumerate(grids.items()):
            lrs = sorted({o.settings.lr for o in points})
            top = [best([o for o in points if o.settings.lr == lr]) for lr in lrs]
            pictures.line(left, lrs, [o.validation for o in top], NAMES[rule], number)
            pictures.line(
                right, lrs, [[p.epoch for p in o.peaks] for o in top], NAMES[rule], number
            )
        left.set(xscale="log", xlabel="learning rate", ylabel="best validation accuracy, %")
        right.set(xscale="log", xlabel="learning rate", ylabel="epoch of the best", ylim=(0, None))
        left.set_title("Best accuracy (other options at their best)")
        right.set_title("When it is reached")
        right.legend(
            frameon=False, fontsize=8, loc="lower left", title="mean, band: range of the seeds"
        )
    return "rates.png"


def curves(grids: Mapping[str, Sequence[Outcome]], heading: str, out: Path) -> list[str]:
    """Figures 3, 4 and 5: accuracy and training loss by epoch, a panel for each rule."""
    names = []
    for file, figure, label in (
        ("accuracy_by_epoch.png", "test_accuracy", "validation accuracy, %"),
        ("training_loss.png", "train_loss", "training loss"),
    ):
        with pictures.figure(out / file, heading, len(grids), width=3.9, height=4.2) as panels:
            for axes, (rule, points) in zip(panels, grids.items(), strict=True):
                lrs = sorted({o.settings.lr for o in points}, reverse=True)
                for number, lr in enumerate(lrs):
                    o = best([o for o in points if o.settings.lr == lr])
                    means = [statistics.mean(seeds) for seeds in by_epoch(o, figure)]
                    shade = pictures.shade(number / max(1, len(lrs) - 1))
                    axes.plot(epochs(o), means, color=shade, linewidth=1.4, label=f"lr {lr:g}")
                    if figure == "test_accuracy" and o is best(points):
                        trained = [statistics.mean(s) for s in by_epoch(o, "train_accuracy")]
                        axes.plot(epochs(o), trained, ":", color=shade, label="its training")
                axes.set(xlabel="epochs", title=NAMES[rule])
                if figure == "train_loss":
                    axes.set_yscale("log")
                axes.legend(frameon=False, fontsize=7)
            panels[0].set_ylabel(label)
        names.append(file)
    return names


def product_grid(points: Sequence[Outcome], heading: str, out: Path, rule: str) -> str:
    """Figure 6: accuracy over a product of options, a panel for each value of the first."""
    first, across, words = PRODUCTS[rule]
    lrs = sorted({o.settings.lr for o in points})
    columns = sorted({getattr(o.settings, across) for o in points})
    outer = sorted({getattr(o.settings, first) for o in points})
    file = f"{rule}_grid.png"
    high = max(o.mean for o in points)
    with pictures.figure(
        out / file, f"{heading}\n{NAMES[rule]}: best validation accuracy, %", len(outer),
        width=4.4, height=1.6 + 0.42 * len(lrs),
    ) as panels:  # fmt: skip
        for axes, value in zip(panels, outer, strict=True):
            shown = [[_mean(points, lr, {first: value, across: c}) for c in columns] for lr in lrs]
            axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=high, origin="lower")
            for y, row in enumerate(shown):
                for x, mean in enumerate(row):
                    colour = "black" if mean > 0.6 * high else "white"
                    axes.text(
                        x, y, f"{mean:.1f}", ha="center", va="center", color=colour, fontsize=8
                    )
            axes.set_axisbelow(True)
            axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
            axes.set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
            axes.set(xlabel=words[1], title=f"{words[0]} = {value:g}")
        panels[0].set_ylabel("learning rate")
    return file


def _mean(points: Sequence[Outcome], lr: float, options: dict[str, float]) -> float:
    for o in points:
        if o.settings.lr == lr and all(getattr(o.settings, k) == v for k, v in options.items()):
            return o.mean
    return float("nan")


def networks(trained: Mapping[str, Outcome], heading: str, out: Path) -> str:
    """Validation and training accuracy by epoch: batch normalisation, convolutions; Figure 7."""
    with pictures.figure(out / "networks.png", heading, 2, width=5.4) as (left, right):
        for number, (name, o) in enumerate(trained.items()):
            pictures.line(left, epochs(o), by_epoch(o, "test_accuracy"), name, number)
            colour = pictures.COLOURS[number % len(pictures.COLOURS)]
            for figure, style in (("train_loss", "-"), ("test_loss", "--")):
                losses = [statistics.mean(seeds) for seeds in by_epoch(o, figure)]
                right.plot(epochs(o), losses, style, color=colour, linewidth=1.2)
        left.set(xlabel="epochs", ylabel="validation accuracy, %")
        right.set(xlabel="epochs", yscale="log", title="Loss (dashed: validation)")
        left.set_title("Accuracy (band: range of the seeds)")
        left.legend(frameon=False, fontsize=8)
    return "networks.png"


def draw(
    plan: Plan,
    grids: Mapping[str, Sequence[Outcome]],
    trained: Mapping[str, Outcome],
    heading: str,
    out: Path,
) -> list[str]:
    """The pictures that there are runs for; their names."""
    names: list[str] = []
    if grids:
        seeds = f"{heading}, {counted(plan.seeds, 'seed')}"
        names += [rates(grids, seeds, out), *curves(grids, seeds, out)]
        names += [product_grid(grids[r], seeds, out, r) for r in ("adam", "lars") if r in grids]
    if trained:
        adam = described(next(iter(trained.values())).settings)
        seeds = f"{heading}, Adam ({adam}), {counted(plan.network_seeds, 'seed')}"
        names.append(networks(trained, seeds, out))
    return names
