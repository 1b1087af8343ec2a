"""Tables and pictures of a study of layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lars_fused.study import files, pictures, runs
from lars_fused.study.experiments.layers import Bound, FirstStep, Plan, bounds, first_step, spread
from lars_fused.study.experiments.paper import TABLE_2, TABLE_2_REMARK, TABLE_2_SPREAD
from lars_fused.study.plans import load as load_plan
from lars_fused.study.runs import Result
from lars_fused.study.tables import data_name, network_name, table

PAPER = {layer.name: layer for layer in TABLE_2}


def paper_name(name: str) -> str:
    """conv1.weight as the paper calls it, conv1.w."""
    return name.replace(".weight", ".w").replace(".bias", ".b")


def number(value: float | None) -> str:
    """Four digits; a question mark for what is illegible in the paper."""
    return "?" if value is None else f"{value:.4g}" if math.isfinite(value) else "-"


def table_2(rows: list[FirstStep], beside: bool) -> str:
    """Norms at the first step, with the paper's AlexNet beside them."""
    header = ["tensor", "N(w)", "N(g)", "N(w)/N(g)", "trust ratio"]
    header += ["paper: N(w)", "N(g)", "ratio"] if beside else []
    lines = []
    for row in rows:
        cells = [row.name, number(row.weight), number(row.gradient), number(row.ratio)]
        cells.append("" if row.trust_ratio is None else number(row.trust_ratio))
        if beside:
            theirs = PAPER.get(paper_name(row.name))
            known = (theirs.weight, theirs.gradient, theirs.ratio) if theirs else ()
            cells += [number(value) for value in known] or ["", "", ""]
        lines.append(cells)
    return table(header, lines)


def spread_sentence(rows: list[FirstStep]) -> str:
    """The finding of Table 2, whichever way it came out here."""
    low, high = spread(rows)
    ours = high.ratio / low.ratio
    least, most = TABLE_2_SPREAD
    adapted = [row for row in rows if row.trust_ratio not in (None, 1.0)]
    weights = ""
    if adapted and len(adapted) < len(rows):
        slow, fast = spread(adapted)
        weights = f"; the tensors that LARS adapts: a factor of {fast.ratio / slow.ratio:.0f}"
    return (
        f"N(w)/N(g) spans a factor of {ours:.0f}: from {low.ratio:.3g} ({low.name}) to "
        f"{high.ratio:.3g} ({high.name}){weights}. The paper's AlexNet: a factor of "
        f"{most / least:.0f}, from {least:g} to {most:g}."
    )


def bound_table(found: list[Bound]) -> str:
    """Equation 7 by tensor."""
    header = [
        "tensor",
        "N(w0)",
        "largest N(w)/N(w0)",
        "share of the bound",
        "held",
        "with momentum",
    ]
    rows = [
        [b.name, f"{b.start:.4g}", f"{b.grown:.3f}", f"{b.used:.3f}", "yes" if b.held else "no",
         f"{b.with_momentum:.3f}"]
        for b in found
    ]  # fmt: skip
    return table(header, rows)


def label(result: Result) -> str:
    """A run in two words."""
    return f"{result.settings.optimizer.upper()}, batch {result.settings.batch:,}"


def _layers_shown(result: Result) -> list[int]:
    """The weights: tensors whose ratio LARS sets, in the model's order."""
    seen = result.history.layers
    return [
        i
        for i in range(len(result.history.layer_names))
        if any(s["trust_ratio"][i] != 1.0 for s in seen)
    ]


def figure_2(lars: list[Result], every: list[Result], heading: str, out: Path) -> list[str]:
    """Figure 2: local lr and N(w) by layer over training; accuracy with and without LARS."""
    names = []
    for result in lars:
        name = f"layers_b{result.settings.batch}.png"
        share = result.epochs_per_step
        x = [(seen["step"] - 1) * share for seen in result.history.layers]
        title = f"{heading}, {label(result)}"
        with pictures.figure(out / name, title, 2, width=6.2) as (left, right):
            shown = _layers_shown(result)
            for place, i in enumerate(shown):
                colour = place / max(1, len(shown) - 1)
                style: dict[str, Any] = {"label": result.history.layer_names[i]}
                style |= {"color": pictures.shade(colour), "linewidth": 1.3}
                left.plot(x, [seen["trust_ratio"][i] for seen in result.history.layers], **style)
                right.plot(x, [seen["weight"][i] for seen in result.history.layers], **style)
            left.set(xlabel="epochs", yscale="log", title="Local learning rate q by layer")
            left.set_ylabel("q = η N(w) / (N(g) + β N(w)), log scale")
            right.set(xlabel="epochs", yscale="log", title="Weight norm N(w) by layer")
            if len(shown) <= 24:
                right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        names.append(name)
    with pictures.figure(out / "accuracy.png", f"{heading}: with and without LARS") as (axes,):
        for place, result in enumerate(every):
            evaluations = result.history.evaluations
            steps = [e["step"] * result.epochs_per_step for e in evaluations]
            accuracies = [[e["test_accuracy"]] for e in evaluations]
            pictures.line(axes, steps, accuracies, label(result), place)
        axes.set(xlabel="epochs", ylabel="test accuracy, %", title="One seed each, rates not tuned")
        axes.legend(frameon=False, fontsize=8)
    return [*names, "accuracy.png"]


def report(out: Path) -> str:
    """Makes every table and picture from the finished runs; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    found = [result for s in plan.runs() if (result := runs.find(out, s)) is not None]
    lars = [result for result in found if result.settings.optimizer == "lars"]
    if not lars:
        return f"no run with LARS is finished in {out}"
    base = plan.base
    heading = f"{data_name(base)}, {network_name(base)}"
    beside = base.network in ("alexnet", "alexnet-bn")
    rows = first_step(lars[0])
    parts = [f"{heading}: the first step at batch {lars[0].settings.batch:,} (Table 2)"]
    parts += [table_2(rows, beside), spread_sentence(rows)]
    if beside:
        parts.append(f"Paper: AlexNet on ImageNet; ? is illegible in the source; {TABLE_2_REMARK}.")
    summary: dict[str, Any] = {**held, "first_step": [], "bounds": [], "accuracy": {}}
    first_rows, bound_rows = [], []
    for result in lars:
        batch, step = result.settings.batch, first_step(result)
        first_rows += [[batch, r.name, r.weight, r.gradient, r.ratio, r.trust_ratio] for r in step]
        low, high = spread(step)
        summary["first_step"].append(
            {"batch": batch, "lowest": [low.name, low.ratio], "highest": [high.name, high.ratio]}
        )
        checked = bounds(result)
        broken = sum(not b.held for b in checked)
        bound_rows += [[batch, b.name, b.start, b.grown, b.used, b.held] for b in checked]
        summary["bounds"].append({"batch": batch, "tensors": len(checked), "broken": broken})
        parts += ["", f"{label(result)}: the bound of equation 7 on N(w), over the whole run:"]
        parts += [bound_table(checked), f"It held for {len(checked) - broken} of {len(checked)}."]
    header = ["batch", "tensor", "weight_norm", "gradient_norm", "ratio", "trust_ratio"]
    files.write_csv(out / "first_step.csv", header, first_rows)
    header = ["batch", "tensor", "start_norm", "largest_growth", "share_of_bound", "held"]
    files.write_csv(out / "bounds.csv", header, bound_rows)
    files.write_csv(out / "norms.csv", *_norms(lars))
    names = figure_2(lars, found, heading, out)
    parts += [
        "",
        table(["run", "test accuracy, %"], [[label(r), f"{r.accuracy:.2f}"] for r in found]),
    ]
    summary["accuracy"] = {label(r): r.accuracy for r in found}
    files.write_json(out / "summary.json", summary)
    listed = ", ".join([*names, "first_step.csv", "bounds.csv", "norms.csv", "summary.json"])
    parts.append(f"\nIn {out}: {listed}")
    return "\n".join(parts)


def _norms(results: list[Result]) -> tuple[list[str], list[list[Any]]]:
    header = ["batch", "step", "lr", "tensor", "weight_norm", "gradient_norm", "trust_ratio"]
    rows = [
        [r.settings.batch, seen["step"], seen["lr"], name, *values]
        for r in results
        for seen in r.history.layers
        for name, *values in zip(
            r.history.layer_names,
            seen["weight"],
            seen["gradient"],
            seen["trust_ratio"],
            strict=True,
        )
    ]
    return header, rows
