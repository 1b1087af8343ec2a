"""Tables and pictures of a noise study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lars_fused.study import files, pictures
from lars_fused.study.data import load
from lars_fused.study.experiments import noise_wells_report
from lars_fused.study.experiments.noise import Best, Curve, Fit, Plan, best, fit, noise_scale
from lars_fused.study.experiments.noise_parts import Point, curve, gradient_noise, measured_run
from lars_fused.study.plans import load as load_plan
from lars_fused.study.tables import counted, data_name, mean_spread, network_name, table

Row = tuple[Curve, Best]


def images_of(plan: Plan) -> int:
    """N of the base."""
    base = plan.base
    return len(load(base.data, base.resolution, base.train_images).train)


def title(plan: Plan, images: int) -> str:
    """One line over every picture."""
    base = plan.base
    momentum = f", momentum {base.momentum:g}" if base.momentum else ""
    return (
        f"{data_name(base)}, {images:,} training images, {network_name(base)}, "
        f"SGD{momentum}, {plan.steps:,} steps, {counted(plan.seeds, 'seed')}"
    )


def accuracy_table(rows: Sequence[Row], plan: Plan, images: int) -> str:
    """Accuracy against batch size, a column for each batch: Figures 10a and 11a."""
    lines = []
    for c, _ in rows:
        by_batch = dict(zip(c.batches, c.accuracies, strict=True))
        means = {b: f"{statistics.mean(seeds):.2f}" for b, seeds in by_batch.items()}
        lines.append([f"{c.lr:g}", f"{c.size:,}", *(means.get(b, "") for b in plan.batches)])
    return table(["lr", "images", *(f"B {b:,}" for b in plan.batches)], lines)


def best_table(rows: Sequence[Row], plan: Plan) -> str:
    """The best batch size of every curve, with g there: Figures 10b and 11b."""
    lines = []
    for c, found in rows:
        top = max(range(len(c.batches)), key=lambda i: statistics.mean(c.accuracies[i]))
        g = noise_scale(c.lr, c.size, c.batches[top], plan.base.momentum)
        lines.append(
            [
                f"{c.lr:g}",
                f"{c.size:,}",
                f"{found.batch:.0f}{'*' if found.at_edge else ''}",
                f"{found.low:.0f} to {found.high:.0f}",
                f"{found.enough:,}",
                mean_spread(c.accuracies[top]),
                f"{g:.3g}",
            ]
        )
    header = ["lr", "images", "best batch", "16 to 84 %", "as good from", "accuracy there, %"]
    return table([*header, "g = lr (N/B - 1)"], lines)


def fitted(rows: Sequence[Row], name: str) -> Fit | None:
    """The line through the best batch sizes that are no edges, against `lr` or `size`."""
    inner = [(getattr(c, name), b.batch) for c, b in rows if not b.at_edge]
    return fit([x for x, _ in inner], [y for _, y in inner])


def fit_sentence(found: Fit | None, name: str) -> str:
    """What the fit says, in one line."""
    if found is None:
        return f"No curve has its maximum inside the range of batch sizes: no line against {name}."
    plural = "s" if found.points > 1 else ""
    line = f"Best batch = {found.factor:.3g} x {name} through {found.points} point{plural}"
    if math.isnan(found.exponent):
        return f"{line}: too few to fit the exponent."
    error = "" if math.isnan(found.error) else f" ± {found.error:.2f}"
    return f"{line}; with a free exponent, {name}^({found.exponent:.2f}{error}). Linear is 1."


def noise_table(points: Sequence[Point], plan: Plan, images: int) -> str:
    """The measured gradient noise beside its exact value."""
    batch = measured_run(plan, images).batch
    lines = []
    for p in points:
        cells = [f"{p.step}", f"{p.step * batch / images:.1f}"]
        for name in ("trace", "square", "value"):
            error = getattr(p.estimated, f"{name}_error")
            cells.append(f"{getattr(p.exact, name):.4g}")
            cells.append(f"{getattr(p.estimated, name):.4g} ± {error:.2g}")
        lines.append([*cells, f"{p.deviations['value']:+.1f}"])
    header = ["step", "epoch", "tr(S)", "NoiseScale", "|G|^2", "NoiseScale", "tr(S)/|G|^2"]
    return table([*header, "NoiseScale", "off by, s.e."], lines)


def _sweep(
    out: Path, name: str, rows: Sequence[Row], plan: Plan, heading: str, found: Fit | None
) -> str:
    """Figure 10 or 11: accuracy against batch size, and the best batch against x."""
    by_lr = name == "lr"
    label = "learning rate" if by_lr else "training images"
    file = f"batch_by_{name}.png"
    with pictures.figure(out / file, heading, 2, width=5.4) as (left, right):
        for number, (c, b) in enumerate(rows):
            what = f"lr {c.lr:g}" if by_lr else f"N = {c.size:,}"
            pictures.line(left, c.batches, c.accuracies, what, number)
            x = getattr(c, name)
            colour = pictures.COLOURS[number % len(pictures.COLOURS)]
            right.plot([x, x], [b.low, b.high], color=colour, linewidth=1.2)
            face = "none" if b.at_edge else colour
            right.plot(x, b.batch, "o", color=colour, markerfacecolor=face)
        pictures.batch_axis(left, plan.batches)
        left.tick_params(axis="x", labelsize=8)
        left.set(ylabel="test accuracy, %", title="Accuracy against batch size")
        left.legend(frameon=False, fontsize=8, title="mean, band: range of the seeds")
        if found is not None:
            ends = [min(getattr(c, name) for c, _ in rows), max(getattr(c, name) for c, _ in rows)]
            line = [found.factor * x for x in ends]
            right.plot(ends, line, "--", color="0.4", label=f"B = {found.factor:.3g} x {label}")
            right.legend(frameon=False, fontsize=8)
        right.set(xscale="log", xlabel=label, ylabel="best batch size")
        right.set_yscale("log", base=2)
        right.set_yticks(list(plan.batches), [f"{b:,}" for b in plan.batches])
        right.set_xticks([getattr(c, name) for c, _ in rows])
        right.set_xticklabels([f"{getattr(c, name):,}" for c, _ in rows])
        right.minorticks_off()
        right.set_title("Best batch (open: at the edge, not fitted)")
    return file


def _gradients(out: Path, points: Sequence[Point], heading: str) -> str:
    with pictures.figure(out / "gradient_noise.png", heading) as (axes,):
        x = [p.step for p in points]
        axes.plot(x, [p.exact.value for p in points], "-", color="0.4", label="every example")
        axes.errorbar(
            x, [p.estimated.value for p in points], [p.estimated.value_error for p in points],
            fmt="o", color=pictures.COLOURS[0], capsize=3, label="NoiseScale, ± standard error",
        )  # fmt: skip
        axes.set(xlabel="steps", ylabel="tr(Σ)/|G|², examples", ylim=(0, None))
        axes.set_title("Gradient noise while SGD trains")
        axes.legend(frameon=False, fontsize=8)
    return "gradient_noise.png"


def report(out: Path) -> str:
    """Makes every table and picture from what is finished; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    images = images_of(plan)
    heading = title(plan, images)
    curves = [curve(plan, lr, size, images, out) for lr, size in plan.curves(images)]
    every = [(c, best(c)) for c in curves if c is not None]
    by_lr = sorted((r for r in every if r[0].size == images), key=lambda r: r[0].lr)
    by_size = sorted((r for r in every if r[0].lr == plan.base.lr), key=lambda r: r[0].size)
    parts, names = [heading], []
    summary: dict[str, Any] = {**held, "training_images": images, "best": [], "fits": {}}
    points = gradient_noise(plan, images, out)
    if points:
        names.append(_gradients(out, points, heading))
        parts += ["", f"Gradient noise over {plan.examples:,} examples:"]
        parts.append(noise_table(points, plan, images))
        summary["gradient_noise"] = [
            {"step": p.step, "exact": asdict(p.exact), "estimated": asdict(p.estimated)}
            for p in points
        ]
    for name, label, rows in (("lr", "lr", by_lr), ("size", "images", by_size)):
        if not rows:
            continue
        found = fitted(rows, name)
        summary["fits"][name] = asdict(found) if found else None
        names.append(_sweep(out, name, rows, plan, heading, found))
        parts += ["", f"Test accuracy, %, by {label}:", accuracy_table(rows, plan, images)]
        parts += ["", best_table(rows, plan), fit_sentence(found, label)]
    if any(b.at_edge for _, b in every):
        parts.append("* the best batch is the first or last of its curve: no maximum, not fitted")
    files.write_csv(
        out / "by_batch.csv",
        ["lr", "images", "batch", "noise_scale", "seed", "test_accuracy"],
        [
            [c.lr, c.size, b, noise_scale(c.lr, c.size, b, plan.base.momentum), seed, accuracy]
            for c, _ in every
            for b, seeds in zip(c.batches, c.accuracies, strict=True)
            for seed, accuracy in enumerate(seeds)
        ],
    )
    summary["best"] = [{"lr": c.lr, "images": c.size, **asdict(b)} for c, b in every]
    text, shown, settled = noise_wells_report.report(plan, out)
    parts += ["", text]
    summary["wells"] = settled
    files.write_json(out / "summary.json", summary)
    listed = ", ".join([*names, *shown, "by_batch.csv", "summary.json"])
    parts.append(f"\nIn {out}: {listed}")
    return "\n".join(parts)
