"""`lars-study noise`: the noise scale, the best batch size, and where SGD settles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lars_fused.study import networks, plans, runs
from lars_fused.study.commands import options
from lars_fused.study.data import Data
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import noise_measure, noise_parts, noise_report
from lars_fused.study.experiments.noise import Plan
from lars_fused.study.experiments.wells import Wells
from lars_fused.study.settings import Settings


@click.command("noise", short_help="noise scale, best batch size, flat and sharp minima")
@options.data_and_network("mlp", 1.0)
@click.option(
    "--lr", default=0.1, show_default=True, help="Rate of the sweep over training-set sizes."
)
@click.option(
    "--lrs",
    type=options.Numbers(float),
    default="0.05,0.1,0.2,0.4",
    show_default=True,
    help="Rates of the other sweep, on all training images.",
)
@click.option(
    "--batches",
    type=options.Numbers(int),
    default="4,8,16,32,64,128,256",
    show_default=True,
    help="Batch sizes of every curve; those beyond its training images are left out.",
)
@click.option(
    "--sizes",
    type=options.Numbers(int, ("all",)),
    default="160,320,640,all",
    show_default=True,
    help="Training-set sizes.",
)
@click.option("--steps", default=300, show_default=True, help="Of every run, at a constant rate.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--momentum", default=0.0, show_default=True)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option(
    "--examples", default=1000, show_default=True, help="Images whose gradients are measured."
)
@click.option("--small", default=8, show_default=True, help="Micro-batch of NoiseScale.")
@click.option("--pieces", default=8, show_default=True, help="Micro-batches of its batch.")
@click.option("--updates", default=40, show_default=True, help="Batches of one estimate.")
@click.option("--repeats", default=8, show_default=True, help="Independent estimates.")
@click.option(
    "--temperatures",
    type=options.Numbers(float),
    default="0.2,0.45",
    show_default=True,
    help="lr σ²/(2B) on the made loss.",
)
@click.option(
    "--well-batches",
    type=options.Numbers(int),
    default="1,2,4,8,16,32",
    show_default=True,
    help="Batch sizes on the made loss.",
)
@click.option("--chains", default=1000, show_default=True, help="Runs on the made loss.")
@click.option("--time", default=80.0, show_default=True, help="lr times their steps.")
@options.only
@options.tensorboard
@options.where("study/noise")
def command(out: Path, only: tuple[int, int] | None, tensorboard: bool, **chosen: Any) -> None:
    """Measure the noise of SGD, and which batch size does best at a learning rate.

    Gradient noise tr(Σ)/|G|² by NoiseScale and from every example's gradient; test accuracy against
    batch size at fixed rates and at fixed training-set sizes, with the line through the best batch
    sizes; the share of runs that end in the flat one of two minima at equal lr/B.
    """
    data = options.loaded(chosen)
    images = len(data.train)
    plan = planned(chosen, images)
    check(plan, data)
    plans.save(out, "noise", plan.as_dict())
    do(plan, data, out, only, tensorboard)
    options.conclude(out, only, noise_report.report)


def planned(chosen: dict[str, Any], images: int) -> Plan:
    """The plan that the options ask for."""
    base = Settings(
        **options.settings(chosen, "lr", "momentum", "weight_decay"),
        optimizer="sgd",
        decay="constant",
        evaluations=1,
    )
    return Plan(
        base,
        lrs=tuple(sorted(chosen["lrs"])),
        batches=tuple(sorted(chosen["batches"])),
        sizes=options.counts(chosen["sizes"], images),
        examples=min(chosen["examples"], images),
        measured_at=(0.0, 0.1, 0.25, 0.5, 1.0),
        wells=Wells(),
        **{
            name: chosen[name]
            for name in ("steps", "seeds", "small", "pieces", "updates", "repeats")
        },
        **{name: chosen[name] for name in ("temperatures", "well_batches", "chains", "time")},
    )


def check(plan: Plan, data: Data) -> None:
    """Fails before the first run on what would fail in one of them."""
    images = len(data.train)
    if plan.sizes[-1] > images:
        raise StudyError(
            f"--sizes {plan.sizes[-1]} is more than the {images:,} training images there are"
        )
    if plan.batches[0] > plan.sizes[0]:
        raise StudyError(
            f"--batches {plan.batches[0]} is larger than the smallest of --sizes, {plan.sizes[0]}"
        )
    base = plan.base
    model = networks.build(base.network, data.shape, len(data.classes), base.width)
    noise_measure.check(base.network, model)
    for settings in plan.runs(images):
        Settings.from_dict(settings.as_dict())  # every rate is one that a run can use
    runs.check(noise_parts.measured_run(plan, images), data)


def do(plan: Plan, data: Data, out: Path, only: tuple[int, int] | None, tensorboard: bool) -> None:
    """Gradient noise in the first share, then runs, then the made loss."""
    images = len(data.train)
    if only is None or only[0] == 0:
        noise_parts.gradient_noise(plan, images, out, data)
        click.echo("gradient noise: done")
    todo = options.share_of(plan.runs(images), only)
    with options.counter(len(todo), "SGD") as count:
        for settings in todo:
            runs.train(settings, out, tensorboard=tensorboard)
            count()
    cells = options.share_of(plan.well_cells(), only)
    with options.counter(len(cells), "made loss") as count:
        for cell in cells:
            noise_parts.well(plan, cell, out)
            count()
