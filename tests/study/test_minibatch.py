"""Algorithm 1: distances to the full gradient, and the cache that they are taken from."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("skimage", reason="the extra `study` is not installed")

from lars_fused.study import data, networks, runs
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch import compare
from lars_fused.study.experiments.minibatch.cache import HEADER, GradientCache, stamp
from lars_fused.study.experiments.minibatch.compare import Comparison
from lars_fused.study.experiments.minibatch.plan import cut
from lars_fused.study.loop import Trainer
from lars_fused.study.order import Fixed
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu

IMAGES, BATCH = 100, 16  # six mini-batches of 17, 17, 17, 17, 16, 16
BASE = Settings(
    data="synthetic", train_images=IMAGES, network="linear", optimizer="sgd", lr=0.1, batch=BATCH,
    epochs=3.0, decay="step", evaluations=1, order="made",
)  # fmt: skip


def images() -> data.Data:
    return data.load("synthetic", 0, IMAGES)


def batches() -> list[torch.Tensor]:
    return cut(torch.arange(IMAGES).flip(0), BATCH)


def comparison(folder: Path, **changes) -> Comparison:
    return Comparison(replace(BASE, **changes), images(), batches(), folder)


def closed_form(weight: np.ndarray, bias: np.ndarray, chosen: torch.Tensor) -> list[np.ndarray]:
    """Softmax regression: ∂R/∂W = (P − Y)ᵀX / m and ∂R/∂b = Σ(P − Y) / m, in float64."""
    split = images().train
    x = split.images.take(chosen).flatten(1).double().numpy()
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(x)), split.labels[chosen].numpy()] -= 1
    return [p.T @ x / len(x), p.mean(0)]


def test_distances_on_a_linear_model_are_those_of_the_closed_form(tmp_path: Path) -> None:
    found = comparison(tmp_path).run()
    assert found.layers.shape == (3, 6, 2)
    trainer = Trainer(BASE, images(), order=Fixed(batches()))
    for epoch in range(3):
        # net_compare stays where the epoch began, while net_normal goes on.
        weight, bias = (p.detach().double().numpy().copy() for p in trainer.parameters)
        each = [closed_form(weight, bias, chosen) for chosen in batches()]
        full = closed_form(weight, bias, torch.arange(IMAGES))
        for k, gradients in enumerate(each):
            by_tensor = [np.linalg.norm(g - f) for g, f in zip(gradients, full, strict=True)]
            assert found.layers[epoch, k].tolist() == pytest.approx(by_tensor, rel=2e-5)
            assert float(found.total[epoch, k]) == pytest.approx(math.hypot(*by_tensor), rel=2e-5)
        norms = [np.linalg.norm(f) for f in full]
        assert found.full[epoch].tolist() == pytest.approx(norms, rel=2e-5)
        trainer.run(stop_after=(epoch + 1) * 6)
    assert found.rates == pytest.approx([0.1, 0.01, 0.001])


def test_the_sum_over_mini_batches_is_the_full_gradient() -> None:
    torch.manual_seed(0)
    model, split = networks.build("mlp", (1, 8, 8), 10), images().train
    parameters = list(model.parameters())

    def gradient(chosen: torch.Tensor) -> list[torch.Tensor]:
        output = model(split.images.take(chosen))
        loss = torch.nn.functional.cross_entropy(output, split.labels[chosen])
        return list(torch.autograd.grad(loss, parameters))

    parts = batches()
    assert {len(part) for part in parts} == {16, 17}  # a plain mean would be wrong
    found = compare.mean_gradient(lambda k: gradient(parts[k]), [len(part) for part in parts])
    for ours, whole in zip(found, gradient(torch.arange(IMAGES)), strict=True):
        # Both are sums of 100 float32 terms in different orders.
        assert float((ours - whole).abs().max()) <= 100 * 6e-8 * float(whole.abs().max())


def test_an_interrupted_comparison_is_bitwise_the_whole_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "CHECKPOINT_SECONDS", 0.0)
    options = {"network": "c1", "width": 0.0625, "order": "noisy"}  # dropout, batch normalisation
    whole = comparison(tmp_path / "whole", **options)
    whole.run()

    def stop(trainer: Trainer) -> None:
        if trainer.step == 9:  # in the second of three epochs: three gradients are cached
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path / "parts", **options).run(stop)
    again = comparison(tmp_path / "parts", **options)
    assert again.trainer.step == 6
    computed = []
    plain = compare._Start._compute
    monkeypatch.setattr(
        compare._Start,
        "_compute",
        lambda self, k: computed.append((self.first, k)) or plain(self, k),
    )
    again.run()
    # What was cached before the interruption is used: the first three of the second epoch.
    assert computed == [(6, 3), (6, 4), (6, 5)] + [(12, k) for k in range(6)]
    assert torch.equal(again.distances.layers, whole.distances.layers)
    assert again.distances.rates == whole.distances.rates
    assert again.trainer.history.losses == whole.trainer.history.losses
    for a, b in zip(again.trainer.parameters, whole.trainer.parameters, strict=True):
        assert torch.equal(a, b)
    again.finish()
    assert not again.cache.folder.exists()
    assert {p.name for p in again.folder.iterdir()} >= {runs.RESULT, compare.DISTANCES}


SHAPES = [torch.Size([3, 5]), torch.Size([]), torch.Size([7])]


def gradients() -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


def test_the_cache_is_as_large_as_it_says_and_returns_every_bit(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path / "cache", SHAPES, 3)
    written = [gradients() for _ in range(3)]
    for k, each in enumerate(written):
        cache.write(k, each, stamp(k=k))
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) == cache.size
    assert cache.size == 3 * (HEADER + 4 * 23)
    for k, each in enumerate(written):
        for a, b in zip(cache.read(k, stamp(k=k)) or [], each, strict=True):
            assert torch.equal(a, b)
    (cache.folder / "other").touch()
    cache.clear()
    assert [file.name for file in cache.folder.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("change", "damaged"),
    [
        (lambda content: content[:-1], 1),
        (lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], 1),
        (lambda content: b"", 1),
        (lambda content: b"\xff" * len(content), 1),
        (lambda content: content[:HEADER], 1),
    ],
    ids=["short", "a bit", "empty", "noise", "header alone"],
)
def test_a_damaged_gradient_is_not_believed(tmp_path: Path, change, damaged: int) -> None:
    cache = GradientCache(tmp_path, SHAPES, 1)
    cache.write(0, gradients(), "now")
    cache.file(0).write_bytes(change(cache.file(0).read_bytes()))
    assert cache.read(0, "now") is None
    assert cache.damaged == damaged


def test_a_stale_gradient_is_not_believed(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path, SHAPES, 1)
    assert cache.read(0, "now") is None
    cache.write(0, gradients(), stamp(settings={"lr": 0.1}, step=3))
    assert cache.read(0, stamp(settings={"lr": 0.2}, step=3)) is None
    assert cache.read(0, stamp(settings={"lr": 0.1}, step=4)) is None
    assert cache.read(0, stamp(settings={"lr": 0.1}, step=3)) is not None
    assert cache.damaged == 0  # every epoch finds the files of the one before


def test_damage_in_the_middle_of_an_epoch_changes_no_result(tmp_path: Path) -> None:
    # With dropout: what is computed again draws the random numbers of its own step.
    options = {"network": "c1", "width": 0.0625, "order": "noisy"}
    whole = comparison(tmp_path / "whole", **options).run()
    other = comparison(tmp_path / "other", **options)

    def harm(trainer: Trainer) -> None:
        if trainer.step == 4:
            file = other.cache.file(1)
            file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")

    assert torch.equal(other.run(harm).layers, whole.layers)
    assert other.cache.damaged == 1


def test_a_cache_that_does_not_fit_is_refused_before_the_start(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    cache = GradientCache(tmp_path / "not" / "yet" / "there", [torch.Size([1000])], 10)
    needed = 11 * (HEADER + 4000)  # a file is written beside the one it replaces
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, needed))
    assert cache.check_space() == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, needed - 1))
    message = r"takes 0.04 MB \(10 mini-batches of 1,000 numbers\), and 0.05 MB are free"
    with pytest.raises(StudyError, match=message):
        cache.check_space()
    cache.write(0, [torch.zeros(1000)], "now")  # what is there already needs no room
    assert cache.check_space() == needed - 1
