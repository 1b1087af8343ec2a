"""Tables, pictures and the verdict of a study of mini-batches."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lars_fused.study import files
from lars_fused.study.experiments.minibatch import draw, findings, prune, work
from lars_fused.study.experiments.minibatch.compare import Distances
from lars_fused.study.experiments.minibatch.plan import ARMS, Plan
from lars_fused.study.plans import load as load_plan
from lars_fused.study.runs import Result
from lars_fused.study.tables import data_name, mean_spread, network_name, table


def heading(plan: Plan) -> str:
    """The study in one line."""
    base = plan.base
    images = f", {base.train_images:,} images" if base.train_images else ""
    return (
        f"{data_name(base)}{images}, {network_name(base)}, mini-batches of {base.batch}, "
        f"{base.epochs:g} epochs"
    )


def quarters_table(found: dict[str, Distances]) -> str:
    """Mean relative distance by metric, phase and quarter of the order."""
    rows = []
    for metric, distances in found.items():
        each = zip(
            distances.phases(),
            findings.quarters(distances),
            findings.extremes(distances),
            strict=True,
        )
        for phase, quarters, extremes in each:
            epochs = f"{phase.start + 1}-{phase.stop}"
            cells = [f"{q:.3f}" for q in quarters]
            rows.append([metric, epochs, f"{distances.rates[phase.start]:.3g}", *cells])
            rows[-1].append(f"{extremes:.3f}")
    header = ["metric", "epochs", "lr", "lowest quarter", "second", "third", "upper quartile"]
    return table([*header, "extremes/middle"], rows)


def claims_table(claims: list[findings.Claim]) -> str:
    """What the text says of its figures, and whether it came out so."""
    rows = [
        [c.metric, str(c.phase), c.text, f"{c.ratio:.3f}", f"{100 * c.epochs:.0f}",
         "yes" if c.held else "NO"]
        for c in claims
    ]  # fmt: skip
    header = ["metric", "phase", "the text says", "distance ratio", "epochs with it, %", "agrees"]
    return table(header, rows)


def prune_target(arms: dict[str, list[Result]], plan: Plan) -> float:
    """The accuracy that random mini-batches have reached when the first phase ends, on average."""
    end = plan.base.milestones[0] if plan.base.milestones else 1.0
    reached = []
    for result in arms["random"]:
        early = [e for e in result.history.evaluations if e["step"] <= end * result.steps]
        reached.append((early or result.history.evaluations[:1])[-1]["test_accuracy"])
    return statistics.mean(reached)


def prune_table(arms: dict[str, list[Result]], target: float) -> str:
    """Each arm's accuracies, and its steps to the target."""
    rows = []
    for arm, results in arms.items():
        steps = [prune.steps_to(r, target) for r in results]
        reached = [float(s) for s in steps if s is not None]
        average = [prune.average_accuracy(r) for r in results]
        rows.append(
            [
                ARMS[arm],
                mean_spread([r.accuracy for r in results]),
                mean_spread(average),
                mean_spread(reached, 0),
                f"{len(reached)} of {len(results)}",
            ]
        )
    header = ["trained on", "final test accuracy, %", "mean over the run, %"]
    return table([*header, f"steps to {target:.1f} %", "reached by"], rows)


def _distance_files(found: dict[str, Distances], out: Path) -> None:
    rows, layers = [], []
    for metric, d in found.items():
        total, share = d.total.tolist(), findings.relative(d.total).tolist()
        rows += [
            [metric, e + 1, f"{d.rates[e]:.6g}", k + 1]
            + [f"{value:.6g}" for value in (total[e][k], share[e][k])]
            for e in range(len(total))
            for k in range(len(total[e]))
        ]
        for number, phase in enumerate(d.phases(), 1):
            of_phase = list(phase)
            columns = d.layers[of_phase].mean((0, 1)), d.full[of_phase].mean(0)
            layers += [
                [metric, number, name, *values]
                for name, *values in zip(d.names, *(c.tolist() for c in columns), strict=True)
            ]
    header = ["metric", "epoch", "lr", "mini_batch", "distance", "relative_distance"]
    files.write_csv(out / "distances.csv", header, rows)
    header = ["metric", "phase", "tensor", "mean_distance", "mean_full_gradient_norm"]
    files.write_csv(out / "layers.csv", header, layers)


def _compared(plan: Plan, out: Path, parts: list[str], summary: dict[str, Any]) -> list[str]:
    """What Algorithm 1 found; the names of its files."""
    results = {metric: work.found(plan, metric, out) for metric in plan.metrics}
    known = {m: held for m, held in results.items() if held is not None}
    found = {m: distances for m, (_, distances) in known.items() if distances.rates}
    stopped = [m for m, (result, _) in known.items() if result.history.diverged]
    if stopped:
        parts.append(f"The loss was not finite, and the run ended, in order of {stopped}.")
    if not found:
        return []
    _distance_files(found, out)
    claims = [claim for metric, d in found.items() for claim in findings.claims(metric, d)]
    columns = ["metric", "phase", "text", "ratio", "epochs"]
    rows = [[*asdict(c).values(), c.held] for c in claims]
    files.write_csv(out / "claims.csv", [*columns, "held"], rows)
    names = []
    for metric, distances in found.items():
        for kind, drawn in (("heat", draw.heat_maps), ("layers", draw.layer_maps)):
            names.append(f"{kind}_{metric}.png")
            drawn(distances, metric, heading(plan), out / names[-1])
    parts += [
        "Distance to the full gradient over the epoch's mean, by place in the order:",
        quarters_table(found),
        "",
        claims_table(claims),
        f"The text's reading of its figures holds for {sum(c.held for c in claims)} of "
        f"{len(claims)} statements.",
    ]
    summary["compared"] = {
        m: {
            "rates": d.rates,
            "full_gradient_norm": d.full.square().sum(1).sqrt().tolist(),
            "quarters": findings.quarters(d),
            "extremes_over_middle": findings.extremes(d),
            "accuracy": known[m][0].accuracy,
        }
        for m, d in found.items()
    }
    summary["claims"] = [asdict(c) | {"held": c.held} for c in claims]
    return [*names, "distances.csv", "layers.csv", "claims.csv"]


def _pruned(plan: Plan, out: Path, parts: list[str], summary: dict[str, Any]) -> list[str]:
    """What the pruned runs found; the names of their files."""
    arms = work.arms(plan, out)
    seeds = len(arms["random"])
    if not seeds:
        return []
    target = prune_target(arms, plan)
    rows = [
        [
            *(arm, r.settings.seed, r.steps, r.accuracy, prune.average_accuracy(r)),
            *(prune.steps_to(r, target), r.history.diverged),
        ]
        for arm, results in arms.items()
        for r in results
    ]
    header = ["arm", "seed", "steps", "test_accuracy", "mean_test_accuracy", "steps_to_target"]
    files.write_csv(out / "prune.csv", [*header, "diverged"], rows)
    draw.prune_curves(arms, plan, heading(plan), out / "prune.png")
    parts += ["", f"Recommended mini-batches against random ones, {seeds} seeds, equal steps:"]
    parts.append(prune_table(arms, target))
    verdicts = [prune.verdict(a, arms[a], arms["random"]) for a in ARMS if a != "random"]
    parts += [f"{ARMS[v.arm]}: {v.sentence()}." for v in verdicts]
    summary["prune"] = {
        "seeds": seeds,
        "target": target,
        "verdicts": [asdict(v) | {"sentence": v.sentence()} for v in verdicts],
    }
    return ["prune.png", "prune.csv"]


def report(out: Path) -> str:
    """Makes every table and picture from what is finished; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    summary: dict[str, Any] = dict(held)
    parts = [heading(plan), ""]
    names = _compared(plan, out, parts, summary) + _pruned(plan, out, parts, summary)
    if not names:
        return f"no part of the study in {out} is finished"
    files.write_json(out / "summary.json", summary)
    parts.append(f"\nIn {out}: {', '.join([*names, 'summary.json'])}")
    return "\n".join(parts)
