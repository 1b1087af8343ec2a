"""Tables of a study of learning rules, with the published numbers beside."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars_fused.study import files
from lars_fused.study.data import load
from lars_fused.study.experiments import coursework, rules_pictures
from lars_fused.study.experiments.coursework import Published
from lars_fused.study.experiments.rules import (
    Outcome,
    Plan,
    best,
    described,
    keeps_weights,
    moved,
    outcome,
    outcomes,
)
from lars_fused.study.plans import load as load_plan
from lars_fused.study.tables import counted, data_name, mean_spread, table

SHOWN = 6
"""Points of a grid in the terminal; the CSV has all."""


@dataclass(frozen=True)
class Found:
    """What is finished of a study."""

    plan: Plan
    rules: dict[str, list[Outcome]]
    networks: dict[str, Outcome]


def found_in(plan: Plan, out: Path) -> Found:
    """The finished points."""
    rules = {rule: outcomes(plan.grid(rule), plan.seeds, out) for rule in plan.rules}
    trained = {n: outcome(plan.network(n), plan.network_seeds, out) for n in plan.networks}
    return Found(
        plan,
        {rule: found for rule, found in rules.items() if found},
        {name: o for name, o in trained.items() if o is not None},
    )


def title(plan: Plan) -> str:
    """One line over every picture."""
    base = plan.base
    data = load(base.data, base.resolution, base.train_images)
    width = f", width {base.width:g}" if base.width != 1 else ""  # of several networks
    return (
        f"{data_name(base)}, {len(data.train) - base.validation:,} training and "
        f"{base.validation:,} validation images, batch {base.batch}, {base.epochs:g} epochs{width}"
    )


def _epochs(o: Outcome) -> str:
    every = sorted(p.epoch for p in o.peaks)
    low, high = f"{every[0]:.3g}", f"{every[-1]:.3g}"
    return low if low == high else f"{low} to {high}"


HEADER = [
    "best validation, %",
    "at epoch",
    "after 1 epoch, %",
    "best - last",
    "training - validation",
    "test, %",
]


def cells(o: Outcome) -> list[str]:
    """A point's figures, in the order of `HEADER`."""
    return [
        mean_spread(o.validation),
        _epochs(o),
        mean_spread(o.first),
        f"{statistics.mean(p.fallen for p in o.peaks):.2f}",
        f"{statistics.mean(p.gap for p in o.peaks):.2f}",
        mean_spread(o.test),
    ]


def rule_table(found: Found) -> str:
    """The best points of every rule."""
    lines = []
    for rule, points in found.rules.items():
        for o in sorted(points, key=lambda o: -o.mean)[:SHOWN]:
            lines.append([rule, described(o.settings), *cells(o)])
    return table(["rule", "at", *HEADER], lines)


def number(value: float | None) -> str:
    """A published number, if there is one."""
    return "" if value is None else f"{value:g}"


def published_rules(found: Found) -> str:
    """Every rule at its best, the coursework's beside."""
    lines = []
    for rule, points in found.rules.items():
        o, theirs = best(points), coursework.RULES[rule]
        lines.append(
            [rule, described(o.settings), str(len(points)), mean_spread(o.validation), _epochs(o),
             number(theirs.validation), theirs.epoch, theirs.remark]
        )  # fmt: skip
    header = ["rule", "best at", "of", "validation, %", "at epoch"]
    return table([*header, "published, %", "at epoch", "remark"], lines)


def network_table(found: Found) -> str:
    """Batch normalisation and convolutions."""
    lines = []
    for name, o in found.networks.items():
        count = o.peaks[0].result.parameters
        lines.append([name, f"{count:,}", *cells(o)])
    return table(["network", "parameters", *HEADER], lines)


def test_table(found: Found) -> tuple[str, list[dict[str, Any]]]:
    """Section 6: of each network the run with the best validation accuracy, on the test set."""
    lines, kept = [], []
    for name, o in found.networks.items():
        p = max(o.peaks, key=lambda p: p.at["test_accuracy"])
        theirs = coursework.NETWORKS.get(name, Published())
        at = p.at
        lines.append(
            [name, str(p.result.settings.seed), f"{p.epoch:.3g}", f"{at['test_accuracy']:.2f}",
             f"{at['test_loss']:.3f}", f"{at['unseen_accuracy']:.2f}", f"{at['unseen_loss']:.3f}",
             theirs.epoch, number(theirs.validation), number(theirs.validation_loss),
             number(theirs.test), number(theirs.test_loss)]
        )  # fmt: skip
        kept.append({"network": name, "seed": p.result.settings.seed, "epoch": p.epoch, **at})
    header = ["network", "seed", "epoch", "validation, %", "loss", "test, %", "loss"]
    header += ["published: epoch", "validation, %", "loss", "test, %", "loss"]
    return table(header, lines), kept


def movement(found: Found, out: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """How far the parameters of batch normalisation moved, by network: mean over seeds."""
    base = found.plan.base
    data = load(base.data, base.resolution, base.train_images)
    lines, kept = [], {}
    for name, o in found.networks.items():
        if not keeps_weights(o.settings):
            continue
        every = [moved(p.result, out, data) for p in o.peaks]
        means = {n: statistics.mean(one[n] for one in every) for n in every[0]}
        kept[name] = means
        lines.append([name, *(f"{value:.3f}" for value in means.values())])
    if not lines:
        return "", {}
    names = next(iter(kept.values()))
    return table(["network", *names], lines), kept


def _rows(found: Found) -> list[list[Any]]:
    every = [*(o for points in found.rules.values() for o in points), *found.networks.values()]
    return [
        [s.optimizer, s.network, s.lr, s.beta1, s.beta2, s.momentum, s.weight_decay,
         p.result.settings.seed, p.epoch, p.at["test_accuracy"], p.last["test_accuracy"],
         p.last["train_accuracy"], p.at["unseen_accuracy"], p.result.history.diverged]
        for o in every
        for s in (o.settings,)
        for p in o.peaks
    ]  # fmt: skip


def _by_epoch(found: Found) -> list[list[Any]]:
    every = [*(o for points in found.rules.values() for o in points), *found.networks.values()]
    return [
        [o.settings.optimizer, o.settings.network, described(o.settings), p.result.settings.seed,
         e["step"] * p.result.epochs_per_step, e["train_loss"], e["train_accuracy"],
         e["test_loss"], e["test_accuracy"]]
        for o in every
        for p in o.peaks
        for e in p.result.history.evaluations
    ]  # fmt: skip


def report(out: Path) -> str:
    """Makes every table and picture from the finished runs; returns the text for the terminal."""
    held = load_plan(out)
    plan = Plan.from_dict(held["plan"])
    found = found_in(plan, out)
    if not found.rules and not found.networks:
        return f"no point is finished in {out}"
    header = ["rule", "network", "lr", "beta1", "beta2", "momentum", "weight_decay", "seed"]
    header += ["best_epoch", "best_validation", "last_validation", "last_training"]
    files.write_csv(out / "points.csv", [*header, "test_at_best", "diverged"], _rows(found))
    header = ["rule", "network", "point", "seed", "epoch", "training_loss", "training_accuracy"]
    header += ["validation_loss", "validation_accuracy"]
    files.write_csv(out / "by_epoch.csv", header, _by_epoch(found))
    heading = title(plan)
    names = rules_pictures.draw(found.plan, found.rules, found.networks, heading, out)
    summary: dict[str, Any] = {**held, "rules": {}, "networks": {}}
    parts = [heading]
    if found.rules:
        parts += ["", f"The {SHOWN} best points of each grid, {counted(plan.seeds, 'seed')}:"]
        parts += [rule_table(found), "", published_rules(found)]
        summary["rules"] = {rule: _summary(best(o)) for rule, o in found.rules.items()}
    if found.networks:
        lr, beta1, beta2 = coursework.CHOSEN
        parts += ["", f"Networks, Adam with lr {lr:g}, β1 {beta1:g}, β2 {beta2:g}:"]
        parts.append(network_table(found))
        text, moves = movement(found, out)
        if text:
            parts += ["", "Batch normalisation moved by |w - w0|/|w0| (|w| where w0 = 0):", text]
        tested, rows = test_table(found)
        parts += ["", "The run with the best validation accuracy (section 6):", tested]
        parts.append(f"Section 6 on the fully connected one: {coursework.NETWORKS['mlp'].remark}.")
        summary["networks"] = {name: _summary(o) for name, o in found.networks.items()}
        summary |= {"batch_norm_moved": moves, "tested": rows}
    files.write_json(out / "summary.json", summary)
    listed = ", ".join([*names, "points.csv", "by_epoch.csv", "summary.json"])
    seconds = sum(
        p.result.seconds
        for o in (*(o for points in found.rules.values() for o in points), *found.networks.values())
        for p in o.peaks
    )
    parts.append(f"\n{seconds:.0f} s of training. In {out}: {listed}")
    return "\n".join(parts)


def _summary(o: Outcome) -> dict[str, Any]:
    return {
        "at": described(o.settings),
        "parameters": o.peaks[0].result.parameters,
        "validation": o.validation,
        "epochs": [p.epoch for p in o.peaks],
        "first_epoch": o.first,
        "fallen": statistics.mean(p.fallen for p in o.peaks),
        "gap": statistics.mean(p.gap for p in o.peaks),
        "test": o.test,
        "settings": o.settings.as_dict(),
    }
