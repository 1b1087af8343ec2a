"""Reads raw.csv of a results folder: what was measured, and what was interleaved with it."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from bench.cases import SWEEP_CASE, Case, model_case, sweep_case
from bench.models import MODELS

COPY = "copy"  # the variant that gives a run its copy bandwidth
Raw = dict[str, str]


def rows_of(folder: Path) -> list[Raw]:
    path = folder / "raw.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case_of(row: Raw) -> Case | None:
    """The case that a row measured; None for norms and host overhead."""
    if row["case"] in MODELS:
        return model_case(row["case"], row["dtype"])
    if row["case"] == SWEEP_CASE:
        return sweep_case(int(row["n_params"]), row["dtype"])
    return None


def runs(rows: list[Raw], unit: str = "us") -> dict[tuple[str, ...], dict[str, dict[str, Raw]]]:
    """Rows that were interleaved: (case, parameters, dtype, utc) -> kind -> variant -> row."""
    found: dict[tuple[str, ...], dict[str, dict[str, Raw]]] = defaultdict(dict)
    for row in rows:
        if row["unit"] == unit:
            key = (row["case"], row["n_params"], row["dtype"], row["utc"])
            found[key].setdefault(row["kind"], {})[row["variant"]] = row
    return dict(found)


def copy_us(timed: dict[str, Raw], bytes: float) -> float | None:
    """Microseconds for this many bytes at the copy bandwidth of the same run."""
    if COPY not in timed:
        return None
    return bytes / (float(timed[COPY]["bytes"]) / float(timed[COPY]["p50"]))
