"""What is read from the distances, which mini-batches are recommended, and the verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("skimage", reason="the extra `study` is not installed")

from lars_fused.study.experiments.minibatch import findings, prune
from lars_fused.study.experiments.minibatch.compare import Distances
from lars_fused.study.experiments.minibatch.draw import HEAT
from lars_fused.study.experiments.minibatch.plan import METRICS, cut, middle, upper_quartile
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu


def test_the_order_is_cut_as_in_the_text_and_loses_no_image() -> None:
    parts = cut(torch.randperm(50_000), 256)
    assert len(parts) == 195
    assert {len(part) for part in parts} == {256, 257}
    assert torch.cat(parts).sort().values.equal(torch.arange(50_000))
    assert upper_quartile(8).tolist() == [False] * 6 + [True] * 2
    assert middle(10).tolist() == [False] + [True] * 8 + [False]


def distances(rows: list[list[float]], rates: list[float]) -> Distances:
    layers = torch.tensor(rows, dtype=torch.float64)[..., None]
    return Distances(["w"], layers, layers[:, 0], rates)


def test_claims_are_judged_by_the_distances() -> None:
    falling = [[4.0, 4, 4, 4, 4, 4, 4, 1, 1, 1], [40.0, 40, 40, 40, 40, 40, 40, 10, 10, 10]]
    bowl = [[9.0, 1, 1, 1, 1, 1, 1, 1, 1, 9]]
    found = distances(falling + bowl, [0.1, 0.1, 0.01])
    assert found.phases() == [range(0, 2), range(2, 3)]
    first, second = findings.claims("intensity", found)
    # The upper quartile is 1 (the last three of ten), the rest 4; an epoch's size does not matter.
    assert (first.text, first.held, first.epochs) == (findings.UPPER, True, 1.0)
    assert first.ratio == pytest.approx(0.25)
    assert (second.text, second.held) == (findings.INNER, True)
    assert second.ratio == pytest.approx(1 / 9)
    (outer, _) = findings.claims("colour", found)
    assert outer.ratio == pytest.approx(((4 + 1) / 2) / ((6 * 4 + 2) / 8))
    assert outer.held
    (edges, _) = findings.claims("edges", found)
    assert not edges.held
    assert edges.ratio == pytest.approx(1 / outer.ratio)
    assert findings.extremes(found)[1] == pytest.approx(9)
    # Each epoch by itself: 4 over the mean of 3.1, also where another epoch is ten times as large.
    assert findings.quarters(found)[0][0] == pytest.approx(4 / 3.1)
    assert findings.quarters(found)[0][3] / findings.quarters(found)[0][0] == pytest.approx(0.25)


def test_light_is_near() -> None:
    import matplotlib as mpl

    near, far = (np.dot(mpl.colormaps[HEAT](x)[:3], [0.2, 0.7, 0.1]) for x in (0.0, 1.0))
    assert near > 0.9
    assert far < 0.3


def orders() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randperm(1000, generator=generator) for name in METRICS}


def test_the_recommended_mini_batches_are_those_of_the_conclusions() -> None:
    made = orders()
    early = prune.allowed(made, 50, "recommended", 0)
    assert len(early) == 2 * 5  # a quarter of twenty, of two orders
    upper = {name: set(order[750:].tolist()) for name, order in made.items()}
    for number, chosen in enumerate(early):
        assert set(chosen.tolist()) <= upper["intensity" if number < 5 else "perceptual"]
    late = prune.allowed(made, 50, "recommended", 1)
    assert len(late) == 4 * 16
    for number, chosen in enumerate(late):
        order = list(made.values())[number // 16]
        assert not set(chosen.tolist()) & set(order[:100].tolist() + order[900:].tolist())
    assert len(prune.allowed(made, 50, "sorted", 0)) == 4 * 20
    uneven = {name: order[:990] for name, order in made.items()}
    assert {len(b) for b in prune.allowed(uneven, 50, "sorted", 0)} == {50}


def test_arms_take_equal_steps_and_every_mini_batch_of_a_pool_in_turn() -> None:
    settings = Settings(batch=50, milestones=(0.25, 0.5))
    assert prune.order_of("random", settings, orders(), 40) is None
    drawn = prune.order_of("recommended", settings, orders(), 40)
    assert drawn is not None
    assert drawn.steps(3.0) == 40
    assert [drawn.phase(step) for step in (0, 9, 10, 19, 20, 39)] == [0, 0, 1, 1, 2, 2]
    early = {tuple(b.tolist()) for b in prune.allowed(orders(), 50, "recommended", 0)}
    assert {tuple(drawn.chosen(step).tolist()) for step in range(10)} == early
    other = prune.order_of("recommended", replace(settings, seed=1), orders(), 40)
    assert any(not torch.equal(drawn.chosen(s), other.chosen(s)) for s in range(10))


def test_the_verdict_is_students_t() -> None:
    verdict = prune.Verdict("recommended", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    mean, low, high = verdict.interval(verdict.average)
    # t with 2 degrees of freedom is 4.3027 at 97.5 %, the standard error 1/√3.
    assert (mean, low, high) == pytest.approx(
        (2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )
    assert verdict.sentence().startswith("NOT FASTER")
    assert prune.Verdict("a", [0.0, 0.1], [2.0, 2.1]).sentence().startswith("FASTER")
    assert prune.Verdict("a", [0.0, 0.1], [-2.0, -2.1]).sentence().startswith("SLOWER")
    assert "at the end it is lower" in prune.Verdict("a", [-1.0, -1.1], [2.0, 2.1]).sentence()
