"""`lars-study sharpness`: how sharp the minima are that small and large batches end in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lars_fused.study import plans, runs
from lars_fused.study.commands import options
from lars_fused.study.data import Data
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.sharpness import report, work
from lars_fused.study.experiments.sharpness.maximise import ITERATIONS
from lars_fused.study.experiments.sharpness.plan import OPTIMIZERS, PATHS, Plan, Series
from lars_fused.study.order import steps_for
from lars_fused.study.settings import CHOICES, Settings


@click.command("sharpness", short_help="sharpness of minima against batch size, and between them")
@options.what("f2", 0.125, 15)
@click.option(
    "--batches",
    type=options.Numbers(int, ("all",)),
    default="32,128,512",
    show_default=True,
    help="Batch sizes, at least two; all is the whole training set.",
)
@click.option("--optimizers", default=",".join(OPTIMIZERS), show_default=True)
@click.option("--adam-lr", default=0.001, show_default=True)
@click.option("--sgd-lr", default=0.05, show_default=True, help="With momentum 0.9.")
@click.option("--lars-lr", default=5.0, show_default=True, help="With a coefficient of 0.001.")
@click.option(
    "--scaling",
    type=click.Choice(CHOICES["scaling"]),
    default="none",
    show_default=True,
    help="Of the rates, from the smallest batch on; Keskar et al. left them as they were.",
)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1))
@click.option(
    "--epsilons",
    type=options.Numbers(float),
    default="0.001,0.0005",
    show_default=True,
    help="Sizes of the box in which the largest loss is looked for.",
)
@click.option(
    "--columns",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="p, of a random A with n x p numbers.",
)
@click.option(
    "--images",
    default=500,
    show_default=True,
    type=click.IntRange(0),
    help="Training images over which the loss is taken for its sharpness; 0 for all.",
)
@click.option("--iterations", default=ITERATIONS, show_default=True, type=click.IntRange(1))
@click.option(
    "--points",
    default=25,
    show_default=True,
    type=click.IntRange(4),
    help="Along each path, from alpha = -1 to 2.",
)
@click.option(
    "--draws",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Of a random A, for the four functions.",
)
@options.only
@options.where("study/sharpness")
def command(out: Path, only: tuple[int, int] | None, **chosen: Any) -> None:
    """Measure the sharpness of what Adam, SGD and LARS find at several batch sizes.

    Sharpness is Definition 2 of the notes "Towards Understanding SGD": how much higher than at x
    the loss gets in a box around x, in all directions and in a random subspace. Prints their
    Table 1 with what was measured beside; draws accuracy and sharpness against batch size, accuracy
    by epoch, and the loss between the small-batch and the large-batch solution.
    """
    data = options.loaded(chosen)
    plan = planned(chosen, data)
    for series in plan.series():
        for settings in series.runs:
            runs.check(settings, data)
    plans.save(out, "sharpness", plan.as_dict())
    for series in options.share_of(plan.series(), only):
        do(series, data, out)
    options.conclude(out, only, report.report)


def planned(chosen: dict[str, Any], data: Data) -> Plan:
    """The plan that the options ask for."""
    images = len(data.train)
    if chosen["images"] > images:
        raise StudyError(
            f"--images {chosen['images']} is more than the {images:,} training images there are"
        )
    base = Settings(
        **options.settings(chosen, "scaling", "weight_decay"),
        decay="constant",
        evaluations=20,
    )
    names = chosen["optimizers"].split(",")
    if len(set(names)) < len(names):
        raise StudyError(f"--optimizers {chosen['optimizers']} names one twice")
    return Plan(
        base,
        {name: chosen.get(f"{name}_lr", 0.0) for name in names},
        options.counts(chosen["batches"], images),
        chosen["seeds"],
        chosen["epsilons"],
        chosen["columns"],
        chosen["images"],
        chosen["iterations"],
        chosen["points"],
        chosen["draws"],
    )


def do(series: Series, data: Data, out: Path) -> None:
    """All runs of a series, their sharpness, and the paths between its ends."""
    for settings in series.runs:
        label = f"{settings.optimizer}, batch {settings.batch:,}, seed {settings.seed}"
        steps = steps_for(settings.epochs, settings.batch, len(data.train))
        with options.bar(steps, label) as progress:
            result = runs.train(settings, out, data=data, keep_weights=True, progress=progress)
        assert result is not None, "it was trained to the end"
        found = [work.measure(data, settings, box, out) for box in series.plan.boxes()]
        values = ", ".join(f"{one.value:.3g}" for one in found)
        click.echo(f"{label}: test accuracy {result.accuracy:.2f} %, sharpness {values}")
    if series.seed == 0:
        for path in PATHS:
            work.walk(data, series, path, out)
