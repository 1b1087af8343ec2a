"""`lars-study train`: one run, of your choice or of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from lars_fused.study import networks, plans, runs
from lars_fused.study.commands import options
from lars_fused.study.data import load
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import paper, train_report
from lars_fused.study.order import steps_for
from lars_fused.study.ranks import Ranks, joined
from lars_fused.study.runs import Result
from lars_fused.study.settings import CHOICES, Settings

HELP = {
    "data": options.DATA_HELP,
    "resolution": "Pixels a side that the images are resampled to; 0 leaves them.",
    "train_images": "Training images to use; 0 for all.",
    "validation": "Training images held out to stand in for the test set.",
    "augment": "minimal: shift and flip; extended: crops of any scale and aspect, and flip.",
    "pixels": "standardised: mean 0 and deviation 1 by channel; unit: in [0, 1].",
    "network": options.NETWORK_HELP,
    "width": "Share of the network's channels.",
    "convention": "Which LARS.",
    "lr": "Learning rate, after warm-up.",
    "scaling": "Rule that takes --lr from --base-batch to --batch.",
    "trust_coefficient": "0 takes the convention's.",
    "momentum": "Momentum of LARS and SGD.",
    "beta1": "Of Adam.",
    "beta2": "Of Adam; the decay of RMSprop.",
    "adapt_all": "Decay and adapt biases and normalisation too, as in the paper's Algorithm 1.",
    "batch": "Images per step, over all processes and micro-batches.",
    "micro_batch": "Images in memory at once (the paper's iter_size divides the batch); 0 for all.",
    "warmup_epochs": "Linear warm-up.",
    "warmup_start": "Share of the rate that warm-up begins with.",
    "decay": "poly: (1 - t/T)^power.",
    "milestones": "Shares of the run after which --decay step multiplies by --step-factor.",
    "momentum_correction": "Let the momentum buffer follow changes of the rate, or not; by default "
    "each optimizer has its own form.",
    "test_too": "With --validation: measure the test set as well.",
    "evaluations": "About how many times the test set is looked at.",
    "layers": "About how many times every layer's norms are recorded.",
}


def every_setting(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of `Settings`, with its default; an order is an experiment's own."""
    for field in reversed(fields(Settings)):
        if field.name == "order":
            continue
        assert field.default is not MISSING
        name, default = "--" + field.name.replace("_", "-"), field.default
        kind: dict[str, Any] = {
            "default": default,
            "help": HELP.get(field.name),
            "type": type(default),
        }
        kind["show_default"] = True
        if field.name in CHOICES:
            kind["type"] = click.Choice(CHOICES[field.name])
        elif field.name == "milestones":
            shown = ",".join(str(Fraction(m).limit_denominator(1000)) for m in default)
            kind |= {"type": options.Numbers(float), "default": shown}
        elif field.name == "momentum_correction":
            name, kind = f"{name}/--no-momentum-correction", kind | {"type": bool}
        elif isinstance(default, bool):
            kind = {"is_flag": True, "help": kind["help"]}
        command = click.option(name, field.name, **kind)(command)
    return command


@click.command("train", short_help="one run, also of the paper's recipes, also under torchrun")
@click.option("--recipe", help="A row of the paper's tables (`lars-study recipes`).")
@every_setting
@options.tensorboard
@options.where("study/train")
@click.pass_context
def command(
    context: click.Context, /, recipe: str | None, tensorboard: bool, out: Path, **chosen: Any
) -> None:
    """Train one network and leave its curves, tables and weights in a folder of its own.

    A run that was interrupted goes on from its checkpoint; a finished one is only shown. Under
    `torchrun` the processes share every batch, with the result of one process.
    """
    source = context.get_parameter_source
    given = {name for name in chosen if source(name) is not click.core.ParameterSource.DEFAULT}
    row = paper.recipe(recipe) if recipe else None
    if row is not None:
        chosen |= {k: v for k, v in recipe_settings(row).items() if k not in given}
        if row.lr is None and "lr" not in given:
            raise StudyError(f"--recipe {row.name}: {row.remark}; give --lr")
    settings = Settings(**chosen)
    with joined() as ranks:
        say = click.echo if ranks.first else lambda text: None
        result = _trained(settings, row, ranks, out, tensorboard, say)
        if ranks.first:
            folder = runs.folder_of(out, settings)
            train_report.draw(result, folder)
            say(train_report.evaluations(result))
            if result.history.diverged:
                say(f"The loss was not finite at step {result.history.diverged}: the run ended.")
            say(f"Test accuracy {result.accuracy:.2f} % after {result.steps:,} steps.")
            if row is not None:
                say(published(row))
            say(f"In {folder}: curves.png, steps.csv, evaluations.csv, result.json, weights.pt")


def _trained(
    settings: Settings,
    row: paper.Row | None,
    ranks: Ranks,
    out: Path,
    tensorboard: bool,
    say: Callable[[str], None],
) -> Result:
    data = load(settings.data, settings.resolution, settings.train_images)
    runs.check(settings, data, ranks)
    if ranks.first:
        plans.save(out, "train", {})
    if row is not None:
        for line in differences(row, settings, data.shape):
            say(f"  differs from {row.name}: {line}")
    images = len(data.train) - settings.validation
    steps = steps_for(settings.epochs, settings.batch, images)
    say(f"{settings.network}, {images:,} images, {steps:,} steps of {settings.batch:,}")
    with options.bar(steps, settings.optimizer, quiet=not ranks.first) as progress:
        result = runs.train(
            settings,
            out,
            ranks=ranks,
            keep_weights=True,
            tensorboard=tensorboard,
            progress=progress,
        )
    assert result is not None, "it was trained to the end"
    return result


def recipe_settings(row: paper.Row) -> dict[str, Any]:
    """The settings that a row of the paper's tables stands for."""
    found = {
        "network": row.network,
        "optimizer": row.optimizer,
        "batch": row.batch,
        "epochs": float(row.epochs),
        "warmup_epochs": row.warmup,
        "augment": row.augment,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "decay": "poly",
        "power": 2.0,
    }
    if row.lr is not None:
        found["lr"] = row.lr
        if row.optimizer == "sgd" and row.warmup:
            found["warmup_start"] = 0.001 / row.lr  # "LR starts from 0.001"
    return found


def differences(row: paper.Row, settings: Settings, shape: tuple[int, int, int]) -> list[str]:
    """What of a recipe is otherwise in this run, one line each."""
    published = networks.NETWORKS[row.network].input
    lines = [f"data {settings.data} instead of ImageNet"]
    if shape[1] != published[1]:
        lines.append(f"resolution {shape[1]} instead of {published[1]}")
    for name, value in recipe_settings(row).items():
        own = getattr(settings, name)
        if own != value:
            lines.append(f"{name.replace('_', '-')} {_text(own)} instead of {_text(value)}")
    if settings.width != 1:
        lines.append(f"width {settings.width:g} instead of 1")
    return lines


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def published(row: paper.Row) -> str:
    """The paper's number, for the line below the one that was reached."""
    if row.accuracy is None:
        return f"Published (table {row.table}, ImageNet): {row.remark}."
    remark = f" ({row.remark})" if row.remark else ""
    return f"Published (table {row.table}, ImageNet): {row.accuracy:g} %{remark}."
