"""Writing results so that a killed process or a full disk never damages an earlier file."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lars_fused.study.errors import StudyError


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it.

    Args:
        path: the file; its folder is made.
        content: of the file.
        durable: wait until it is on the disk. What has a checksum need not.

    Raises:
        StudyError: the disk is full, or the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the reason below is the one to report
            beside.unlink(missing_ok=True)
        raise StudyError(
            f"{path} could not be written ({error.strerror}); earlier results are kept: "
            "make room or choose another --out, then repeat the command"
        ) from error


def plain(value: Any) -> Any:
    """The same value for JSON, which knows neither NaN nor infinity: those become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def numbers(value: Any) -> Any:
    """What `plain` made, with NaN for null: what a run that diverged measured last."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return math.nan if value is None else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented."""
    text = json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        StudyError: the file is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise StudyError(
            f"{path} is not a whole JSON file ({error}); delete it and repeat the command"
        ) from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None is an empty cell."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())


def write_tensors(path: Path, value: Any) -> None:
    """`torch.save`, through memory: torch reports a full disk as an internal error."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def read_tensors(path: Path) -> Any:
    """Read what `write_tensors` wrote; tensors and plain data only.

    Raises:
        StudyError: the file is unreadable, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers run into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StudyError(
            f"{path} is damaged ({reason[:80]}); delete it to start this run anew"
        ) from error
