"""The four functions of Figure 6 and Table 1 of the notes, as printed and as measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from lars_fused.study.experiments.sharpness.maximise import Function, sharpness
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns, Vector

TIGHT = 50
"""Iterations of L-BFGS-B: these functions cost nothing."""


def power_sum(coefficients: tuple[float, ...], powers: tuple[int, ...]) -> Function:
    """f(x) = Σ cᵢ xᵢ^kᵢ with its gradient."""
    c, k = np.array(coefficients), np.array(powers)

    def function(x: Vector) -> tuple[float, Vector]:
        return float((c * x**k).sum()), c * k * x ** (k - 1)

    return function


FUNCTIONS: dict[str, tuple[Function, int, str]] = {
    "6a": (power_sum((100.0,), (2,)), 1, "100x²"),
    "6b": (power_sum((1.0,), (8,)), 1, "x⁸"),
    "6c": (power_sum((100.0, 100.0), (2, 2)), 2, "100(x² + y²)"),
    "6d": (power_sum((100.0, 1.0), (2, 8)), 2, "100x² + y⁸"),
}
"""By figure: the function, its dimensions, its formula. All have their minimum, 0, at 0."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1; `printed` is φ as it stands there, with its two digits."""

    figure: str
    random: bool
    epsilon: float
    printed: str


TABLE_1 = (
    Row("6a", False, 0.0010, "1.0e-02"),
    Row("6b", False, 0.0010, "1.0e-22"),
    Row("6a", False, 0.0005, "2.5e-03"),
    Row("6b", False, 0.0005, "3.9e-25"),
    Row("6a", True, 0.0010, "2.8e-03"),
    Row("6b", True, 0.0010, "6.5e-25"),
    Row("6a", True, 0.0005, "7.1e-04"),
    Row("6b", True, 0.0005, "2.5e-27"),
    Row("6c", False, 0.0010, "2.0e-02"),
    Row("6d", False, 0.0010, "1.0e-02"),
    Row("6c", False, 0.0005, "5.0e-03"),
    Row("6d", False, 0.0005, "2.5e-03"),
    Row("6c", True, 0.0010, "2.1e-02"),
    Row("6d", True, 0.0010, "1.9e-02"),
    Row("6c", True, 0.0005, "5.3e-03"),
    Row("6d", True, 0.0005, "4.8e-03"),
)


@dataclass(frozen=True)
class Measured:
    """A row of Table 1 with the values of all draws of A; one value for the identity."""

    row: Row
    values: list[float]

    @property
    def text(self) -> str:
        """The median, with as many digits as the notes print."""
        return f"{statistics.median(self.values):.1e}"

    @property
    def agrees(self) -> bool:
        """Identity: the printed digits. Random: the printed value lies among those of the draws."""
        if not self.row.random:
            return self.text == self.row.printed
        return min(self.values) <= float(self.row.printed) <= max(self.values)

    @property
    def below(self) -> float:
        """The share of the draws below the printed value."""
        return sum(v < float(self.row.printed) for v in self.values) / len(self.values)


def measure(row: Row, draws: int, seed: int) -> Measured:
    """φ at the minimum; a random A has as many columns as the function has dimensions."""
    function, n, _ = FUNCTIONS[row.figure]
    spaces = (
        [RandomColumns(n, n, mixed_seed) for mixed_seed in range(seed, seed + draws)]
        if row.random
        else [Identity(n)]
    )
    # Every corner of a box in one or two dimensions is likely to be among eight random ones.
    values = [
        sharpness(function, np.zeros(n), space, row.epsilon, iterations=TIGHT, starts=8).value
        for space in spaces
    ]
    return Measured(row, values)


def table_1(draws: int, seed: int) -> list[Measured]:
    """All rows."""
    return [measure(row, draws, seed) for row in TABLE_1]
