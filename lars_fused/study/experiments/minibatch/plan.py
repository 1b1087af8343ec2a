"""The plan of the study: Algorithm 1 once for each metric, and the pruned runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lars_fused.study.errors import StudyError
from lars_fused.study.plans import StudyPlan
from lars_fused.study.settings import Settings

METRICS = {
    "intensity": "image intensity, dark to bright",
    "colour": "mean colour in HSV: hue, then saturation, then value",
    "edges": "Canny edges, few to many",
    "perceptual": "distance to the mean image, near to far",
}
"""Section 3.2 in its order; images are sorted by ascending score."""

ARMS = {
    "random": "random mini-batches",
    "sorted": "mini-batches of the four fixed orders, not pruned",
    "recommended": "the recommended mini-batches",
}
"""What `--prune` compares; "sorted" separates the pruning from the sorting."""


@dataclass(frozen=True)
class Plan(StudyPlan):
    """The whole study.

    Attributes:
        base: what all runs share: SGD, whose rate is divided by 10 after each third.
        metrics: names of `METRICS`.
        prune_seeds: runs of each arm of the pruning experiment; 0 leaves it out.
        features: digest of the file of weights whose features are compared; "" for the study's own.
    """

    metrics: tuple[str, ...]
    prune_seeds: int
    features: str

    def __post_init__(self) -> None:
        """Refuses unknown metrics."""
        for name in self.metrics:
            if name not in METRICS:
                raise StudyError(f"--metrics {name} is unknown; choose from {', '.join(METRICS)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise StudyError(f"--metrics {','.join(self.metrics)} names a metric twice")

    def _named(self, order: str, features: bool) -> str:
        return f"{order}:{self.features}" if features and self.features else order

    def comparison(self, metric: str) -> Settings:
        """Algorithm 1 in the order of a metric."""
        return replace(self.base, order=self._named(metric, metric == "perceptual"))

    def arm(self, name: str, seed: int) -> Settings:
        """A run of the pruning experiment; equal seeds begin with equal weights."""
        order = "" if name == "random" else self._named(name, features=True)
        return replace(self.base, order=order, seed=seed, evaluations=30)

    @property
    def own_features(self) -> Settings:
        """The run whose network sees the images, where no file of weights is given."""
        return replace(self.base, evaluations=1)

    def needs_features(self) -> bool:
        """Whether any part of the study sorts by perceptual distance."""
        return "perceptual" in self.metrics or self.prune_seeds > 0


def cut(order: Tensor, batch: int) -> list[Tensor]:
    """An order of images in ⌊N/m⌋ mini-batches, as 195 of CIFAR-10's 50,000 at m = 256.

    No image is left out: the N mod m images in excess make some mini-batches larger by one or more.
    """
    return list(order.tensor_split(max(1, len(order) // batch)))


def place(batches: int) -> Tensor:
    """Where in the order the middle of each mini-batch lies, from 0 to 1."""
    return (torch.arange(batches, dtype=torch.float64) + 0.5) / batches


def upper_quartile(batches: int) -> Tensor:
    """Which mini-batches lie in the upper quartile of the order."""
    return place(batches) >= 0.75


def middle(batches: int) -> Tensor:
    """Which mini-batches lie in the middle 80 percent of the order."""
    return (place(batches) - 0.5).abs() <= 0.4
