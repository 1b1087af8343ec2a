"""What the text reads from Figures 1 to 4, put to the test as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lars_fused.study.experiments.minibatch.compare import Distances
from lars_fused.study.experiments.minibatch.plan import middle, place, upper_quartile


def relative(total: Tensor) -> Tensor:
    """D(e, k) over its mean in each epoch: gradients shrink in training, and D with them."""
    return total / total.mean(1, keepdim=True)


@dataclass(frozen=True)
class Claim:
    """One sentence of the text about one metric and one phase.

    Attributes:
        metric, phase: of what it speaks; phases are counted from 1.
        text: that some mini-batches are nearer to the full gradient than the others.
        ratio: mean relative distance of those mini-batches over that of the others; below 1 agrees.
        epochs: the share of the phase's epochs in which it is below 1.
    """

    metric: str
    phase: int
    text: str
    ratio: float
    epochs: float

    @property
    def held(self) -> bool:
        """Whether the measured distances agree, averaged over the phase."""
        return self.ratio < 1.0


UPPER = "the upper quartile is nearer than the rest"
OUTER = "outside the middle 80 % is nearer than inside"
INNER = "the middle 80 % is nearer than the extremes"

FIRST_PHASE = {"intensity": UPPER, "colour": OUTER, "edges": INNER, "perceptual": UPPER}
"""Section 5 about the first phase; about the later phases it says `INNER` of all metrics."""


def nearer(text: str, batches: int) -> Tensor:
    """Which mini-batches a claim calls nearer than the others."""
    if text == UPPER:
        return upper_quartile(batches)
    inner = middle(batches)
    return inner if text == INNER else ~inner


def claims(metric: str, distances: Distances) -> list[Claim]:
    """What the text says of a metric, phase by phase, and what was measured."""
    shares = relative(distances.total)
    found = []
    for number, phase in enumerate(distances.phases(), 1):
        text = FIRST_PHASE[metric] if number == 1 else INNER
        rows, group = shares[list(phase)], nearer(text, shares.shape[1])
        if not group.any() or group.all():
            continue  # too few mini-batches to tell apart
        by_epoch = rows[:, group].mean(1) / rows[:, ~group].mean(1)
        overall = float(rows[:, group].mean() / rows[:, ~group].mean())
        found.append(Claim(metric, number, text, overall, float((by_epoch < 1).double().mean())))
    return found


def quarters(distances: Distances) -> list[list[float]]:
    """For each phase the mean relative distance of each quarter of the order."""
    shares = relative(distances.total)
    quarter = (place(shares.shape[1]) * 4).long()
    return [
        [float(shares[list(phase)][:, quarter == q].mean()) for q in range(4)]
        for phase in distances.phases()
    ]


def extremes(distances: Distances) -> list[float]:
    """For each phase the mean relative distance outside the middle 80 % over that inside."""
    shares, inner = relative(distances.total), middle(distances.layers.shape[1])
    return [
        float(shares[list(p)][:, ~inner].mean() / shares[list(p)][:, inner].mean())
        for p in distances.phases()
    ]


def by_layer(distances: Distances) -> list[Tensor]:
    """For each phase and tensor the distance of each mini-batch over their mean; (L, K)."""
    mean = distances.layers.mean(1, keepdim=True)
    shares = distances.layers / torch.where(mean > 0, mean, torch.ones_like(mean))
    return [shares[list(phase)].mean(0).T for phase in distances.phases()]
