"""CIFAR-10's python-version batches: pickles, read without running anything that they contain."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lars_fused.study.errors import StudyError

BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
PIXELS = 3 * 32 * 32

# What a pickled array of numbers is made of, under the old and the new name of numpy's core.
_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    """A pickle may name any function to call; this one refuses all but numpy's constructors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch does")
        return super().find_class(module, name)


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one batch.

    Raises:
        StudyError: the file is missing, no pickle of arrays, or its sizes do not agree.
    """
    try:
        held = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise StudyError(f"{path} is not a whole CIFAR-10 batch: {error}") from error
    if not isinstance(held, dict) or not {b"data", b"labels"} <= held.keys():
        raise StudyError(f"{path} is not a CIFAR-10 batch: it has no data and labels")
    pixels, labels = np.asarray(held[b"data"]), np.asarray(held[b"labels"])
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise StudyError(
            f"{path}: data is {pixels.dtype} of shape {pixels.shape}, not uint8 of (n, {PIXELS})"
        )
    if labels.shape != (len(pixels),):
        raise StudyError(f"{path} has {labels.size:,} labels for {len(pixels):,} images")
    if (
        not len(labels)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < 10
    ):
        raise StudyError(f"{path} has labels outside 0 to 9")
    images = torch.from_numpy(np.ascontiguousarray(pixels)).reshape(-1, 3, 32, 32)
    return images, torch.from_numpy(labels.astype(np.int64))


def cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels of the five batches, test images and labels."""
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    parts = [read(folder / name) for name in BATCHES]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, *read(folder / "test_batch")
