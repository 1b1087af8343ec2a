"""Reading what a study has left."""

from __future__ import annotations

import csv
from pathlib import Path


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
