"""Which images a step takes: one shuffle an epoch, cut into batches without a remainder.

The shuffled epochs follow one another like one long tape, of which step t takes the places tB to
(t+1)B. Every image is shown exactly once an epoch at any batch size; only a batch that reaches over
the end of an epoch can hold an image twice. Cutting each epoch by itself would drop up to B − 1
images an epoch: with a batch of 1,024 out of 1,297, a fifth of the training set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lars_fused.study.errors import StudyError
from lars_fused.study.settings import Settings


def steps_for(epochs: float, batch: int, images: int) -> int:
    """Steps in which `epochs` times `images` images are shown, rounded; at least one."""
    return max(1, round(epochs * images / batch))


def warmup_steps(settings: Settings, images: int) -> int:
    """Steps of warm-up; at least one is left to train at the full rate."""
    steps = steps_for(settings.epochs, settings.batch, images)
    if not settings.warmup_epochs:
        return 0
    return min(steps_for(settings.warmup_epochs, settings.batch, images), steps - 1)


class Batches(Protocol):
    """Which images each step takes, and how many steps there are."""

    def steps(self, epochs: float) -> int:
        """The steps of so many epochs."""

    def chosen(self, step: int) -> Tensor:
        """The images of a step, counted from 0."""


class Fixed:
    """The same mini-batches in the same order in every epoch."""

    def __init__(self, batches: Sequence[Tensor]):
        self.batches = list(batches)

    def steps(self, epochs: float) -> int:
        """Whole passes over the mini-batches, rounded to steps."""
        return max(1, round(epochs * len(self.batches)))

    def chosen(self, step: int) -> Tensor:
        """The images of a step, counted from 0."""
        return self.batches[step % len(self.batches)]


class Order:
    """The places of a tape of shuffled epochs; the seed alone decides them."""

    def __init__(self, images: int, batch: int, seed: int):
        if not 0 < batch <= images:
            raise StudyError(
                f"--batch {batch:,} is larger than the {images:,} training images there are"
            )
        self.images, self.batch, self.seed = images, batch, seed
        self._shuffles: dict[int, Tensor] = {}

    def shuffle(self, epoch: int) -> Tensor:
        """The permutation of an epoch, counted from 0."""
        if epoch not in self._shuffles:
            # Seeds of neighbouring runs and epochs must not coincide.
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch, 0))
            kept = {e: s for e, s in self._shuffles.items() if e == epoch - 1}
            self._shuffles = kept | {epoch: torch.randperm(self.images, generator=generator)}
        return self._shuffles[epoch]

    def steps(self, epochs: float) -> int:
        """Steps in which every image is shown `epochs` times."""
        return steps_for(epochs, self.batch, self.images)

    def chosen(self, step: int) -> Tensor:
        """The images of a step, counted from 0, in the order of the tape."""
        first, end = step * self.batch, (step + 1) * self.batch
        epochs = range(first // self.images, math.ceil(end / self.images))
        tape = torch.cat([self.shuffle(epoch) for epoch in epochs])
        start = first - epochs[0] * self.images
        return tape[start : start + self.batch]


def mixed(seed: int, step: int, piece: int) -> int:
    """A seed of its own for each piece of each step (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + piece * 0x94D049BB133111EB) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) & (mask >> 1)


def pieces(chosen: Tensor, micro_batch: int, ranks: int = 1) -> list[Tensor]:
    """A step's images in micro-batches of nearly equal size, at least one for each rank."""
    size = min(micro_batch or len(chosen), math.ceil(len(chosen) / ranks))
    return list(chosen.tensor_split(math.ceil(len(chosen) / size)))


def share(count: int, rank: int, ranks: int) -> range:
    """The pieces of one rank: neighbours, so that the ranks in order give the whole batch."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)
