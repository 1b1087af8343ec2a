"""Reading what a study has left."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def summary_of(study: Path) -> dict[str, Any]:
    """What a report has written of a study."""
    return json.loads((study / "summary.json").read_text(encoding="utf-8"))
