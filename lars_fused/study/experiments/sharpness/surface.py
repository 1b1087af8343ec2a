"""A network's loss as a function of one long vector, and its values along a path of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused.study.data import Split
from lars_fused.study.evaluation import evaluated, pieces_of
from lars_fused.study.experiments.sharpness.subspace import Vector

Weights = Mapping[str, Tensor]
CPU = torch.device("cpu")


class Surface:
    """f(x): the mean loss over some images, x being all parameters one after another.

    The network is in evaluation mode, as it is when it is used: dropout is off, and batch
    normalisation keeps the statistics of its training.

    Args:
        network: whose parameters are set; its values at the start are x.
        split: the images, all of which count in every evaluation.
    """

    def __init__(self, network: nn.Module, split: Split):
        self.network, self.split = network.eval(), split
        self.parameters = list(network.parameters())
        self.start: Vector = self._flat([p.detach() for p in self.parameters])

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Vector:
        return torch.cat([t.flatten() for t in tensors]).double().numpy()

    def place(self, x: Vector) -> None:
        """Set the network's parameters."""
        sizes = [p.numel() for p in self.parameters]
        parts = torch.split(torch.from_numpy(np.asarray(x)), sizes)
        with torch.no_grad():
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    def __call__(self, x: Vector) -> tuple[float, Vector]:
        """The loss and its gradient."""
        self.place(x)
        total = 0.0
        sums = [torch.zeros_like(p) for p in self.parameters]
        for images, labels in pieces_of(self.split):
            loss = F.cross_entropy(self.network(images), labels, reduction="sum")
            torch._foreach_add_(sums, torch.autograd.grad(loss, self.parameters))
            total += float(loss.detach())
        return total / len(self.split), self._flat(sums) / len(self.split)


@dataclass(frozen=True)
class Point:
    """A place on the path from the small-batch to the large-batch solution."""

    alpha: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def coefficients(path: str, alpha: float) -> tuple[float, float]:
    """The shares of x_s and x_l: (1 − α, α), or (cos απ/2, sin απ/2)."""
    if path == "linear":
        return 1.0 - alpha, alpha
    # Exact at the ends, which a rounded π/2 is not.
    if alpha in (0.0, 1.0):
        return 1.0 - alpha, alpha
    return math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)


def between(small: Weights, large: Weights, path: str, alpha: float) -> dict[str, Tensor]:
    """The weights at α; buffers, which no average describes, are those of the nearer end."""
    of_small, of_large = coefficients(path, alpha)
    nearer = small if alpha < 0.5 else large
    return {
        name: of_small * w + of_large * large[name]
        if w.is_floating_point() and "running" not in name
        else nearer[name].clone()
        for name, w in small.items()
    }  # fmt: skip


@torch.no_grad()
def renew_statistics(network: nn.Module, split: Split) -> None:
    """Batch normalisation's mean and variance, anew from the given images in evaluation order."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the average over all that follow
        layer.train()
    for images, _ in pieces_of(split):
        network(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def along(
    network: nn.Module,
    ends: tuple[Weights, Weights],
    path: str,
    alphas: list[float],
    splits: tuple[Split, Split],
) -> list[Point]:
    """Figure 5: losses and accuracies along a path.

    At α = 0 and 1 the networks are as they were trained. In between and beyond, the statistics of
    batch normalisation are taken anew from the training images: those of neither end fit.

    Args:
        network: of the kind of both ends; its weights are overwritten.
        ends: weights and buffers of the small-batch and the large-batch solution.
        path: "linear" or "sine".
        alphas: places.
        splits: training and test images.
    """
    network.eval()
    found = []
    for alpha in alphas:
        network.load_state_dict(between(*ends, path, alpha))
        if alpha not in (0.0, 1.0):
            renew_statistics(network, splits[0])
        train, test = (evaluated(network, split, CPU) for split in splits)
        found.append(Point(alpha, *train, *test))
    return found
