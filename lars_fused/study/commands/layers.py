"""`lars-study layers`: norms and trust ratios by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lars_fused.study import plans, runs
from lars_fused.study.commands import options
from lars_fused.study.experiments import layers_report
from lars_fused.study.experiments.layers import Plan
from lars_fused.study.order import steps_for
from lars_fused.study.settings import Settings

RECORDED = 60


@click.command("layers", short_help="norms by layer: Table 2, Figure 2, equation 7")
@options.what("alexnet-bn", 0.125, 10)
@click.option(
    "--batches",
    type=options.Numbers(int, ("all",)),
    default="64,512",
    show_default=True,
    help="Batch sizes; all is the whole training set.",
)
@click.option(
    "--lars-lr", default=10.0, show_default=True, help="With a trust coefficient of 0.001."
)
@click.option("--sgd-lr", default=0.05, show_default=True, help="At the smallest batch, scaled.")
@click.option("--warmup-epochs", default=2.0, show_default=True)
@click.option("--weight-decay", default=5e-4, show_default=True)
@click.option(
    "--adapt-all", is_flag=True, help="Adapt biases and normalisation too, as in the paper."
)
@click.option("--seed", default=0, show_default=True)
@options.only
@options.tensorboard
@options.where("study/layers")
def command(out: Path, only: tuple[int, int] | None, tensorboard: bool, **chosen: Any) -> None:
    """Measure every layer's weight norm, gradient norm and trust ratio while LARS trains.

    Prints the first step's norms (Table 2 of the LARS paper, with the paper's AlexNet beside), and
    whether the bound of equation 7 on the weight norms held; draws the local learning rates and the
    norms over training, and the accuracy with and without LARS.
    """
    data = options.loaded(chosen)
    plan = planned(chosen, len(data.train))
    every = plan.runs()
    for settings in every:
        runs.check(settings, data)
    plans.save(out, "layers", plan.as_dict())
    for settings in options.share_of(every, only):
        label = f"{settings.optimizer}, batch {settings.batch:,}"
        steps = steps_for(settings.epochs, settings.batch, len(data.train))
        with options.bar(steps, label) as progress:
            result = runs.train(settings, out, progress=progress, tensorboard=tensorboard)
        assert result is not None, "it was trained to the end"
        click.echo(f"{label}: test accuracy {result.accuracy:.2f} %")
    options.conclude(out, only, layers_report.report)


def planned(chosen: dict[str, Any], images: int) -> Plan:
    """The plan that the options ask for."""
    others = ("warmup_epochs", "weight_decay", "adapt_all", "seed")
    base = Settings(**options.settings(chosen, *others), layers=RECORDED)
    batches = options.counts(chosen["batches"], images)
    return Plan(base, batches, chosen["lars_lr"], chosen["sgd_lr"])
