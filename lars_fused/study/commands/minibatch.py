"""`lars-study minibatch`: which mini-batch's gradient is nearest to that of all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from lars_fused.study import networks, plans, runs
from lars_fused.study.commands import options
from lars_fused.study.data import Data
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch import perceptual, report
from lars_fused.study.experiments.minibatch.cache import GradientCache, megabytes
from lars_fused.study.experiments.minibatch.compare import CACHE
from lars_fused.study.experiments.minibatch.plan import METRICS, Plan
from lars_fused.study.experiments.minibatch.work import Part, Workshop, parts
from lars_fused.study.order import steps_for
from lars_fused.study.settings import Settings


@click.command("minibatch", short_help="mini-batch against full gradient, by what is in the images")
@options.what("mlp", 1.0, 30)
@click.option("--batch", default=64, show_default=True, help="Images of a mini-batch.")
@click.option(
    "--metrics",
    default=",".join(METRICS),
    show_default=True,
    help="Orders of the images: " + "; ".join(f"{k}: {v}" for k, v in METRICS.items()) + ".",
)
@click.option(
    "--features",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The weights.pt of a run of `train`, through whose features perceptual distance is "
    "measured; by default the study trains its own network first.",
)
@click.option("--lr", default=0.1, show_default=True, help="Divided by 10 after each third.")
@click.option("--momentum", default=0.9, show_default=True)
@click.option("--weight-decay", default=5e-4, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the comparisons.")
@click.option(
    "--prune",
    is_flag=True,
    help="Train on the mini-batches that the text recommends, against random ones.",
)
@click.option("--prune-seeds", default=5, show_default=True, type=click.IntRange(2))
@options.only
@options.where("study/minibatch")
def command(
    out: Path, only: tuple[int, int] | None, features: Path | None, prune: bool, **chosen: Any
) -> None:
    """Measure how far each mini-batch's gradient is from that of all images (Lasky et al.).

    The images are put in a fixed order by each of four metrics; at the start of every epoch the
    gradient of every mini-batch is taken at the same weights and cached on disk. Draws heat maps
    of the distances by training phase, and says which of the text's conclusions they bear out;
    with --prune also whether training on the recommended mini-batches is faster.
    """
    data = options.loaded(chosen)
    plan = planned(chosen, prune, perceptual.digest(features) if features else "")
    check(plan, data, out, features)
    plans.save(out, "minibatch", plan.as_dict())
    workshop = Workshop(plan, data, out, features)
    for one in options.share_of(parts(plan), only):
        do(one, workshop)
    options.conclude(out, only, report.report)


def planned(chosen: dict[str, Any], prune: bool, features: str) -> Plan:
    """The plan that the options ask for."""
    if chosen["epochs"] != round(chosen["epochs"]):
        raise StudyError(f"--epochs {chosen['epochs']:g} is not allowed: it must be a whole number")
    others = ("batch", "lr", "momentum", "weight_decay", "seed")
    base = Settings(**options.settings(chosen, *others), optimizer="sgd", decay="step")
    metrics = tuple(chosen["metrics"].split(","))
    return Plan(base, metrics, chosen["prune_seeds"] if prune else 0, features)


def check(plan: Plan, data: Data, out: Path, features: Path | None) -> None:
    """Refuse before the start what would fail in the middle, and state the size of the cache."""
    base = plan.base
    runs.check(base, data)
    built = networks.build(base.network, data.shape, len(data.classes), base.width)
    batches = len(data.train) // base.batch
    if batches < 4:
        raise StudyError(
            f"--batch {base.batch} leaves {batches} mini-batches of {len(data.train):,} images; "
            "quarters of an order need at least 4"
        )
    if plan.needs_features():
        eye = built
        if features is not None:
            eye = perceptual.from_file(features, data, base.network, base.width)
        perceptual.features(eye, data.train.images.take(torch.arange(2)))
    folder = runs.folder_of(out, plan.comparison(plan.metrics[0])) / CACHE
    cache = GradientCache(folder, [p.shape for p in built.parameters()], batches)
    free = cache.check_space()
    click.echo(
        f"Gradient cache: {batches:,} mini-batches of {cache.numbers:,} numbers, "
        f"{megabytes(cache.size)} of {megabytes(free)} free"
    )


def do(one: Part, workshop: Workshop) -> None:
    """A part of the plan, with a line for it when it is done."""
    base = workshop.plan.base
    steps = steps_for(base.epochs, base.batch, len(workshop.data.train))
    with options.bar(steps, one.label) as progress:
        if one.kind == "arm":
            result = workshop.train(one.name, one.seed, progress)
            click.echo(f"{one.label}: test accuracy {result.accuracy:.2f} %")
            return
        damaged = workshop.compare(one.name, progress)
    again = f"; {damaged} damaged cached gradients were computed again" if damaged else ""
    click.echo(f"order of {one.name}: compared{again}")
