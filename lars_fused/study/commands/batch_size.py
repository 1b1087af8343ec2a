"""`lars-study batch-size`: accuracy against batch size, learning rate and epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lars_fused.study import plans, runs
from lars_fused.study.commands import options
from lars_fused.study.experiments import batch_size_report
from lars_fused.study.experiments.batch_size import METHODS, Cell, Plan, complete
from lars_fused.study.order import steps_for
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

GRID_HELP = "as many rates as the other grid has"


@click.command("batch-size", short_help="accuracy against batch size: Tables 1, 3, 5; Figures 1, 3")
@options.what("mlp", 1.0, 20)
@click.option(
    "--batches",
    type=options.Numbers(int, ("all",)),
    default="32,128,512,all",
    show_default=True,
    help="Batch sizes; all is the whole training set.",
)
@click.option(
    "--methods",
    default="sgd-linear,sgd-warmup,lars",
    show_default=True,
    help=f"Of {', '.join(METHODS)}.",
)
@click.option(
    "--sgd-grid",
    type=options.Numbers(float),
    default="0.003,0.01,0.03,0.1,0.3",
    show_default=True,
    help=f"Rates at the smallest batch, scaled linearly to the others; {GRID_HELP}.",
)
@click.option(
    "--lars-grid",
    type=options.Numbers(float),
    default="2.5,5,10,20,40",
    show_default=True,
    help=f"Rates at every batch, with a trust coefficient of 0.001; {GRID_HELP}.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--tuning-seeds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--validation", default=0, help="Images held out for the choice; 0 for a fifth.")
@click.option("--warmup-epochs", default=2.5, show_default=True)
@click.option("--momentum", default=0.9, show_default=True)
@click.option("--weight-decay", default=5e-4, show_default=True)
@click.option(
    "--longer",
    type=options.Numbers(float),
    default="1,1.5,2",
    show_default=True,
    help="Multiples of the epochs to train at the largest batch.",
)
@options.only
@options.tensorboard
@options.where("study/batch-size")
def command(out: Path, only: tuple[int, int] | None, tensorboard: bool, **chosen: Any) -> None:
    """Compare SGD with linear scaling, SGD with warm-up, and LARS at several batch sizes.

    The learning rate of every cell is chosen on held-out training images; then several seeds train
    on all of them. Prints a table and leaves pictures: accuracy against batch size, against
    learning rate, against epochs, and the losses in training and test.
    """
    data = options.loaded(chosen)
    plan = planned(chosen, len(data.train))
    for cell in plan.cells():
        tuning = cell.tuning(len(data.train))[0][0]
        for settings in (tuning, cell.final(cell.grid[0])[0]):
            runs.check(settings, data)
    plans.save(out, "batch-size", plan.as_dict())
    cells = plan.cells()
    for cell in options.share_of(cells, only):
        run_cell(cell, len(data.train), out, tensorboard)
    options.conclude(out, only, batch_size_report.report)


def planned(chosen: dict[str, Any], images: int) -> Plan:
    """The plan that the options ask for."""
    base = Settings(**options.settings(chosen, "momentum", "weight_decay"), lr=1.0)
    return Plan(
        base,
        tuple(chosen["methods"].split(",")),
        options.counts(chosen["batches"], images),
        chosen["sgd_grid"],
        chosen["lars_grid"],
        chosen["seeds"],
        chosen["tuning_seeds"],
        chosen["validation"] or images // 5,
        chosen["warmup_epochs"],
        chosen["longer"],
    )


def run_cell(cell: Cell, images: int, out: Path, tensorboard: bool) -> None:
    """All runs of a cell, with a line for the cell when they are done."""
    label = f"{METHODS[cell.method].label}, batch {cell.batch:,}"

    def trained(settings: Settings) -> Result | None:
        left = images - settings.validation
        with options.bar(steps_for(settings.epochs, settings.batch, left), label) as progress:
            return runs.train(settings, out, progress=progress, tensorboard=tensorboard)

    outcome = complete(cell, images, trained)
    assert outcome is not None, "every run was trained"
    mean = sum(outcome.accuracies) / len(outcome.accuracies)
    click.echo(f"{label}: lr {outcome.lr:.4g}, test accuracy {mean:.2f} %")
