"""Folders of images, `train/CLASS/FILE` and `val/CLASS/FILE`, decoded with Pillow."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lars_fused.study.data.images import Images, Split, in_memory
from lars_fused.study.errors import StudyError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
IN_MEMORY = 2 << 30
"""Bytes of decoded images up to which a split is kept in memory; beyond, it is decoded as used."""


def decode(path: Path, resolution: int) -> Tensor:
    """An image as uint8 (3, side, side): the largest central square, resampled.

    Raises:
        StudyError: it is not an image, or is cut short.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # every decoder raises its own
        raise StudyError(f"{path} is not a whole image: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if resolution and side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def listing(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Every image with its class; classes are the sub-folders in alphabetical order."""
    if not folder.is_dir():
        raise StudyError(f"{folder} is not a folder; an image folder has train/ and val/ in it")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise StudyError(f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise StudyError(f"{folder} holds no folder of images")
    return paths, torch.tensor(labels), classes


def split(folder: Path, resolution: int) -> tuple[Split, tuple[str, ...]]:
    """The images under `folder`; without a resolution all take the size of the first."""
    paths, labels, classes = listing(folder)
    side = resolution or decode(paths[0], 0).shape[-1]
    threads = ThreadPoolExecutor(os.cpu_count())

    def several(numbers: list[int]) -> Tensor:
        return torch.stack(list(threads.map(lambda i: decode(paths[i], side), numbers)))

    if len(paths) * 3 * side * side <= IN_MEMORY:
        images = in_memory(several(list(range(len(paths)))))
    else:
        images = Images(
            several, (3, side, side), torch.arange(len(paths)), torch.zeros(3), torch.ones(3)
        )
    return Split(images, labels), classes


def image_folder(folder: Path, resolution: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and validation images; both must have the same classes."""
    train, classes = split(folder / "train", resolution)
    test, others = split(folder / "val", resolution or train.images.shape[1])
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise StudyError(f"{folder}: train/ and val/ differ in the classes {', '.join(odd[:5])}")
    return train, test, classes
