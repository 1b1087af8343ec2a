"""Accuracy against batch size for SGD and LARS: Tables 1, 3, 4 and 5, Figures 1 and 3 in small.

A cell is a method at a batch size. Its learning rate is chosen on held-out training images over
a grid that is stated beforehand and has as many points for every method; then it trains on all
training images with several seeds, and only then the test set is looked at. At the largest batch
it also trains for more epochs, at the same rate. Cells need nothing of one another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lars_fused.study import runs
from lars_fused.study.errors import StudyError
from lars_fused.study.plans import StudyPlan
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

TUNING_SEED = 1000
"""The first seed of the tuning runs: none that a final run uses."""


@dataclass(frozen=True)
class Method:
    """An optimizer with its rule for the learning rate."""

    label: str
    optimizer: str
    scaling: str
    warmup: bool


METHODS = {
    "sgd-linear": Method("SGD, linear scaling", "sgd", "linear", False),
    "sgd-warmup": Method("SGD, linear scaling and warm-up", "sgd", "linear", True),
    "lars": Method("LARS with warm-up", "lars", "none", True),
    "lars-no-warmup": Method("LARS without warm-up", "lars", "none", False),
}


@dataclass(frozen=True)
class Plan(StudyPlan):
    """The whole study.

    Attributes:
        base: what all runs share; its lr, batch, seed and optimizer are not used.
        methods: names of `METHODS`.
        batches: ascending.
        sgd_grid: rates at the smallest batch, scaled linearly to the others.
        lars_grid: rates for every batch, with the paper's η = 0.001: it found no rule for them.
        seeds: final runs of a cell.
        tuning_seeds: runs for each point of the grid.
        validation: training images held out while a rate is chosen.
        warmup_epochs: of the methods with warm-up.
        longer: multiples of the epochs, at the largest batch.
    """

    methods: tuple[str, ...]
    batches: tuple[int, ...]
    sgd_grid: tuple[float, ...]
    lars_grid: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    validation: int
    warmup_epochs: float
    longer: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses an unfair comparison."""
        if len(self.sgd_grid) != len(self.lars_grid):
            raise StudyError(
                f"--sgd-grid has {len(self.sgd_grid)} rates and --lars-grid {len(self.lars_grid)}: "
                "the methods are compared only if they are tuned alike"
            )
        for method in self.methods:
            if method not in METHODS:
                raise StudyError(f"--methods {method} is unknown; choose from {', '.join(METHODS)}")

    def cells(self) -> list[Cell]:
        """The independent parts: large batches, which take the fewest steps, first."""
        pairs = product(reversed(self.batches), self.methods)
        return [Cell(self, method, batch) for batch, method in pairs]


@dataclass(frozen=True)
class Cell:
    """A method at a batch size."""

    plan: Plan
    method: str
    batch: int

    @property
    def grid(self) -> tuple[float, ...]:
        """The rates to choose from, as `Settings.lr` has them."""
        lars = METHODS[self.method].optimizer == "lars"
        return self.plan.lars_grid if lars else self.plan.sgd_grid

    def settings(self, lr: float, seed: int, **others: Any) -> Settings:
        """Of a run of this cell."""
        method = METHODS[self.method]
        return replace(
            self.plan.base,
            optimizer=method.optimizer,
            scaling=method.scaling,
            base_batch=self.plan.batches[0],
            lr=lr,
            batch=self.batch,
            warmup_epochs=self.plan.warmup_epochs if method.warmup else 0.0,
            seed=seed,
            **others,
        )

    def tuning(self, images: int) -> list[list[Settings]]:
        """For every rate of the grid its runs; `images` is the size of the training set."""
        batch = min(self.batch, images - self.plan.validation)
        seeds = range(TUNING_SEED, TUNING_SEED + self.plan.tuning_seeds)
        kept: list[list[Settings]] = []
        for lr in self.grid:
            # The rate that belongs to the cell's batch, also where a few images fewer are left.
            peak = self.settings(lr, 0).peak_lr
            kept.append(
                [
                    replace(
                        self.settings(peak, seed, validation=self.plan.validation, evaluations=1),
                        scaling="none",
                        batch=batch,
                    )
                    for seed in seeds
                ]
            )
        return kept

    def final(self, lr: float) -> list[Settings]:
        """The runs that are reported."""
        return [self.settings(lr, seed) for seed in range(self.plan.seeds)]

    def longer(self, lr: float) -> dict[float, list[Settings]]:
        """At the largest batch, by epochs, the runs that train for longer."""
        if self.batch != self.plan.batches[-1]:
            return {}
        found = {}
        for times in self.plan.longer:
            epochs = times * self.plan.base.epochs
            found[epochs] = [replace(s, epochs=epochs) for s in self.final(lr)]
        return found


def chosen(tuned: list[list[Result]]) -> int:
    """The point of the grid with the best mean accuracy; of equals the one with the lower loss."""

    def quality(results: list[Result]) -> tuple[float, float]:
        losses = [r.history.evaluations[-1]["test_loss"] for r in results]
        loss = statistics.mean(losses)
        return statistics.mean(r.accuracy for r in results), -loss if loss == loss else -1e300

    return max(range(len(tuned)), key=lambda i: quality(tuned[i]))


@dataclass(frozen=True)
class Outcome:
    """What the finished runs of a cell say; lists are by seed."""

    cell: Cell
    tuned: list[list[Result]]
    best: int
    final: list[Result]
    longer: dict[float, list[Result]]

    @property
    def lr(self) -> float:
        """The chosen rate, at the cell's batch."""
        return self.final[0].settings.peak_lr

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or last of its grid: a wider one might do better."""
        return self.best in (0, len(self.cell.grid) - 1)

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy by seed."""
        return [result.accuracy for result in self.final]


def complete(
    cell: Cell, images: int, trained: Callable[[Settings], Result | None]
) -> Outcome | None:
    """All runs of a cell, in order, by way of `trained`; None when one of them is missing."""

    def every(settings: list[Settings]) -> list[Result]:
        return [result for s in settings if (result := trained(s)) is not None]

    tuned = [every(settings) for settings in cell.tuning(images)]
    if any(len(results) < cell.plan.tuning_seeds for results in tuned):
        return None
    best = chosen(tuned)
    lr = cell.grid[best]
    final = every(cell.final(lr))
    longer = {epochs: every(settings) for epochs, settings in cell.longer(lr).items()}
    if any(len(results) < cell.plan.seeds for results in (final, *longer.values())):
        return None
    return Outcome(cell, tuned, best, final, longer)


def finished(plan: Plan, images: int, out: Path) -> list[Outcome]:
    """The cells of which every run is there."""
    found = (complete(c, images, lambda s: runs.find(out, s)) for c in plan.cells())
    return [outcome for outcome in found if outcome is not None]
