"""`lars-study report`: tables and pictures once more, from what an out folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from lars_fused.study import plans
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import (
    batch_size_report,
    layers_report,
    noise_report,
    rules_report,
    train_report,
)
from lars_fused.study.experiments.minibatch import report as minibatch_report
from lars_fused.study.experiments.sharpness import report as sharpness_report

REPORTS: dict[str, Callable[[Path], str]] = {
    "batch-size": batch_size_report.report,
    "layers": layers_report.report,
    "minibatch": minibatch_report.report,
    "sharpness": sharpness_report.report,
    "noise": noise_report.report,
    "rules": rules_report.report,
    "train": train_report.report,
}


@click.command("report", short_help="tables and pictures again, from an out folder")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
def command(out: Path) -> None:
    """Make the tables and pictures of OUT again from the finished runs in it.

    Shares of a sweep that ran elsewhere (--only) are merged by copying their folders into OUT.
    """
    study = plans.load(out)["study"]
    if study not in REPORTS:
        raise StudyError(f"{out} holds a study of {study}, which this version does not know")
    click.echo(REPORTS[study](out))
