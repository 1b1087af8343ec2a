"""Measurements that are no training runs, kept in an out folder and not repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lars_fused.study import files
from lars_fused.study.errors import StudyError

Wanted = dict[str, Any]


def path_of(out: Path, kind: str, wanted: Wanted) -> Path:
    """The file of the measurement of that kind with exactly these settings."""
    text = json.dumps(files.plain(wanted), sort_keys=True)
    return out / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def find(out: Path, kind: str, wanted: Wanted) -> Any:
    """What was measured, as JSON has it but for NaN; None if it was not yet.

    Raises:
        StudyError: the file is damaged, or holds another measurement than its name says.
    """
    path = path_of(out, kind, wanted)
    if not path.exists():
        return None
    held = files.read_json(path)
    if not isinstance(held, dict) or held.get("of") != files.plain(wanted):
        raise StudyError(f"{path} holds another measurement than its name says; delete it")
    return files.numbers(held["measured"]) if "measured" in held else None


def measure(out: Path, kind: str, wanted: Wanted, compute: Callable[[], Any]) -> Any:
    """What was measured with these settings: from its file, or by `compute`.

    `compute` depends on nothing but the settings, so one that was interrupted is begun again.
    """
    found = find(out, kind, wanted)
    if found is None:
        made = {"of": wanted, "measured": compute()}
        files.write_json(path_of(out, kind, wanted), made)
        found = find(out, kind, wanted)
    return found
