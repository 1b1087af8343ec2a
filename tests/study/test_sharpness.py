"""Definition 2 against closed forms, and Table 1."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study.experiments.sharpness import subspace
from lars_fused.study.experiments.sharpness.functions import FUNCTIONS, TABLE_1, measure
from lars_fused.study.experiments.sharpness.maximise import half_widths, sharpness
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns

pytestmark = pytest.mark.cpu


def quadratic(curvature: np.ndarray, centre: np.ndarray, height: float):
    """½ Σ hᵢ (xᵢ − cᵢ)² + height, with its gradient."""

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        away = x - centre
        return float(0.5 * (curvature * away**2).sum()) + height, curvature * away

    return function


def corner(curvature, centre, height, x, epsilon) -> float:
    """φ in closed form: the box's maximum is the corner away from the centre."""
    half = epsilon * (np.abs(x) + 1)
    at = float(0.5 * (curvature * (x - centre) ** 2).sum()) + height
    most = float(0.5 * (curvature * (np.abs(x - centre) + half) ** 2).sum()) + height
    return 100 * (most - at) / (1 + at)


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("at_minimum", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_sharpness_of_a_quadratic_is_its_closed_form(n, at_minimum, epsilon) -> None:
    generator = np.random.default_rng(n)
    curvature = 10.0 ** generator.uniform(-2, 2, n)
    centre = generator.standard_normal(n)
    x = centre if at_minimum else centre + generator.standard_normal(n)
    found = sharpness(quadratic(curvature, centre, 0.3), x, Identity(n), epsilon, iterations=100)
    expected = corner(curvature, centre, 0.3, x, epsilon)
    # f itself is rounded: 1e-16 of 1 + f, of which φ is a hundredth of a thousandth at least.
    assert found.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.at == pytest.approx(quadratic(curvature, centre, 0.3)(x)[0])
    assert found.value == pytest.approx(100 * (found.largest - found.at) / (1 + found.at))


def test_the_climb_does_not_depend_on_the_unit_of_the_function() -> None:
    slope = np.array([1.0, -2.0, 0.5])
    for unit in (1.0, 1e-25):
        found = sharpness(
            lambda x, unit=unit: (unit * float(slope @ x), unit * slope),
            np.zeros(3), Identity(3), 0.01, starts=0,
        )  # fmt: skip
        assert found.value == pytest.approx(100 * unit * 0.01 * 3.5, rel=1e-9, abs=0)


def test_a_point_outside_of_the_box_never_counts() -> None:
    seen = []
    function = quadratic(np.ones(3), np.zeros(3), 0.0)

    def watched(x: np.ndarray) -> tuple[float, np.ndarray]:
        seen.append(x.copy())
        return function(x)

    x = np.array([2.0, -1.0, 0.0])
    sharpness(watched, x, Identity(3), 0.01)
    half = np.array([0.03, 0.02, 0.01])
    assert half_widths(Identity(3), x, 0.01) == pytest.approx(half)
    assert (np.abs(np.array(seen) - x) <= half * (1 + 1e-12)).all()


def test_sharpness_with_a_random_matrix_is_the_best_corner() -> None:
    """F is convex, so its maximum over the box is at one of the 2^p corners."""
    n, p = 6, 3
    function = quadratic(np.array([1.0, 5, 0.1, 20, 2, 7]), np.arange(6) / 3, 0.2)
    x = np.linspace(-1, 1, n)
    space = RandomColumns(n, p, seed=4)
    dense = np.array([space.forward(unit) for unit in np.eye(p)]).T
    half = 0.02 * (np.abs(np.linalg.pinv(dense) @ x) + 1)
    corners = [function(x + dense @ (half * s))[0] for s in itertools.product([-1, 1], repeat=p)]
    expected = 100 * (max(corners) - function(x)[0]) / (1 + function(x)[0])
    found = sharpness(function, x, space, 0.02, iterations=50, starts=8)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_a_function_that_overflows_in_the_box_is_infinitely_sharp() -> None:
    def wall(x: np.ndarray) -> tuple[float, np.ndarray]:
        return (float(x[0]), np.ones(1)) if x[0] < 0.5 else (math.nan, np.ones(1))

    assert sharpness(wall, np.zeros(1), Identity(1), 1.0).value == math.inf
    assert sharpness(wall, np.zeros(1), Identity(1), 0.4).value == pytest.approx(40)
    assert math.isnan(sharpness(wall, np.ones(1), Identity(1), 0.1).value)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (1, 1)])
@pytest.mark.parametrize("kept", [True, False])
def test_products_with_a_random_matrix_are_those_of_the_matrix(shape, kept, monkeypatch) -> None:
    n, p = shape
    monkeypatch.setattr(subspace, "ROWS", 2 * p)  # two rows at a time
    monkeypatch.setattr(subspace, "KEPT", 10**6 if kept else 0)
    space = RandomColumns(n, p, seed=11)
    dense = np.array([space.forward(unit) for unit in np.eye(p)]).T
    assert dense.shape == (n, p)
    assert len(np.unique(dense)) == n * p  # no block is the copy of another
    generator = np.random.default_rng(0)
    y, g = generator.standard_normal(p), generator.standard_normal(n)
    assert space.forward(y) == pytest.approx(dense @ y)
    assert space.transposed(g) == pytest.approx(dense.T @ g)
    assert space.pseudo_inverse(g) == pytest.approx(np.linalg.pinv(dense) @ g, rel=1e-6, abs=1e-9)
    assert RandomColumns(n, p, seed=11).forward(y).tolist() == space.forward(y).tolist()
    assert RandomColumns(n, p, seed=12).forward(y).tolist() != space.forward(y).tolist()


def test_numbers_of_a_random_matrix_are_standard_normal() -> None:
    drawn = np.concatenate([RandomColumns(4000, 5, 0).forward(unit) for unit in np.eye(5)])
    # Standard errors of 20,000 numbers: 0.007 of the mean, 0.005 of the deviation.
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.02


def test_nothing_of_size_n_times_n_is_made() -> None:
    n = 100_000  # n × n would be 80 GB
    function = quadratic(np.ones(n), np.zeros(n), 0.0)
    for space in (Identity(n), RandomColumns(n, 2, 0)):
        assert sharpness(function, np.zeros(n), space, 1e-3, iterations=1).value > 0


@pytest.mark.parametrize("row", [r for r in TABLE_1 if not r.random], ids=str)
def test_identity_rows_of_table_1_have_the_printed_digits(row) -> None:
    found = measure(row, draws=1, seed=0)
    assert found.text == row.printed
    assert found.agrees


@pytest.mark.parametrize("row", [r for r in TABLE_1 if r.random and r.epsilon == 1e-3], ids=str)
def test_random_rows_of_table_1_are_their_best_corner(row) -> None:
    """Each draw must be exact; the printed value, of one draw, must be among them."""
    found = measure(row, draws=12, seed=1)
    function, n, _ = FUNCTIONS[row.figure]
    for seed, value in enumerate(found.values, 1):
        dense = np.array([RandomColumns(n, n, seed).forward(unit) for unit in np.eye(n)]).T
        corners = itertools.product([-row.epsilon, row.epsilon], repeat=n)
        expected = 100 * max(function(dense @ np.array(y))[0] for y in corners)
        assert value == pytest.approx(expected, rel=1e-6, abs=0)
    assert found.agrees
    assert found.below == sum(v < float(row.printed) for v in found.values) / 12
    assert not replace(found, values=[v * 1e-9 for v in found.values]).agrees


def test_gradients_of_the_four_functions() -> None:
    for function, n, _ in FUNCTIONS.values():
        x = np.array([0.7, -1.2])[:n]
        for i in range(n):
            step = np.eye(n)[i] * 1e-6
            slope = (function(x + step)[0] - function(x - step)[0]) / 2e-6
            assert function(x)[1][i] == pytest.approx(slope, rel=1e-6)
