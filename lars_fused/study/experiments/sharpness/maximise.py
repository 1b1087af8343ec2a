"""Definition 2: the largest value of a function in a box, by L-BFGS-B as Keskar et al. found it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lars_fused.study.experiments.sharpness.subspace import Subspace, Vector

ITERATIONS = 10
"""Keskar et al. stopped L-BFGS-B after ten iterations."""

Function = Callable[[Vector], tuple[float, Vector]]
"""The value and the gradient of f at a point of R^n."""


@dataclass(frozen=True)
class Sharpness:
    """φ, and how it was found.

    Attributes:
        value: φ, in percent; at least 0, as the middle of the box belongs to the box. Infinite if
            f overflows somewhere in the box, NaN if it does so at x.
        at: f(x).
        largest: the largest f(x + Ay) that was met.
        evaluations: how many times f was evaluated.
    """

    value: float
    at: float
    largest: float
    evaluations: int


class _Overflow(Exception):
    """F is not finite somewhere in the box."""


class _Search:
    """f(x + A(hu)) − f(x) for u in [−1, 1]^p, with the best value met on the way."""

    def __init__(self, function: Function, x: Vector, subspace: Subspace, half: Vector):
        self.function, self.x, self.subspace, self.half = function, x, subspace, half
        self.at = function(x)[0]
        self.rise, self.evaluations = 0.0, 1

    def __call__(self, u: Vector) -> tuple[float, Vector]:
        value, gradient = self.function(self.x + self.subspace.forward(self.half * u))
        self.evaluations += 1
        rise = value - self.at
        if not np.isfinite(rise):
            raise _Overflow
        self.rise = max(self.rise, rise)
        return rise, self.half * self.subspace.transposed(gradient)


def _fallen(search: _Search, scale: float, u: Vector) -> tuple[float, Vector]:
    """What `minimize` minimises: the rise, negated and scaled."""
    rise, slope = search(u)
    return -rise / scale, -slope / scale


def half_widths(subspace: Subspace, x: Vector, epsilon: float) -> Vector:
    """Equation 3: ε(|(A⁺x)ᵢ| + 1), how far the box reaches in each direction."""
    found: Vector = epsilon * (np.abs(subspace.pseudo_inverse(x)) + 1.0)
    return found


def sharpness(
    function: Function,
    x: Vector,
    subspace: Subspace,
    epsilon: float,
    *,
    iterations: int = ITERATIONS,
    starts: int = 1,
    seed: int = 0,
) -> Sharpness:
    """Equation 2: 100 (max f(x + Ay) − f(x)) / (1 + f(x)), y in the box of equation 3.

    L-BFGS-B starts from the middle of the box and from random corners, since the middle of a
    perfect minimum has no direction. It climbs from each; the largest value met anywhere counts.
    What it finds is a lower bound of the maximum: it is exact where f rises towards one corner, and
    nobody can afford to look at all 2^p.

    Args:
        function: f with its gradient.
        x: the point, (n,).
        subspace: A.
        epsilon: ε, the size of the box.
        iterations: of L-BFGS-B from each start.
        starts: random corners to start from, beside the middle; each that is drawn counts once.
        seed: of the corners.
    """
    from scipy.optimize import Bounds, minimize

    search = _Search(function, x, subspace, half_widths(subspace, x, epsilon))
    generator = np.random.default_rng(seed)
    drawn = [generator.choice([-1.0, 1.0], subspace.p) for _ in range(starts)]
    # A box in one or two dimensions has few corners: no climb is made twice.
    corners: list[Vector] = list(np.unique(drawn, axis=0)) if drawn else []
    bounds = Bounds(-np.ones(subspace.p), np.ones(subspace.p))
    options = {"maxiter": iterations, "ftol": 0.0, "gtol": 1e-12}
    try:
        for start in (np.zeros(subspace.p), *corners):
            rise, slope = search(start)
            # Scaled to about 1, which the line search expects: x⁸ in a box of 0.001 is 1e-24.
            scale = max(abs(rise), float(np.abs(slope).max()))
            if scale > 0:
                climb = partial(_fallen, search, scale)
                minimize(climb, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    except _Overflow:
        search.rise = np.inf
    value = 100.0 * search.rise / (1.0 + search.at)
    return Sharpness(value, search.at, search.at + search.rise, search.evaluations)
