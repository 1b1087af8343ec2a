"""The idx format of MNIST and EMNIST, gzipped or not.

A header of four-byte big-endian numbers: the magic number (0x0801 for labels, 0x0803 for images of
unsigned bytes; the last byte is the number of dimensions), then the size of each dimension; then
the bytes. Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database".
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lars_fused.study.errors import StudyError

MAGIC = {"labels": 0x0801, "images": 0x0803}
DIMENSIONS = {"labels": 1, "images": 3}


def read(path: Path, kind: str) -> Tensor:
    """Labels (n,) or images (n, rows, columns) as uint8.

    Raises:
        StudyError: the file cannot be read, is not idx of that kind, or is cut short or too long.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StudyError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from error
    header = 4 * (1 + DIMENSIONS[kind])
    if len(content) < header:
        raise StudyError(f"{path} is cut short: {len(content)} bytes hold no idx header")
    magic, *sizes = struct.unpack(f">{header // 4}I", content[:header])
    if magic != MAGIC[kind]:
        raise StudyError(
            f"{path} does not hold {kind}: its magic number is {magic:#06x}, not {MAGIC[kind]:#06x}"
        )
    expected = header + math.prod(sizes)
    if len(content) != expected:
        how = "cut short" if len(content) < expected else "too long"
        raise StudyError(
            f"{path} is {how}: its header announces {' x '.join(map(str, sizes))} bytes of {kind}, "
            f"{expected:,} with the header; it has {len(content):,}"
        )
    if not math.prod(sizes):
        raise StudyError(f"{path} is empty: its header announces no {kind}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(sizes)


def locate(folder: Path, stem: str) -> Path:
    """The file `stem`, gzipped or not, also with a dot before idx as some mirrors have it."""
    names = [stem, stem.replace("-idx", ".idx")]
    for name in (*names, *(f"{name}.gz" for name in names)):
        if (folder / name).is_file():
            return folder / name
    raise StudyError(f"{folder} holds no file {stem} or {stem}.gz")


def pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Square images (n, 1, side, side) with their labels (n,)."""
    files = {kind: locate(folder, f"{prefix}-{kind}-idx{DIMENSIONS[kind]}-ubyte") for kind in MAGIC}
    images, labels = read(files["images"], "images"), read(files["labels"], "labels")
    if len(images) != len(labels):
        raise StudyError(
            f"{files['labels']} has {len(labels):,} labels for the {len(images):,} images of "
            f"{files['images'].name}"
        )
    if images.shape[1] != images.shape[2]:
        raise StudyError(f"{files['images']} has images of {images.shape[1]} x {images.shape[2]}")
    return images[:, None], labels.to(torch.int64)


def mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels, as the idx files have them."""
    return *pair(folder, "train"), *pair(folder, "t10k")


def emnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of EMNIST; NIST stores its images transposed, which is undone here.

    Of several EMNIST splits in one folder, `balanced` is taken.
    """
    found = {
        match[1]
        for path in folder.iterdir()
        if (match := re.match(r"emnist-(\w+)-train-images[-.]idx3-ubyte", path.name))
    }
    if not found:
        raise StudyError(f"{folder} holds no file emnist-SPLIT-train-images-idx3-ubyte[.gz]")
    if len(found) > 1 and "balanced" not in found:
        raise StudyError(
            f"{folder} holds the splits {', '.join(sorted(found))}: leave one of them, or balanced"
        )
    split = "balanced" if "balanced" in found else found.pop()
    train, train_labels = pair(folder, f"emnist-{split}-train")
    test, test_labels = pair(folder, f"emnist-{split}-test")
    return train.mT.contiguous(), train_labels, test.mT.contiguous(), test_labels
