"""The four orders of images, on made images; features of another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("skimage", reason="the extra `study` is not installed")

from lars_fused.study import data, networks
from lars_fused.study.data import in_memory
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch import metrics, perceptual
from lars_fused.study.experiments.minibatch.plan import Plan
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu


def made() -> np.ndarray:
    """Black, white, grey, a checkerboard of 8 pixels, red, green, blue: 32x32 in [0, 1]."""
    found = np.zeros((7, 32, 32, 3))
    found[1], found[2] = 1.0, 0.5
    rows, columns = np.indices((32, 32)) // 8
    found[3] = ((rows + columns) % 2)[..., None]
    for channel in range(3):
        found[4 + channel, ..., channel] = 1.0
    return found


def test_a_white_image_is_brightest_and_a_black_one_darkest() -> None:
    found = metrics.intensity(made())
    assert found.argmax() == 1
    assert found.argmin() == 0
    assert found[1] == 32 * 32 * 3
    assert found[4:].tolist() == [1024.0] * 3


def test_a_checkerboard_has_most_edges_and_a_plain_image_none() -> None:
    found = metrics.edges(made())
    assert found.argmax() == 3
    assert found[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    assert found[3] > 100


def test_mean_colours_are_sorted_by_hue_saturation_value() -> None:
    shown = made()
    shown[6] *= 0.3  # a dark blue: by hue it is last, by value it would be second
    found = metrics.colour(shown)
    assert found[4:, 0] == pytest.approx([0, 1 / 3, 2 / 3])  # red, green, blue
    assert found[2] == pytest.approx([0, 0, 0.5])
    # Grey has hue and saturation 0 and is sorted by value; red comes after it, then green, blue.
    assert metrics.ascending(found).tolist() == [0, 2, 3, 1, 4, 5, 6]
    with pytest.raises(StudyError, match="1 or 3 channels, not 2"):
        metrics.colour(made()[..., :2])


def test_pixels_of_any_kind_are_scaled_and_equals_keep_their_order() -> None:
    bytes_ = in_memory(torch.full((2, 1, 8, 8), 51, dtype=torch.uint8))
    assert metrics.pixels(bytes_)(torch.arange(2)).max() == pytest.approx(0.2)
    floats = in_memory(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 16.0)]))
    assert metrics.pixels(floats)(torch.arange(2)).max((1, 2, 3)).tolist() == [0.0, 1.0]
    assert metrics.ascending(np.array([2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2]


def test_perceptual_distance_is_zero_at_the_mean_and_larger_for_stranger_images() -> None:
    torch.manual_seed(0)
    network = networks.build("conv2", (1, 8, 8), 10)
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    pattern = torch.randn(1, 8, 8)
    pixels = torch.stack([pattern, pattern + 0.2 * torch.randn(1, 8, 8), pattern, -pattern])
    pixels = torch.cat([pixels, 3 * pattern[None] - pixels[1:].sum(0)])  # the mean is the pattern
    shown = in_memory(pixels)
    found = metrics.scores("perceptual", shown, network)
    assert torch.allclose(perceptual.mean_image(shown, [torch.arange(5)]), pixels.mean(0)[None])
    strange = torch.stack([pattern * 0.8, -pattern])
    features = [perceptual.features(network, x) for x in (strange, pattern[None])]
    near, far = perceptual.between(*features)
    assert near < far
    assert perceptual.between(features[1], features[1]).tolist() == [0.0]
    # By hand: unit vectors by position, squares over channels, mean over positions, layers added.
    expected = 0.0
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(
                lambda m, i, o, n=name: seen.setdefault(n, []).append(o.detach().clone())
            )
    network.eval()(pixels[1:2])
    network(pixels.mean(0)[None])
    for a, b in seen.values():
        unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in (a, b)]
        expected += float((unit[0] - unit[1]).square().sum(1).mean())
    assert found[1] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(StudyError, match="this network has none"):
        perceptual.features(networks.build("linear", (1, 8, 8), 10), pixels)


def test_features_come_from_the_weights_of_another_run(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    network = networks.build("mlp", (1, 8, 8), 10, 0.5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    shown = data.load("synthetic", 0, 100)
    eye = perceptual.from_file(tmp_path / "weights.pt", shown, "mlp", 0.5)
    for a, b in zip(eye.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(StudyError, match=r"does not fit mlp at width 1 for images of 1x8x8"):
        perceptual.from_file(tmp_path / "weights.pt", shown, "mlp", 1.0)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(StudyError, match=r"is not the weights.pt of a run"):
        perceptual.from_file(tmp_path / "list.pt", shown, "mlp", 1.0)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(StudyError, match="is damaged"):
        perceptual.from_file(tmp_path / "noise.pt", shown, "mlp", 1.0)
    # Another file is another order: its runs are not taken for those of the first.
    plan = Plan(Settings(), ("perceptual", "edges"), 1, perceptual.digest(tmp_path / "weights.pt"))
    other = replace(plan, features=perceptual.digest(tmp_path / "list.pt"))
    assert plan.comparison("perceptual").key != other.comparison("perceptual").key
    assert plan.comparison("edges").key == other.comparison("edges").key
    assert plan.arm("recommended", 0).key != other.arm("recommended", 0).key
