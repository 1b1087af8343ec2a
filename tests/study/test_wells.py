"""SGD on the made loss with a flat and a sharp minimum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study.experiments import noise_wells_report, wells
from lars_fused.study.experiments.wells import Wells, ended_flat, same_share
from tests.study.test_noise import plan

pytestmark = pytest.mark.cpu


def test_the_made_loss_has_the_slope_and_the_minima_it_says() -> None:
    made = Wells()
    w = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(made.loss(w).sum(), w)
    assert torch.allclose(made.slope(w.detach()), slope, atol=1e-10)
    for place, curvature, depth in ((-0.75, 1.0, 0.0), (0.75, 16.0, 0.4)):
        at = torch.tensor(place, dtype=torch.float64)
        assert float(made.loss(at)) == pytest.approx(-depth, abs=1e-9)
        step = float(made.slope(at + 1e-4) - made.slope(at - 1e-4)) / 2e-4
        assert step == pytest.approx(curvature, rel=1e-5)
    assert float(made.slope(torch.tensor(made.barrier))) == pytest.approx(0, abs=1e-3)
    assert made.temperature(made.lr(0.3, 7), 7) == pytest.approx(0.3)


def test_settled_shares_by_quadrature_and_by_equation_26() -> None:
    from scipy import integrate

    made = Wells()

    def density(w: float) -> float:
        return math.exp(-float(made.loss(torch.tensor(w, dtype=torch.float64))) / 0.3)

    flat, _ = integrate.quad(density, -12, made.barrier, limit=200)
    sharp, _ = integrate.quad(density, made.barrier, 12, limit=200)
    assert made.settled(0.3) == pytest.approx(flat / (flat + sharp), abs=1e-4)
    # Equal depths: the weights are 1/√h, so 1 to 1/4; and depth enters as e^(depth/Θ).
    assert replace(made, depth=0.0).laplace(0.3) == pytest.approx(0.8)
    assert made.laplace(0.2) == pytest.approx(1 / (1 + math.e**2 / 4))
    assert made.laplace(0.2, factor=1.0) == pytest.approx(1 / (1 + math.e / 4))


def test_only_the_ratio_of_rate_and_batch_decides_while_steps_are_small() -> None:
    """γ/B alone sets the shares at B = 2 and 4; at B = 32 the sharp minimum is nearly unstable."""
    made, chains, temperature = Wells(sigma=16.0), 1000, 0.45
    expected = made.settled(temperature)
    error = math.sqrt(expected * (1 - expected) / chains)
    flat = {}
    for batch in (2, 4, 32):
        lr = made.lr(temperature, batch)
        flat[batch], steps = ended_flat(
            made, lr, batch, tilt="gaussian", chains=chains, time=12.0, seed=0
        )
        assert steps == math.ceil(12.0 / lr)
    small = [flat[batch] for batch in (2, 4)]
    for count in small:
        # 0.03: in a time of 12 not all of them have settled.
        assert abs(count / chains - expected) < 3 * error + 0.03
    assert same_share(small, chains) > 0.05
    assert flat[32] / chains > expected + 6 * error
    assert same_share([*small, flat[32]], chains) < 1e-6
    other = made.lr(0.2, 8)  # another γ/B settles elsewhere
    cold, _ = ended_flat(made, other, 8, tilt="gaussian", chains=chains, time=12.0, seed=0)
    assert same_share([cold, flat[2]], chains) < 1e-3


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tilt", wells.TILTS)
def test_both_kinds_of_noise_have_the_same_variance(tilt: str, batch: int) -> None:
    """σ²/B; the fourth moment tells ±σ from Gaussian: 3 − 2/B against 3 times its square."""
    count = 40_000
    drawn = wells.mean_tilt(Wells(sigma=6.0), tilt, batch, count, torch.Generator().manual_seed(5))
    variance = 36 / batch
    fourth = 3.0 if tilt == "gaussian" else 3.0 - 2.0 / batch
    assert abs(float(drawn.mean())) < 4 * math.sqrt(variance / count)
    error = variance * math.sqrt((fourth - 1) / count)
    assert abs(float(drawn.square().mean()) - variance) <= 4 * error + 1e-9
    # The eighth standard moment is at most a Gaussian's 105.
    measured = float(drawn.pow(4).mean()) / variance**2
    assert abs(measured - fourth) < 4 * math.sqrt(105 / count)


def test_the_text_says_which_shares_are_equal() -> None:
    made = plan(chains=1000, temperatures=(0.2,))
    cells = made.well_cells()
    lr = Wells().lr(0.2, 1)
    shares = [
        noise_wells_report.Share(cell, lr * cell.batch, 10, flat, 1000)
        for cell, flat in zip(cells, (350, 360), strict=False)
    ]
    text = noise_wells_report.sentence(made, "gaussian", 0.2, shares)
    assert "equation 25 gives 0.350" in text
    assert "as printed 0.595" in text
    assert f"equal shares have p = {same_share([350, 360], 1000):.2g}" in text
    assert shares[0].error == pytest.approx(math.sqrt(0.35 * 0.65 / 1000))
