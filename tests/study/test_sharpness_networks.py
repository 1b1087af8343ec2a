"""A network as a function of one vector, its sharpness, and paths between two networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import data, networks
from lars_fused.study.evaluation import evaluated
from lars_fused.study.experiments.sharpness.maximise import sharpness
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns
from lars_fused.study.experiments.sharpness.surface import (
    Surface,
    along,
    between,
    coefficients,
    renew_statistics,
)

pytestmark = pytest.mark.cpu


def some(count: int = 300) -> tuple[data.Split, data.Split]:
    loaded = data.load("synthetic", 0, count)
    return loaded.train, loaded.test


def trained(name: str, seed: int) -> torch.nn.Module:
    """A network after a few steps, so that its statistics are of the data."""
    torch.manual_seed(seed)
    network, (split, _) = networks.build(name, (1, 8, 8), 10, 0.25), some()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(6):
        chosen = torch.arange(50 * step, 50 * step + 50)
        optimizer.zero_grad()
        output = network(split.images.take(chosen))
        torch.nn.functional.cross_entropy(output, split.labels[chosen]).backward()
        optimizer.step()
    return network


def test_a_networks_loss_and_gradient_as_a_function_of_one_vector(monkeypatch) -> None:
    network, (split, _) = trained("c1", 0), some()  # dropout is off, statistics stay
    kept = {name: b.clone() for name, b in network.named_buffers()}
    surface = Surface(network, split)
    whole, gradient = surface(surface.start)
    assert whole == pytest.approx(evaluated(network, split, torch.device("cpu"))[0], rel=1e-6)
    assert len(surface.start) == networks.parameters(network)
    direction = np.random.default_rng(0).standard_normal(len(gradient))
    direction *= 0.02 / np.linalg.norm(direction)
    ends = [surface(surface.start + sign * direction)[0] for sign in (1, -1)]
    # Central differences: the error is cubic in the step; float32 gives the losses to 1e-6.
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float(gradient @ direction), rel=0.05, abs=1e-5)
    monkeypatch.setattr("lars_fused.study.evaluation.AT_ONCE", 70)
    parts, pieces = surface(surface.start)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert pieces == pytest.approx(gradient, rel=1e-3, abs=1e-6)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, kept[name])


def test_a_networks_sharpness_grows_with_the_box() -> None:
    network, (split, _) = trained("mlp", 0), some()
    surface = Surface(network, split)
    x = surface.start
    for space in (Identity(len(x)), RandomColumns(len(x), 10, 0)):
        small, large = (sharpness(surface, x, space, e).value for e in (5e-4, 1e-3))
        assert 0 < small < large


@pytest.mark.parametrize("path", ["linear", "sine"])
@pytest.mark.parametrize("name", ["mlp", "c1"])
def test_the_ends_of_a_path_are_the_two_models(path: str, name: str) -> None:
    small, large = trained(name, 1), trained(name, 2)
    ends = [{k: v.clone() for k, v in n.state_dict().items()} for n in (small, large)]
    splits = some()
    points = along(trained(name, 3), (ends[0], ends[1]), path, [-0.5, 0.0, 0.5, 1.0], splits)
    for point, network in ((points[1], small), (points[3], large)):
        network.eval()
        for which, split in zip(("train", "test"), splits, strict=True):
            loss, accuracy = evaluated(network, split, torch.device("cpu"))
            assert getattr(point, f"{which}_loss") == loss  # to the bit
            assert getattr(point, f"{which}_accuracy") == accuracy
    assert len({p.train_loss for p in points}) == 4


def test_weights_and_coefficients_along_a_path() -> None:
    assert coefficients("linear", -1.0) == (2.0, -1.0)
    assert coefficients("sine", 0.5) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert coefficients("sine", 2.0) == pytest.approx((-1.0, 0.0))
    small = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([1.0])}
    large = {"w": torch.tensor([3.0, 6.0]), "running_var": torch.tensor([9.0])}
    middle = between(small, large, "linear", 0.25)
    assert middle["w"].tolist() == [1.5, 3.0]
    assert middle["running_var"].tolist() == [1.0]
    sine = between(small, large, "sine", 0.5)["w"]
    assert sine.tolist() == pytest.approx([4 * 0.5**0.5, 8 * 0.5**0.5])


def test_statistics_of_batch_normalisation_are_renewed_from_the_images() -> None:
    network, (split, _) = trained("mlp-bn", 0), some()
    network.eval()
    first: list[torch.Tensor] = []
    layer = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d))
    layer.register_forward_pre_hook(lambda module, given: first.append(given[0]))
    renew_statistics(network, split)
    seen = torch.cat(first)
    assert torch.allclose(layer.running_mean, seen.mean(0), atol=1e-6)
    assert torch.allclose(layer.running_var, seen.var(0), rtol=1e-5)
    assert (layer.momentum, layer.training) == (0.1, False)
