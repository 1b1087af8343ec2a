"""Labelled images, in memory or decoded when asked for, standardised on the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lars_fused.study.errors import StudyError

SHUFFLE_SEED = 2017
"""Fixed for subsets and validation splits: they are part of the data, not of a run's seed."""

Decode = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Images:
    """Images (n, channels, side, side), as float32 standardised by channel.

    Attributes:
        pixels: (n, channels, side, side) in memory, uint8 or float32; or a function that decodes
            the images of the given numbers, for a folder that is too big for memory.
        shape: (channels, height, width) of one image.
        index: the numbers, within `pixels`, of the images in this selection.
        mean, std: by channel; what comes out is (pixels − mean) / std.
    """

    pixels: Tensor | Decode
    shape: tuple[int, int, int]
    index: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def raw(self, chosen: Tensor) -> Tensor:
        """The chosen images as they are stored, in float32."""
        numbers = self.index[chosen]
        found = self.pixels[numbers] if isinstance(self.pixels, Tensor) else None
        if found is None:
            found = self.pixels(numbers.tolist())  # type: ignore[operator]
        return found.to(torch.float32)

    def take(self, chosen: Tensor) -> Tensor:
        """The chosen images, standardised; `chosen` counts within this selection, on the CPU."""
        return (self.raw(chosen) - self.mean[:, None, None]) / self.std[:, None, None]

    def subset(self, chosen: Tensor) -> Images:
        """A selection of this selection; nothing is copied."""
        return replace(self, index=self.index[chosen])


class Split(NamedTuple):
    """Images and their classes: int64, 0 to classes − 1."""

    images: Images
    labels: Tensor

    def subset(self, chosen: Tensor) -> Split:
        """The chosen images with their labels."""
        return Split(self.images.subset(chosen), self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A training and a test set with the names of the classes."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.train.images.shape


def in_memory(pixels: Tensor, resolution: int = 0) -> Images:
    """Unstandardised images from a tensor (n, channels, h, w), resampled to `resolution` if > 0."""
    if resolution and tuple(pixels.shape[-2:]) != (resolution, resolution):
        size = (resolution, resolution)
        pixels = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    channels, height, width = pixels.shape[1:]
    return Images(
        pixels,
        (channels, height, width),
        torch.arange(len(pixels)),
        torch.zeros(channels),
        torch.ones(channels),
    )


def standardised(name: str, train: Split, test: Split, classes: tuple[str, ...]) -> Data:
    """Data whose channels have mean 0 and deviation 1 over the training images.

    The statistics are taken over 10,000 training images at most, the same ones every time.
    """
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    some = torch.randperm(len(train), generator=generator)[:10_000]
    if isinstance(train.images.pixels, Tensor):
        sample = train.images.raw(some)
    else:
        sample = train.images.raw(some[:1_000])
    std, mean = torch.std_mean(sample.double(), (0, 2, 3))
    std = torch.where(std > 0, std, torch.ones_like(std))  # a constant channel stays constant
    std, mean = std.float(), mean.float()
    parts = [Split(replace(s.images, mean=mean, std=std), s.labels) for s in (train, test)]
    return Data(name, parts[0], parts[1], classes)


def in_unit_range(data: Data) -> Data:
    """The same data with pixels in [0, 1] instead of standardised.

    Bytes are divided by 255, other pixels by the largest of the training images.
    """
    pixels = data.train.images.pixels
    largest = 255.0
    if isinstance(pixels, Tensor) and pixels.dtype != torch.uint8:
        largest = float(pixels[data.train.images.index].max())
    zero = torch.zeros_like(data.train.images.mean)
    parts = [
        Split(replace(s.images, mean=zero, std=zero + largest), s.labels)
        for s in (data.train, data.test)
    ]
    return replace(data, train=parts[0], test=parts[1])


def first(data: Data, images: int) -> Data:
    """The same data with that many training images, drawn once and for all."""
    if images > len(data.train):
        raise StudyError(
            f"--train-images {images} is more than the {len(data.train):,} training images of "
            f"{data.name}"
        )
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    chosen = torch.randperm(len(data.train), generator=generator)[:images]
    return replace(data, train=data.train.subset(chosen))


def hold_out(data: Data, images: int) -> Data:
    """The same data with `images` training images in place of the test set.

    Hyper-parameters are chosen on these, so that the test images play no part in the choice.
    """
    if not 0 < images < len(data.train):
        raise StudyError(
            f"--validation {images} is not allowed: {data.name} has {len(data.train):,} training "
            f"images, of which 1 to {len(data.train) - 1:,} can be held out"
        )
    generator = torch.Generator().manual_seed(SHUFFLE_SEED + 1)
    order = torch.randperm(len(data.train), generator=generator)
    return replace(
        data, train=data.train.subset(order[images:]), test=data.train.subset(order[:images])
    )
