"""Merges results folders of one commit and one GPU: `python -m bench merge PART...`.

A run split into several calls, perhaps on several machines, leaves one folder or archive per call.
Rows and facts that two of them share are kept once, so merged folders can be merged again.
"""

from __future__ import annotations

import csv
import filecmp
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import environment

TABLES = ("raw.csv", "tune.csv")
_SAME = ("sha", "dirty", "gpu")


@contextmanager
def _opened(part: Path) -> Iterator[Path]:
    """The results folder: `part` itself, or the one folder in an archive."""
    if part.is_dir():
        yield part
        return
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(part) as archive:
            archive.extractall(unpacked, filter="data")
        (folder,) = Path(unpacked).iterdir()
        yield folder


def _add_rows(target: Path, source: Path) -> None:
    held: list[dict[str, str]] = []
    for path in (target, source):
        if path.exists():
            with path.open(newline="") as file:
                held += [row for row in csv.DictReader(file) if row not in held]
    if held:
        header = list(dict.fromkeys(key for row in held for key in row))
        with target.open("w", newline="") as file:
            table = csv.DictWriter(file, header, lineterminator="\n")
            table.writeheader()
            table.writerows(held)


def _add_facts(target: Path, source: Path) -> None:
    before, new = environment.read(target), environment.read(source)
    facts: dict[str, Any] = {**before, **new}
    for key in facts:
        if isinstance(before.get(key), dict) and isinstance(new.get(key), dict):
            facts[key] = {**before[key], **new[key]}
            status = [f[key].get("exit status", 0) for f in (before, new)]
            if any(status):  # a failure is not undone by another call
                facts[key]["exit status"] = status[0] or status[1]
    environment.write(target, facts)


def _add_file(target: Path, source: Path) -> None:
    """Copy a file; if one with the same name but other contents exists, keep both."""
    stem, n = target.stem, 1
    while target.exists() and not filecmp.cmp(target, source, shallow=False):
        n += 1
        target = target.with_name(f"{stem}-{n}{target.suffix}")
    shutil.copyfile(source, target)


def merge(parts: Sequence[Path], parent: Path = environment.RESULTS) -> Path:
    """Merge `parts` into one folder in `parent`, named like the first; then redo the report.

    Raises:
        ValueError: if they are not from one commit and one GPU.
    """
    from bench import report

    with ExitStack() as stack:
        folders = [stack.enter_context(_opened(part)) for part in parts]
        target = parent / folders[0].name
        held = [f for f in (target, *folders) if environment.read(f)]
        kinds = {f: tuple(environment.read(f).get(key) for key in _SAME) for f in held}
        if len(set(kinds.values())) > 1:
            told = "; ".join(f"{f.name}: {kind}" for f, kind in kinds.items())
            raise ValueError(f"results of several commits or GPUs are not merged: {told}")
        target.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            if folder.resolve() == target.resolve():
                continue
            _add_facts(target, folder)
            for source in sorted(folder.iterdir()):
                if source.name in TABLES:
                    _add_rows(target / source.name, source)
                elif source.suffix in (".json", ".txt", ".csv") and source.name not in _MADE:
                    _add_file(target / source.name, source)
    report.write(target)
    return target


# Made by other means: merged as facts, or gone with the run.
_MADE = ("environment.json", "pieces.txt")
