"""Tables and pictures of a batch-size study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lars_fused.study import files, pictures
from lars_fused.study.data import load
from lars_fused.study.experiments.batch_size import METHODS, Outcome, Plan, finished
from lars_fused.study.plans import load as load_plan
from lars_fused.study.runs import Result
from lars_fused.study.tables import counted, data_name, mean_spread, network_name, spread, table


def images_of(plan: Plan) -> int:
    """The size of the training set."""
    base = plan.base
    return len(load(base.data, base.resolution, base.train_images).train)


def title(plan: Plan, images: int) -> str:
    """One line over every picture."""
    base = plan.base
    size = f" at {base.resolution}x{base.resolution}" if base.resolution else ""
    return (
        f"{data_name(base)}{size}, {images:,} training images, {network_name(base)}, "
        f"{base.epochs:g} epochs, {counted(plan.seeds, 'seed')}"
    )


def by_method(outcomes: Sequence[Outcome], plan: Plan) -> dict[str, list[Outcome]]:
    """The finished cells of each method, in the order of their batches."""
    ordered = sorted(outcomes, key=lambda o: o.cell.batch)
    return {m: [o for o in ordered if o.cell.method == m] for m in plan.methods}


def last(results: Sequence[Result], name: str) -> list[float]:
    """A figure of the last evaluation, by seed."""
    return [r.history.evaluations[-1][name] for r in results]  # type: ignore[literal-required]


def accuracy_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """Tables 1 and 3 in small."""
    rows = []
    for method, cells in by_method(outcomes, plan).items():
        for o in cells:
            train, test = last(o.final, "train_loss"), last(o.final, "test_loss")
            stopped = sum(r.history.diverged > 0 for r in o.final)
            rows.append(
                [
                    METHODS[method].label,
                    f"{o.cell.batch:,}",
                    str(o.final[0].steps),
                    f"{o.lr:.4g}{'*' if o.at_edge else ''}",
                    f"{statistics.mean(r.accuracy for r in o.tuned[o.best]):.2f}",
                    mean_spread(o.accuracies),
                    f"{statistics.mean(train):.3f}",
                    f"{statistics.mean(test):.3f}",
                    str(stopped) if stopped else "",
                ]
            )
    header = [
        "method",
        "batch",
        "steps",
        "lr",
        "validation, %",
        "test accuracy, %",
        "training loss",
        "test loss",
        "diverged",
    ]
    return table(header, rows)


def epochs_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """Table 5 in small: the largest batch, trained for longer."""
    rows = []
    for method, cells in by_method(outcomes, plan).items():
        for o in cells:
            for epochs, results in o.longer.items():
                accuracies = [r.accuracy for r in results]
                rows.append([METHODS[method].label, f"{epochs:g}", mean_spread(accuracies)])
    return table(["method", "epochs", "test accuracy, %"], rows) if rows else ""


def lr_rows(outcomes: Sequence[Outcome]) -> list[list[object]]:
    """A row for every point of every grid."""
    return [
        [o.cell.method, o.cell.batch, runs[0].settings.lr, i == o.best, *_val(runs)]
        for o in outcomes
        for i, runs in enumerate(o.tuned)
    ]


def _val(results: Sequence[Result]) -> list[float]:
    accuracies = [r.accuracy for r in results]
    return [statistics.mean(accuracies), spread(accuracies)]


def draw(outcomes: Sequence[Outcome], plan: Plan, images: int, out: Path) -> list[str]:
    """The pictures that there are runs for; their names."""
    heading = title(plan, images)
    grouped = by_method(outcomes, plan)
    names = ["accuracy_by_batch.png", "accuracy_by_lr.png"]
    with pictures.figure(out / names[0], heading) as (axes,):
        for number, (method, cells) in enumerate(grouped.items()):
            if cells:
                x, seeds = [o.cell.batch for o in cells], [o.accuracies for o in cells]
                pictures.line(axes, x, seeds, METHODS[method].label, number)
        pictures.batch_axis(axes, plan.batches)
        axes.set(ylabel="test accuracy, %", title="Accuracy against batch size")
        axes.legend(frameon=False, fontsize=8, title="mean, band: range of the seeds")
    tuned = f"{counted(plan.tuning_seeds, 'tuning run')} a point"
    with pictures.figure(
        out / names[1], f"{heading}, {tuned} (ring: the rate chosen)", len(plan.batches), width=4.2
    ) as panels:
        for axes, batch in zip(panels, plan.batches, strict=True):
            _by_lr(axes, [o for o in outcomes if o.cell.batch == batch], plan, batch)
        panels[0].set_ylabel("validation accuracy, %")
        pictures.legend_below(panels)
    if any(len(o.longer) > 1 for o in outcomes):
        names.append("accuracy_by_epochs.png")
        with pictures.figure(out / names[-1], heading) as (axes,):
            for number, cells in enumerate(grouped.values()):
                for o in cells:
                    if o.longer:
                        seeds = [[r.accuracy for r in results] for results in o.longer.values()]
                        label = METHODS[o.cell.method].label
                        pictures.line(axes, list(o.longer), seeds, label, number)
            shown = f"Batch {plan.batches[-1]:,}: accuracy against length"
            axes.set(xlabel="epochs", ylabel="test accuracy, %", title=shown)
            axes.legend(frameon=False, fontsize=8, title="mean, band: range of the seeds")
    names += _gap(grouped, plan, heading, out)
    return names


def _by_lr(axes: object, outcomes: Sequence[Outcome], plan: Plan, batch: int) -> None:
    """Figure 3: validation accuracy over the grid of each method, the choice ringed."""
    for o in outcomes:
        number = plan.methods.index(o.cell.method)
        x = [results[0].settings.lr for results in o.tuned]
        seeds = [[r.accuracy for r in results] for results in o.tuned]
        pictures.line(axes, x, seeds, METHODS[o.cell.method].label, number)
        best = statistics.mean(seeds[o.best])
        axes.plot(x[o.best], best, "o", ms=11, mfc="none", mec="0.2")  # type: ignore[attr-defined]
    axes.set(xscale="log", xlabel="learning rate", title=f"batch {batch:,}")  # type: ignore[attr-defined]


def _gap(grouped: dict[str, list[Outcome]], plan: Plan, heading: str, out: Path) -> list[str]:
    """Figure 1: training and test loss at the smallest and the largest batch."""
    ends = (plan.batches[0], plan.batches[-1])
    shown = {m: [o for o in cells if o.cell.batch in ends] for m, cells in grouped.items() if cells}
    if not shown:
        return []
    with pictures.figure(out / "loss_gap.png", heading, len(shown), width=4.6) as panels:
        for axes, (method, cells) in zip(panels, shown.items(), strict=True):
            for number, o in enumerate(cells):
                for name, style in (("train_loss", "-"), ("test_loss", "--")):
                    epochs, means = _curve(o.final, name)
                    which = "training" if name == "train_loss" else "test"
                    axes.plot(
                        epochs,
                        means,
                        style,
                        color=pictures.COLOURS[number],
                        label=f"batch {o.cell.batch:,}, {which}",
                    )
            axes.set(xlabel="epochs", yscale="log", title=METHODS[method].label)
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("loss (log scale)")
    return ["loss_gap.png"]


def _curve(results: Sequence[Result], name: str) -> tuple[list[float], list[float]]:
    """A loss against epochs: the mean of the seeds, as far as all of them came."""
    columns = zip(*(r.history.evaluations for r in results), strict=False)
    share = results[0].epochs_per_step
    points = [
        (column[0]["step"] * share, statistics.mean(e[name] for e in column)) for column in columns
    ]
    return [x for x, _ in points], [y for _, y in points]


def report(out: Path) -> str:
    """Makes every table and picture from the finished cells; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    images = images_of(plan)
    outcomes = finished(plan, images, out)
    cells = len(plan.cells())
    if not outcomes:
        return f"no cell of {cells} is finished in {out}"
    header = ["method", "batch", "steps", "lr", "at_edge", "seed", "test_accuracy"]
    header += ["train_loss", "test_loss", "diverged"]
    rows = [
        [o.cell.method, o.cell.batch, r.steps, o.lr, o.at_edge, r.settings.seed, r.accuracy]
        + [r.history.evaluations[-1][n] for n in ("train_loss", "test_loss")]
        + [r.history.diverged]
        for o in outcomes
        for r in o.final
    ]
    files.write_csv(out / "accuracy_by_batch.csv", header, rows)
    files.write_csv(
        out / "accuracy_by_lr.csv",
        ["method", "batch", "lr", "chosen", "validation_accuracy", "deviation"],
        lr_rows(outcomes),
    )
    longer = [
        [o.cell.method, o.cell.batch, epochs, r.settings.seed, r.accuracy]
        for o in outcomes
        for epochs, results in o.longer.items()
        for r in results
    ]
    files.write_csv(
        out / "accuracy_by_epochs.csv",
        ["method", "batch", "epochs", "seed", "test_accuracy"],
        longer,
    )
    names = draw(outcomes, plan, images, out)
    seconds = sum(r.seconds for o in outcomes for r in _all(o))
    summary = {
        **held,
        "training_images": images,
        "cells": cells,
        "finished_cells": len(outcomes),
        "training_seconds": seconds,
        "cells_finished": [_summary(o) for o in outcomes],
    }
    files.write_json(out / "summary.json", summary)
    parts = [title(plan, images), "", accuracy_table(outcomes, plan)]
    if any(o.at_edge for o in outcomes):
        parts.append("* the best rate is the first or last of its grid: a wider one may do better")
    if text := epochs_table(outcomes, plan):
        parts += ["", f"Batch {plan.batches[-1]:,}, trained for longer:", text]
    if len(outcomes) < cells:
        parts.append(f"\n{len(outcomes)} of {cells} cells are finished")
    files_ = ", ".join([*names, "accuracy_by_*.csv", "summary.json"])
    parts.append(f"\n{seconds:.0f} s of training. In {out}: {files_}")
    return "\n".join(parts)


def _all(outcome: Outcome) -> list[Result]:
    lists = [*outcome.tuned, outcome.final, *outcome.longer.values()]
    return [result for results in lists for result in results]


def _summary(o: Outcome) -> dict[str, object]:
    return {
        "method": o.cell.method,
        "batch": o.cell.batch,
        "lr": o.lr,
        "at_edge": o.at_edge,
        "accuracies": o.accuracies,
        "mean": statistics.mean(o.accuracies),
        "deviation": spread(o.accuracies),
        "settings": replace(o.final[0].settings, seed=0).as_dict(),
    }
