"""`lars-study rules`: learning rules, batch normalisation and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lars_fused.study import plans, runs
from lars_fused.study.commands import options
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import coursework, rules_report
from lars_fused.study.experiments.rules import RULES, Plan, keeps_weights
from lars_fused.study.settings import Settings

NETWORKS = "mlp,mlp-bn,mlp-bn-normal,mlp-bn-frozen,conv1,conv2"
GRIDS = (
    *("sgd_lrs", "rmsprop_lrs", "adam_lrs", "adam_beta1", "adam_beta2"),
    *("lars_lrs", "lars_momenta", "lars_decays"),
)


def _grid(
    name: str, values: tuple[float, ...], text: str
) -> Callable[[options.Command], options.Command]:
    kind = options.Numbers(float, zero=True)
    default = ",".join(f"{value:g}" for value in values)
    return click.option(name, type=kind, default=default, show_default=True, help=text)


@click.command("rules", short_help="SGD, RMSprop, Adam, LARS; batch normalisation; convolutions")
@options.images("mnist5k")
@click.option("--epochs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=coursework.BATCH, show_default=True, type=click.IntRange(1))
@click.option("--width", default=1.0, show_default=True, help="Share of the units and channels.")
@click.option("--validation", default=0, help="Images held out; 0 for about an eighth.")
@click.option(
    "--rules", default=",".join(RULES), show_default=True, help="Whose grids to run, or none."
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1))
@_grid("--sgd-lrs", coursework.SGD_RATES, "Section 2.")
@_grid("--rmsprop-lrs", coursework.RMSPROP_RATES, "Section 3, with a decay of 0.9.")
@_grid("--adam-lrs", coursework.ADAM_RATES, "Section 3.")
@_grid("--adam-beta1", coursework.ADAM_BETA1, "Section 3.")
@_grid("--adam-beta2", coursework.ADAM_BETA2, "Section 3.")
@_grid("--lars-lrs", coursework.LARS_RATES, "With a trust coefficient of 0.001.")
@_grid("--lars-momenta", coursework.LARS_MOMENTA, "Its grid must be as large as Adam's.")
@_grid("--lars-decays", coursework.LARS_DECAYS, "Weight decay.")
@click.option(
    "--networks",
    default=NETWORKS,
    show_default=True,
    help="Trained with Adam at lr 0.0001, β1 0.9, β2 0.9999; or none.",
)
@click.option("--network-seeds", default=2, show_default=True, type=click.IntRange(1))
@options.only
@options.tensorboard
@options.where("study/rules")
def command(out: Path, only: tuple[int, int] | None, tensorboard: bool, **chosen: Any) -> None:
    """Compare learning rules over grids, and networks with one rule, as a coursework did.

    A 100-100 network by SGD, RMSprop, Adam and LARS; the same with batch normalisation; networks
    of one and two convolutions. Accuracy by epoch, the best epoch by validation, how far it falls
    afterwards, and the test accuracy at that epoch, with the published numbers beside.
    """
    data = options.loaded(chosen)
    plan = planned(chosen, len(data.train))
    every = plan.runs()
    for settings in every:
        if settings.seed == 0:
            runs.check(settings, data)
    plans.save(out, "rules", plan.as_dict())
    todo = options.share_of(every, only)
    with options.counter(len(todo), "training") as count:
        for settings in todo:
            runs.train(settings, out, keep_weights=keeps_weights(settings), tensorboard=tensorboard)
            count()
    options.conclude(out, only, rules_report.report)


def planned(chosen: dict[str, Any], images: int) -> Plan:
    """The plan that the options ask for."""
    batch, epochs = chosen["batch"], chosen["epochs"]
    # Whole batches to an epoch, so that one ends where the next begins.
    left = images * 7 // 8 // batch * batch if not chosen["validation"] else 0
    if not left and not chosen["validation"]:
        raise StudyError(f"--batch {batch} is too large for {images:,} training images")
    base = Settings(
        **(options.settings(chosen, "batch") | {"epochs": float(epochs)}),
        evaluations=epochs,
        validation=chosen["validation"] or images - left,
        test_too=True,
        pixels="unit",
        momentum=0.0,
        weight_decay=0.0,
        decay="constant",
    )
    return Plan(
        base,
        rules=_names(chosen["rules"]),
        networks=_names(chosen["networks"]),
        seeds=chosen["seeds"],
        network_seeds=chosen["network_seeds"],
        **{name: chosen[name] for name in GRIDS},
    )


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))
