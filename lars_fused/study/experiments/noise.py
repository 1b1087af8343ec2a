"""The noise scale g = γ(N/B − 1) and the batch sizes at which SGD does best.

Smith and Le, "A Bayesian Perspective on Generalization and Stochastic Gradient Descent",
arXiv:1710.06451, by way of a lecture's section 5 (equation 24, Figures 10 and 11): at a fixed rate
the test accuracy has its best value at a batch size in proportion to γ and to N.

Runs of one curve differ in B alone: they take the same number of steps at the same constant rate,
so that all travel equally far. With equal epochs instead, a large batch would take fewer steps, and
its accuracy would fall for that reason.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.wells import TILTS, Wells
from lars_fused.study.plans import StudyPlan
from lars_fused.study.settings import Settings

RESAMPLES = 400


def noise_scale(lr: float, images: int, batch: int, momentum: float = 0.0) -> float:
    """Equation 24, γ(N/B − 1); momentum μ multiplies the rate by 1/(1 − μ)."""
    return lr / (1.0 - momentum) * (images / batch - 1.0)


@dataclass(frozen=True)
class WellCell:
    """Runs of SGD on the made loss at one temperature, kind of tilt and batch size."""

    tilt: str
    temperature: float
    batch: int


@dataclass(frozen=True)
class Plan(StudyPlan):
    """The whole study; `base` is what all training runs share, with γ of the sweep over N.

    Attributes:
        lrs: rates of the sweep over γ, at N = all images of the base.
        batches: ascending; those above N are left out of its curve.
        sizes: training-set sizes of the sweep over N, at the base's rate.
        steps: of every training run.
        seeds: runs of a point.
        examples: training images whose gradients are measured one by one.
        measured_at: shares of a run of the base at which its gradient noise is measured.
        small, pieces, updates, repeats: of `NoiseScale` there, as `noise_measure.estimated`.
        wells: the made loss.
        temperatures: γσ²/(2B) on it; ±σ tilts are run at the first alone.
        well_batches, chains, time: batch sizes, runs of each, and γ times their steps.
    """

    lrs: tuple[float, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: int
    seeds: int
    examples: int
    measured_at: tuple[float, ...]
    small: int
    pieces: int
    updates: int
    repeats: int
    wells: Wells
    temperatures: tuple[float, ...]
    well_batches: tuple[int, ...]
    chains: int
    time: float

    def __post_init__(self) -> None:
        """Refuses what no run could use, by the name of its option."""
        for name in ("steps", "seeds", "examples", "small", "updates"):
            if getattr(self, name) < 1:
                raise StudyError(f"--{name} {getattr(self, name)} is not allowed: at least 1")
        for name in ("pieces", "repeats"):
            if getattr(self, name) < 2:
                raise StudyError(f"--{name} {getattr(self, name)} is not allowed: at least 2")
        if self.chains < 2 or self.time <= 0:
            raise StudyError("--chains must be at least 2, and --time positive")

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Plan:
        """What `as_dict` made, through JSON."""
        return super().from_dict(saved | {"wells": Wells(**saved["wells"])})

    def settings(self, lr: float, size: int, batch: int, seed: int, images: int) -> Settings:
        """Of a run on `size` of the base's `images` training images."""
        return replace(
            self.base,
            lr=lr,
            train_images=self.base.train_images if size == images else size,
            batch=batch,
            epochs=self.steps * batch / size,
            seed=seed,
        )

    def point(self, lr: float, size: int, batch: int, images: int) -> list[Settings]:
        """The runs of one point of a curve."""
        return [self.settings(lr, size, batch, seed, images) for seed in range(self.seeds)]

    def curves(self, images: int) -> list[tuple[float, int]]:
        """(γ, N) of every curve, none twice."""
        wanted = [(lr, images) for lr in self.lrs] + [(self.base.lr, n) for n in self.sizes]
        return list(dict.fromkeys(wanted))

    def runs(self, images: int) -> list[Settings]:
        """Every training run, none twice."""
        return [
            settings
            for lr, size in self.curves(images)
            for batch in self.batches
            if batch <= size
            for settings in self.point(lr, size, batch, images)
        ]

    def well_cells(self) -> list[WellCell]:
        """Every cell on the made loss."""
        return [
            WellCell(tilt, temperature, batch)
            for tilt in TILTS
            for temperature in self.temperatures[: None if tilt == "gaussian" else 1]
            for batch in self.well_batches
        ]


@dataclass(frozen=True)
class Curve:
    """Test accuracy against batch size at one γ and N: lists by batch, then by seed."""

    lr: float
    size: int
    batches: tuple[int, ...]
    accuracies: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Best:
    """The best batch size of a curve.

    Attributes:
        batch: the vertex of the parabola in log B through the best mean and its neighbours.
        low, high: 16 % and 84 % of the same over resampled seeds.
        at_edge: whether the best mean is at the first or last batch: then it is no maximum.
        enough: the smallest batch that is as good as the best one, within two standard errors.
    """

    batch: float
    low: float
    high: float
    at_edge: bool
    enough: int


def vertex(batches: Sequence[int], accuracies: Sequence[float]) -> float:
    """Where the parabola in log2 B through the highest point and its two neighbours is highest."""
    top = max(range(len(batches)), key=lambda i: accuracies[i])
    if top in (0, len(batches) - 1):
        return float(batches[top])
    (x0, x1, x2) = (math.log2(batches[i]) for i in (top - 1, top, top + 1))
    (y0, y1, y2) = (accuracies[i] for i in (top - 1, top, top + 1))
    rise, fall = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if rise == fall:
        return float(batches[top])
    # Slopes at the middles of the two intervals; the parabola's slope is linear between them.
    left, right = (x0 + x1) / 2, (x1 + x2) / 2
    return float(2.0 ** (left + (right - left) * rise / (rise - fall)))


def best(curve: Curve) -> Best:
    """The best batch size, with what the seeds leave open."""
    means = [statistics.mean(seeds) for seeds in curve.accuracies]
    top = max(range(len(means)), key=lambda i: means[i])
    draw = random.Random(0)
    again = sorted(
        vertex(
            curve.batches,
            [statistics.mean(draw.choices(seeds, k=len(seeds))) for seeds in curve.accuracies],
        )
        for _ in range(RESAMPLES)
    )
    variances = [statistics.variance(s) if len(s) > 1 else 0.0 for s in curve.accuracies]
    count = len(curve.accuracies[top])
    errors = [math.sqrt((variances[top] + v) / count) for v in variances]
    enough = next(
        b for b, m, e in zip(curve.batches, means, errors, strict=True) if m >= means[top] - 2 * e
    )
    return Best(
        vertex(curve.batches, means),
        again[round(0.16 * (RESAMPLES - 1))],
        again[round(0.84 * (RESAMPLES - 1))],
        top in (0, len(means) - 1),
        enough,
    )


@dataclass(frozen=True)
class Fit:
    """log B = log k + s log x by least squares, and B = k x for s = 1.

    Attributes:
        points: how many.
        factor: k of the line through the origin, the geometric mean of B/x.
        exponent, error: s and its standard error; NaN with fewer than 2 (3) points.
    """

    points: int
    factor: float
    exponent: float
    error: float


def fit(x: Sequence[float], batches: Sequence[float]) -> Fit | None:
    """The fitted line; None without a point."""
    if not x:
        return None
    u, v = [math.log(value) for value in x], [math.log(b) for b in batches]
    factor = math.exp(statistics.mean(b - a for a, b in zip(u, v, strict=True)))
    if len(set(u)) < 2:
        return Fit(len(x), factor, math.nan, math.nan)
    slope, level = statistics.linear_regression(u, v)
    if len(x) < 3:
        return Fit(len(x), factor, slope, math.nan)
    middle = statistics.mean(u)
    left = sum((b - level - slope * a) ** 2 for a, b in zip(u, v, strict=True)) / (len(x) - 2)
    return Fit(len(x), factor, slope, math.sqrt(left / sum((a - middle) ** 2 for a in u)))
