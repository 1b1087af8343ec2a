"""Scikit-learn's handwritten digits and a small AlexNet-BN-style network to learn them.

The 1,797 images are 8x8, in 10 classes, and come inside scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

TRAIN_IMAGES = 1297
"""Enough for a batch of 1,024 different images, with some left out; 500 remain for the test."""

SPLIT_SEED = 2017


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32, standardised over the training set; labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Digits:
        """The same data on another device."""
        return Digits(*(tensor.to(device) for tensor in self))


def load(train: int = TRAIN_IMAGES) -> Digits:
    """The digits, shuffled with a fixed seed and split: the bundle is ordered by writer."""
    # Imported here so that the model can be used without scikit-learn.
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.data).to(torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(bundle.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = images[order], labels[order]
    images = (images - images[:train].mean()) / images[:train].std()
    return Digits(images[:train], labels[:train], images[train:], labels[train:])


def hold_out(digits: Digits, images: int) -> Digits:
    """The same data with the last `images` training images standing in for the test set.

    Hyper-parameters are chosen on this, so that the test images play no part in the choice.
    """
    if not 0 < images < len(digits.train_labels):
        raise ValueError(f"images must lie in 1..{len(digits.train_labels) - 1}, not {images}")
    return Digits(
        digits.train_images[:-images],
        digits.train_labels[:-images],
        digits.train_images[-images:],
        digits.train_labels[-images:],
    )


def steps_for(epochs: float, batch: int, images: int) -> int:
    """Steps in which `epochs` times `images` images are shown.

    That is what an epoch means here, where a batch is most of the training set: cutting every epoch
    of 1,297 images into whole batches of 1,024 would throw 273 away each time, and other numbers at
    other batch sizes. Counting images keeps batch sizes comparable.
    """
    return max(1, round(epochs * images / batch))


def batches(images: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of `steps` batches, each of `batch` different images drawn at random.

    An image is thus seen once an epoch on average, and a batch of 1,024 is 1,024 different images.
    """
    if not 0 < batch <= images:
        raise ValueError(f"batch must lie in 1..{images} (the training images), not {batch}")
    for _ in range(steps):
        yield torch.randperm(images, generator=generator)[:batch]


def conv_block(layer: int, inputs: int, outputs: int) -> dict[str, nn.Module]:
    """Convolution, batch normalisation, ReLU, by name."""
    return {
        # Batch normalisation subtracts the mean: a bias in front of it would do nothing.
        f"conv{layer}": nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        f"bn{layer}": nn.BatchNorm2d(outputs),
        f"relu{layer}": nn.ReLU(inplace=True),
    }


def full_block(layer: int, inputs: int, outputs: int, dropout: float) -> dict[str, nn.Module]:
    """Fully connected layer, batch normalisation, ReLU, dropout, by name."""
    return {
        f"fc{layer}": nn.Linear(inputs, outputs, bias=False),
        f"bn{layer}": nn.BatchNorm1d(outputs),
        f"relu{layer}": nn.ReLU(inplace=True),
        f"drop{layer}": nn.Dropout(dropout),
    }


def small_alexnet_bn(width: int = 16, hidden: int = 128, dropout: float = 0.2) -> nn.Sequential:
    """AlexNet-BN at the size of a digit: (n, 1, 8, 8) images to (n, 10) logits.

    AlexNet's order and layer names are kept (conv1, pool, conv2, pool, conv3 to conv5, pool, fc6 to
    fc8), with batch normalisation after every layer but the last, and without the first pooling:
    8x8 images, unlike 224x224 ones, have no resolution to give away before conv2.
    """
    return nn.Sequential(
        OrderedDict(
            conv_block(1, 1, width)
            | conv_block(2, width, 2 * width)
            | {"pool2": nn.MaxPool2d(2)}
            | conv_block(3, 2 * width, 3 * width)
            | conv_block(4, 3 * width, 3 * width)
            | conv_block(5, 3 * width, 2 * width)
            | {"pool5": nn.MaxPool2d(2), "flatten": nn.Flatten()}
            | full_block(6, 2 * width * 2 * 2, hidden, dropout)
            | full_block(7, hidden, hidden, dropout)
            | {"fc8": nn.Linear(hidden, 10)}
        )
    )
