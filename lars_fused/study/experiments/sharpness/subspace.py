"""The matrix A of Definition 2, as products alone: nothing of size n × n is ever made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

KEPT = 64_000_000
"""Numbers of A that are kept in memory (half a gigabyte); a larger one is drawn anew each time."""

ROWS = 1_000_000
"""Numbers that are drawn at a time."""


class Subspace(Protocol):
    """A linear map from R^p to R^n."""

    n: int
    p: int

    def forward(self, y: Vector) -> Vector:
        """Ay."""

    def transposed(self, g: Vector) -> Vector:
        """Aᵀg: a gradient with respect to y."""

    def pseudo_inverse(self, x: Vector) -> Vector:
        """A⁺x."""


class Identity:
    """A = I, which is its own pseudo-inverse."""

    def __init__(self, n: int):
        self.n = self.p = n

    def forward(self, y: Vector) -> Vector:
        """Y itself."""
        return y

    def transposed(self, g: Vector) -> Vector:
        """G itself."""
        return g

    def pseudo_inverse(self, x: Vector) -> Vector:
        """X itself."""
        return x


class RandomColumns:
    """A of n × p independent standard normal numbers, which the seed alone decides.

    A⁺ = (AᵀA)⁺Aᵀ, for any rank, takes a p × p matrix only.
    """

    def __init__(self, n: int, p: int, seed: int):
        if n < 1 or p < 1:
            raise ValueError(f"A is {n} x {p}; both must be at least 1")
        self.n, self.p, self.seed = n, p, seed
        self._rows = max(1, ROWS // p)
        self._kept: dict[int, Vector] | None = {} if n * p <= KEPT else None
        self._gram_inverse: Vector | None = None

    def _blocks(self) -> Iterator[tuple[slice, Vector]]:
        """The rows of A in pieces, with where they belong."""
        for start in range(0, self.n, self._rows):
            where = slice(start, min(start + self._rows, self.n))
            block = self._kept.get(start) if self._kept is not None else None
            if block is None:
                generator = np.random.default_rng([self.seed, start])
                block = generator.standard_normal((where.stop - start, self.p))
                if self._kept is not None:
                    self._kept[start] = block
            yield where, block

    def forward(self, y: Vector) -> Vector:
        """Ay."""
        found = np.empty(self.n)
        for where, block in self._blocks():
            found[where] = block @ y
        return found

    def transposed(self, g: Vector) -> Vector:
        """Aᵀg."""
        found = np.zeros(self.p)
        for where, block in self._blocks():
            found += g[where] @ block
        return found

    def pseudo_inverse(self, x: Vector) -> Vector:
        """A⁺x."""
        from scipy.linalg import pinvh

        if self._gram_inverse is None:
            gram = np.zeros((self.p, self.p))
            for _, block in self._blocks():
                gram += block.T @ block
            self._gram_inverse = pinvh(gram)
        found: Vector = self._gram_inverse @ self.transposed(x)
        return found
