"""`lars-study recipes`: the tables of the LARS paper."""

from __future__ import annotations

import click

from lars_fused.study import networks
from lars_fused.study.experiments import paper
from lars_fused.study.experiments.layers_report import number
from lars_fused.study.tables import table


@click.command("recipes", short_help="the paper's tables, as recipes for `train`")
def command() -> None:
    """List the rows of Tables 1 to 6 of the LARS paper; `train --recipe NAME` trains one.

    ? marks what is illegible in the copy that the tables were read from.
    """
    rows = [
        [
            row.name,
            row.network,
            row.optimizer,
            f"{row.batch:,}",
            number(row.lr),
            f"{row.warmup:g}",
            str(row.epochs),
            row.augment,
            number(row.accuracy),
            row.remark,
        ]
        for row in paper.ROWS
    ]
    header = ["recipe", "network", "optimizer", "batch", "lr", "warm-up", "epochs", "augment"]
    click.echo(table([*header, "top-1, %", "remark"], rows))
    click.echo("\nTable 2: AlexNet after one iteration (`lars-study layers` measures it here)")
    layers = [
        [layer.name, *map(number, (layer.weight, layer.gradient, layer.ratio)), layer.remark]
        for layer in paper.TABLE_2
    ]
    click.echo(table(["tensor", "N(w)", "N(g)", "ratio", "remark"], layers))
    click.echo(f"{paper.TABLE_2_REMARK}.\n{paper.EARLIER_VERSION}")
    click.echo("\nNetworks")
    click.echo(
        table(
            ["network", "parameters", "at", "about"],
            [
                [name, f"{n.parameters:,}", "x".join(map(str, (n.input[0], n.input[1], n.input[1])))
                 + f", {n.input[2]:,} classes", n.about]
                for name, n in networks.NETWORKS.items()
            ],
        )
    )  # fmt: skip
