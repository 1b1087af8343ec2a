"""Files are whole or not there, and an earlier one survives what goes wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from lars_fused.study import files
from lars_fused.study.errors import StudyError

pytestmark = pytest.mark.cpu


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_json(path, {"new": 1}),
        lambda path: files.write_csv(path, ["new"], [[1]]),
        lambda path: files.write_tensors(path, {"new": torch.ones(9)}),
    ],
    ids=["json", "csv", "tensors"],
)
def test_a_full_disk_keeps_the_earlier_file(tmp_path: Path, monkeypatch, write) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", no_space)  # the whole file has been written by then
    with pytest.raises(StudyError, match=r"could not be written \(No space left on device\)"):
        write(path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="could not be written"):
        files.write_json(tmp_path / "file" / "result.json", {})


def test_json_without_nan_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    files.write_json(path, {"x": [1.5, float("nan"), (float("inf"),)]})
    assert json.loads(path.read_text()) == files.read_json(path) == {"x": [1.5, None, [None]]}
    with pytest.raises(StudyError, match="cannot be read"):
        files.read_json(tmp_path / "none.json")


def test_a_damaged_checkpoint_is_named_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    files.write_tensors(path, {"a": torch.arange(3), "b": [1, None, "c"]})
    assert files.read_tensors(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StudyError, match=r"checkpoint\.pt is damaged"):
        files.read_tensors(path)
    torch.save(Path("x"), path)
    with pytest.raises(StudyError, match=r"checkpoint\.pt is damaged"):
        files.read_tensors(path)
