"""Where SGD settles on a made loss with a flat and a sharp minimum: equations 25 and 26.

The loss of one number w joins two parabolas smoothly, ℓ(w) = −τ log(e^(−f(w)/τ) + e^(−s(w)/τ))::

    f(w) = ½ h_flat (w + a)²               s(w) = ½ h_sharp (w − a)² − depth

An example is this loss tilted, ℓ(w) + ξw with E ξ = 0 and E ξ² = σ², so the gradient of B examples
is ∇ℓ plus noise of variance σ²/B. For γ → 0 the density that SGD settles into is e^(−ℓ/Θ) with the
temperature Θ = γσ²/(2B): it depends on γ and B by γ/B alone. Two kinds of tilt are run: Gaussian,
as the derivation assumes, and ±σ with equal chance, which is far from Gaussian for small B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from scipy import optimize, stats
from torch import Tensor

from lars_fused.study.order import mixed

TILTS = ("gaussian", "signs")


@dataclass(frozen=True)
class Wells:
    """The made loss.

    Attributes:
        flat, sharp: second derivatives at the two minima, at −a and +a.
        depth: how much lower the sharp minimum is.
        half_distance: a.
        softness: τ.
        sigma: σ.
    """

    flat: float = 1.0
    sharp: float = 16.0
    depth: float = 0.4
    half_distance: float = 0.75
    softness: float = 0.05
    sigma: float = 12.0

    def loss(self, w: Tensor) -> Tensor:
        """ℓ(w)."""
        f = 0.5 * self.flat * (w + self.half_distance).square()
        s = 0.5 * self.sharp * (w - self.half_distance).square() - self.depth
        return -self.softness * torch.logaddexp(-f / self.softness, -s / self.softness)

    def slope(self, w: Tensor) -> Tensor:
        """dℓ/dw: the slopes of the two parabolas, mixed by their shares of the sum."""
        left, right = w + self.half_distance, w - self.half_distance
        flat, sharp = self.flat * left, self.sharp * right
        higher = 0.5 * (flat * left - sharp * right) + self.depth
        return torch.lerp(flat, sharp, torch.sigmoid(higher / self.softness))

    @property
    def barrier(self) -> float:
        """The place between the minima where the loss is highest."""
        a = self.half_distance
        found = optimize.minimize_scalar(
            lambda w: -float(self.loss(torch.tensor(w))), bounds=(-a, a), method="bounded"
        )
        return float(found.x)

    def temperature(self, lr: float, batch: int) -> float:
        """Θ = γσ²/(2B)."""
        return lr * self.sigma**2 / (2 * batch)

    def lr(self, temperature: float, batch: int) -> float:
        """The γ that has this temperature at a batch size."""
        return 2 * batch * temperature / self.sigma**2

    def settled(self, temperature: float) -> float:
        """The share of e^(−ℓ/Θ), equation 25, on the flat side of the barrier."""
        w = torch.linspace(-30.0, 30.0, 600_001, dtype=torch.float64)
        density = torch.exp(-(self.loss(w) + self.depth) / temperature)
        return float(density[w < self.barrier].sum() / density.sum())

    def laplace(self, temperature: float, factor: float = 2.0) -> float:
        """The same by equation 26, P ∝ e^(−factor ℓ B/(γσ²)) / √h at each minimum.

        Equation 26 is printed with a factor of 1; by equation 25, from which it follows, it is 2.
        """
        flat = 1 / math.sqrt(self.flat)
        sharp = math.exp(factor * self.depth / (2 * temperature)) / math.sqrt(self.sharp)
        return flat / (flat + sharp)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def mean_tilt(
    wells: Wells, tilt: str, batch: int, chains: int, generator: torch.Generator
) -> Tensor:
    """The mean of ξ over the examples of a batch, drawn for each of `chains` runs."""
    if tilt == "gaussian":
        drawn = torch.empty(chains, dtype=torch.float64)
        return drawn.normal_(0.0, wells.sigma / math.sqrt(batch), generator=generator)
    heads = torch.randint(2, (batch, chains), generator=generator).sum(0)
    return (2.0 * heads.double() - batch) * (wells.sigma / batch)


def ended_flat(
    wells: Wells, lr: float, batch: int, *, tilt: str, chains: int, time: float, seed: int
) -> tuple[int, int]:
    """How many of `chains` runs of SGD end on the flat side, and how many steps each took.

    Half of them start in each minimum. All take time/γ steps, so that equal times are equal
    distances along the loss at any γ.
    """
    generator = torch.Generator().manual_seed(mixed(seed, batch, TILTS.index(tilt)))
    steps = math.ceil(time / lr)
    w = torch.full((chains,), wells.half_distance, dtype=torch.float64)
    w[: chains // 2] *= -1
    for _ in range(steps):
        w -= lr * (wells.slope(w) + mean_tilt(wells, tilt, batch, chains, generator))
    return int((w < wells.barrier).sum()), steps


def same_share(flat: Sequence[int], chains: int) -> float:
    """The probability of counts at least this unequal if all have one share (χ² test)."""
    table = [[count, chains - count] for count in flat]
    if len(table) < 2 or any(sum(column) == 0 for column in zip(*table, strict=True)):
        return 1.0
    return float(stats.chi2_contingency(table, correction=False).pvalue)
