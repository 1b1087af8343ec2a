"""The plan of the study: networks trained at several batch sizes, and what is measured of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lars_fused.study.errors import StudyError
from lars_fused.study.plans import StudyPlan
from lars_fused.study.settings import Settings

OPTIMIZERS = ("adam", "sgd", "lars")
MATRICES = ("identity", "random")
PATHS = ("linear", "sine")


@dataclass(frozen=True)
class Plan(StudyPlan):
    """The whole study.

    Attributes:
        base: what all runs share.
        rates: the learning rate of each optimizer, at the smallest batch.
        batches: ascending.
        seeds: runs of each optimizer at each batch size.
        epsilons: sizes of the box.
        columns: p of a random A for the networks.
        images: training images over which f is the mean; 0 for all.
        iterations: of L-BFGS-B, from the middle of the box and from one corner.
        points: places along a path, from α = −1 to 2.
        draws: of a random A, for Table 1.
    """

    rates: dict[str, float]
    batches: tuple[int, ...]
    seeds: int
    epsilons: tuple[float, ...]
    columns: int
    images: int
    iterations: int
    points: int
    draws: int

    def __post_init__(self) -> None:
        """Refuses what cannot be compared."""
        for name in self.rates:
            if name not in OPTIMIZERS:
                raise StudyError(
                    f"--optimizers {name} is unknown; choose from {', '.join(OPTIMIZERS)}"
                )
        if len(self.batches) < 2:
            raise StudyError("--batches needs a small and a large batch size to compare")

    def settings(self, optimizer: str, batch: int, seed: int) -> Settings:
        """Of a run."""
        return replace(
            self.base,
            optimizer=optimizer,
            lr=self.rates[optimizer],
            base_batch=self.batches[0],
            batch=batch,
            seed=seed,
        )

    def series(self) -> list[Series]:
        """The independent parts."""
        return [Series(self, name, seed) for seed in range(self.seeds) for name in self.rates]

    def boxes(self) -> list[Box]:
        """Every kind of sharpness that is measured of every network."""
        return [
            Box(matrix, epsilon, self.columns, self.images, self.iterations)
            for matrix in MATRICES
            for epsilon in self.epsilons
        ]

    @property
    def alphas(self) -> list[float]:
        """Places along a path; 0 and 1 are always among them."""
        even = [round(-1.0 + 3.0 * i / (self.points - 1), 6) for i in range(self.points)]
        return sorted({*even, 0.0, 1.0})


@dataclass(frozen=True)
class Series:
    """An optimizer with one seed, at all batch sizes: what a path joins lies in one series."""

    plan: Plan
    optimizer: str
    seed: int

    @property
    def runs(self) -> list[Settings]:
        """From the largest batch, which takes the fewest steps, to the smallest."""
        batches = reversed(self.plan.batches)
        return [self.plan.settings(self.optimizer, batch, self.seed) for batch in batches]

    @property
    def ends(self) -> tuple[Settings, Settings]:
        """The runs of the smallest and the largest batch: x_s and x_l."""
        return self.runs[-1], self.runs[0]


@dataclass(frozen=True)
class Box:
    """A kind of sharpness; `columns` matters for a random A alone."""

    matrix: str
    epsilon: float
    columns: int
    images: int
    iterations: int
