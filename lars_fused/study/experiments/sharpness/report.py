"""Tables and pictures of a study of sharpness."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lars_fused.study import files
from lars_fused.study.experiments.sharpness import draw, work
from lars_fused.study.experiments.sharpness.functions import FUNCTIONS, Measured, table_1
from lars_fused.study.experiments.sharpness.plan import MATRICES, Plan
from lars_fused.study.experiments.sharpness.surface import Point
from lars_fused.study.experiments.sharpness.work import Measurement
from lars_fused.study.plans import load as load_plan
from lars_fused.study.tables import counted, data_name, mean_spread, network_name, table

FIRST_DRAW = 1
"""Seed of the first A of Table 1; the others follow."""


def heading(plan: Plan, seeds: str = "") -> str:
    """The study in one line; `seeds` in place of how many there are."""
    base = plan.base
    images = f", {base.train_images:,} images" if base.train_images else ""
    return (
        f"{data_name(base)}{images}, {network_name(base)}, {base.epochs:g} epochs, "
        f"{seeds or counted(plan.seeds, 'seed')}"
    )


def functions_table(measured: list[Measured]) -> str:
    """Table 1, the printed value beside what was measured."""
    rows = []
    for m in measured:
        _, dimensions, formula = FUNCTIONS[m.row.figure]
        low, high = (f"{v:.1e}" for v in (min(m.values), max(m.values)))
        spread = [low, high, f"{100 * m.below:.0f}"] if m.row.random else ["", "", ""]
        kind = MATRICES[m.row.random]
        rows.append([f"{dimensions}D {formula}", kind, f"{m.row.epsilon:g}", m.row.printed, m.text])
        rows[-1] += [*spread, "yes" if m.agrees else "NO"]
    header = ["function", "A", "epsilon", "printed", "measured (median)", "least", "greatest"]
    return table([*header, "draws below the printed, %", "agrees"], rows)


def networks_table(found: list[Measurement], plan: Plan) -> str:
    """Figure 7 as numbers: mean ± deviation between seeds."""
    rows = []
    for name in plan.rates:
        for batch in plan.batches:
            group = draw.of(found, name, batch)
            if not group:
                continue
            cells = [
                mean_spread([m.sharpness[b.matrix, b.epsilon].value for m in group])
                for b in plan.boxes()
            ]
            losses = [m.result.history.evaluations[-1]["train_loss"] for m in group]
            accuracy = mean_spread([m.result.accuracy for m in group])
            settings = group[0].result.settings
            rows.append([name, f"{batch:,}", str(group[0].result.steps)])
            rows[-1] += [f"{settings.peak_lr:.4g}", accuracy, f"{statistics.mean(losses):.4f}"]
            rows[-1] += cells
    boxes = [f"{b.matrix}, {b.epsilon:g}" for b in plan.boxes()]
    header = ["optimizer", "batch", "steps", "lr", "test accuracy, %", "training loss"]
    return table([*header, *boxes], rows)


def sentences(found: list[Measurement], plan: Plan) -> list[str]:
    """Whether accuracy falls and sharpness rises from the smallest batch to the largest."""
    said = []
    for name in plan.rates:
        small, large = (draw.of(found, name, b) for b in (plan.batches[0], plan.batches[-1]))
        if not small or not large:
            continue
        accuracies = [statistics.mean(m.result.accuracy for m in g) for g in (small, large)]
        words = []
        for box in plan.boxes():
            values = [
                statistics.mean(m.sharpness[box.matrix, box.epsilon].value for m in g)
                for g in (small, large)
            ]
            sharper = "sharper" if values[1] > values[0] else "NOT sharper"
            words.append(
                f"{sharper} with A {box.matrix}, epsilon {box.epsilon:g} "
                f"({values[0]:.3g} to {values[1]:.3g})"
            )
        change = accuracies[1] - accuracies[0]
        said.append(
            f"{name}, batch {plan.batches[0]:,} to {plan.batches[-1]:,}: test accuracy "
            f"{change:+.2f} points; {', '.join(words)}."
        )
    return said


def _files(found: list[Measurement], out: Path) -> None:
    rows, epochs = [], []
    for m in found:
        s = m.result.settings
        head = [s.optimizer, s.batch, s.seed]
        rows += [
            [
                *(*head, m.result.steps, s.peak_lr, m.result.accuracy, matrix, epsilon),
                *(value.value, value.at, value.largest, value.evaluations),
            ]
            for (matrix, epsilon), value in m.sharpness.items()
        ]
        epochs += [
            [*head, e["step"] * m.result.epochs_per_step, e["train_accuracy"], e["test_accuracy"]]
            for e in m.result.history.evaluations
        ]
    header = ["optimizer", "batch", "seed", "steps", "lr", "test_accuracy", "matrix", "epsilon"]
    header += ["sharpness", "loss", "largest_loss", "evaluations"]
    files.write_csv(out / "sharpness.csv", header, rows)
    header = ["optimizer", "batch", "seed", "epoch", "train_accuracy", "test_accuracy"]
    files.write_csv(out / "accuracy_by_epoch.csv", header, epochs)


def _path_files(walked: dict[tuple[str, str], list[Point]], out: Path) -> None:
    rows = [[*key, *asdict(p).values()] for key, points in walked.items() for p in points]
    header = ["optimizer", "path", "alpha", "train_loss", "train_accuracy", "test_loss"]
    files.write_csv(out / "paths.csv", [*header, "test_accuracy"], rows)


def _analytic(plan: Plan, out: Path, parts: list[str], summary: dict[str, Any]) -> None:
    measured = table_1(plan.draws, FIRST_DRAW)
    rows = [
        [m.row.figure, MATRICES[m.row.random], m.row.epsilon, m.row.printed, number, value]
        for m in measured
        for number, value in enumerate(m.values)
    ]
    header = ["figure", "matrix", "epsilon", "printed", "draw", "sharpness"]
    files.write_csv(out / "functions.csv", header, rows)
    exact = [m for m in measured if not m.row.random]
    within = [m for m in measured if m.row.random]
    parts += [
        f"Table 1: sharpness at the minimum of four functions, {plan.draws} draws of a random A",
        functions_table(measured),
        f"Identity: {sum(m.agrees for m in exact)} of {len(exact)} rows have the printed digits. "
        f"Random: in {sum(m.agrees for m in within)} of {len(within)} rows the printed value, of "
        "one draw, lies among those of the draws here.",
    ]
    summary["functions"] = [
        asdict(m.row) | {"median": statistics.median(m.values), "agrees": m.agrees}
        for m in measured
    ]


def report(out: Path) -> str:
    """Makes every table and picture from what is finished; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    summary: dict[str, Any] = dict(held)
    parts: list[str] = []
    _analytic(plan, out, parts, summary)
    draw.functions(out / "functions.png")
    names = ["functions.png", "functions.csv"]
    found, walked = work.finished(plan, out), work.paths(plan, out)
    title = heading(plan)
    if found:
        _files(found, out)
        draw.by_batch(found, plan, title, out / "sharpness_by_batch.png")
        draw.by_epoch(found, plan, title, out / "accuracy_by_epoch.png")
        parts += ["", f"{title}: sharpness by A and epsilon", networks_table(found, plan)]
        summary["sentences"] = sentences(found, plan)
        parts += summary["sentences"]
        names += ["sharpness_by_batch.png", "accuracy_by_epoch.png"]
        names += ["sharpness.csv", "accuracy_by_epoch.csv"]
    if walked:
        _path_files(walked, out)
        draw.paths(walked, plan, heading(plan, "seed 0"), out / "paths.png")
        names += ["paths.png", "paths.csv"]
    count = len(plan.rates) * len(plan.batches) * plan.seeds
    if len(found) < count:
        parts.append(f"\n{len(found)} of {count} runs are finished and measured")
    files.write_json(out / "summary.json", summary)
    parts.append(f"\nIn {out}: {', '.join([*names, 'summary.json'])}")
    return "\n".join(parts)
