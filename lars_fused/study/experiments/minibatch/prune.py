"""Does it train faster on the mini-batches that the text recommends?

Its second conclusion, for the first phase: mini-batches of the upper quartile of intensity and of
perceptual distance alone. Its first, afterwards: no mini-batch from either end, beyond the middle
80 percent, of any of the four orders. Each step draws from what is allowed; all arms take as many
steps, with mini-batches of the same size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lars_fused.study.experiments.minibatch.plan import cut, middle, upper_quartile
from lars_fused.study.order import mixed
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

EARLY = ("intensity", "perceptual")
_DRAWS = 3
"""A kind of random number of its own, beside those of the training loop."""


class Drawn:
    """Mini-batches drawn from a pool for each phase: all of a pool once, then all again.

    Args:
        pools: of each phase, the mini-batches allowed in it.
        ends: the share of the run at which each phase ends; the last is 1.
        total: steps of the run.
        seed: of the draws.
    """

    def __init__(
        self, pools: Sequence[Sequence[Tensor]], ends: Sequence[float], total: int, seed: int
    ):
        self.pools, self.ends, self.total, self.seed = pools, ends, total, seed

    def steps(self, epochs: float) -> int:
        """As many as the run with random mini-batches has."""
        return self.total

    def phase(self, step: int) -> int:
        """The phase of a step, from 0: the rate changes where the phase does."""
        return sum(step / self.total >= end for end in self.ends[:-1])

    def chosen(self, step: int) -> Tensor:
        """The images of a step, counted from 0."""
        pool = self.pools[self.phase(step)]
        turn, place = divmod(step, len(pool))
        generator = torch.Generator().manual_seed(mixed(self.seed, turn, _DRAWS))
        shuffle = torch.randperm(len(pool), generator=generator)
        return pool[int(shuffle[place])]


def allowed(orders: Mapping[str, Tensor], batch: int, arm: str, phase: int) -> list[Tensor]:
    """The mini-batches of an arm in a phase, counted from 0, each of `batch` images."""
    found = []
    for metric, order in orders.items():
        batches = [b[:batch] for b in cut(order, batch)]
        keep = torch.ones(len(batches), dtype=torch.bool)
        if arm == "recommended":
            early = upper_quartile(len(batches)) & (metric in EARLY)
            keep = early if phase == 0 else middle(len(batches))
        found += [b for b, kept in zip(batches, keep, strict=True) if kept]
    return found


def order_of(
    arm: str, settings: Settings, orders: Mapping[str, Tensor], total: int
) -> Drawn | None:
    """What decides the mini-batches of an arm; None leaves it to one shuffle an epoch."""
    if arm == "random":
        return None
    ends = [*settings.milestones, 1.0]
    pools = [allowed(orders, settings.batch, arm, phase) for phase in range(len(ends))]
    return Drawn(pools, ends, total, settings.seed)


@dataclass(frozen=True)
class Verdict:
    """An arm against random mini-batches, seed by seed.

    Attributes:
        arm: a name of `ARMS`.
        final: the differences in final test accuracy, in points; one for each seed.
        average: the differences of its mean over the run's evaluations: how fast it rose.
    """

    arm: str
    final: list[float]
    average: list[float]

    def interval(self, differences: Sequence[float]) -> tuple[float, float, float]:
        """Mean difference and its 95 % interval by Student's t; infinite with a single seed."""
        from scipy import stats

        n, mean = len(differences), statistics.mean(differences)
        if n < 2:
            return mean, -math.inf, math.inf
        error = statistics.stdev(differences) / math.sqrt(n)
        reach = float(stats.t.ppf(0.975, n - 1)) * error
        return mean, mean - reach, mean + reach

    def sentence(self) -> str:
        """Plainly: faster, slower, or neither."""
        mean, low, high = self.interval(self.average)
        last, last_low, last_high = self.interval(self.final)
        word = "FASTER" if low > 0 else "SLOWER" if high < 0 else "NOT FASTER"
        why = "" if low > 0 or high < 0 else " (the interval holds 0)"
        end = "higher" if last_low > 0 else "lower" if last_high < 0 else "not different"
        return (
            f"{word}: the mean test accuracy over the run differs by {mean:+.2f} points, "
            f"95 % interval {low:+.2f} to {high:+.2f}{why}; at the end it is {end} "
            f"({last:+.2f}, {last_low:+.2f} to {last_high:+.2f})"
        )


def average_accuracy(result: Result) -> float:
    """Test accuracy averaged over the evaluations of a run, which lie at equal distances."""
    return statistics.mean(e["test_accuracy"] for e in result.history.evaluations)


def verdict(arm: str, ours: Sequence[Result], random: Sequence[Result]) -> Verdict:
    """Compare runs of equal seeds, which began with the same weights."""
    pairs = list(zip(ours, random, strict=True))
    return Verdict(
        arm,
        [a.accuracy - b.accuracy for a, b in pairs],
        [average_accuracy(a) - average_accuracy(b) for a, b in pairs],
    )


def steps_to(result: Result, accuracy: float) -> int | None:
    """The first evaluated step at which test accuracy is reached; None if it never is."""
    for evaluation in result.history.evaluations:
        if evaluation["test_accuracy"] >= accuracy:
            return evaluation["step"]
    return None
