"""Learning rules: first steps by hand, section 5's networks, batch normalisation that moves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import networks
from lars_fused.study.data import Data, Split, in_memory, in_unit_range, load
from lars_fused.study.evaluation import evaluated
from lars_fused.study.loop import Trainer, seed_dropout
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu

BASE = Settings(
    data="synthetic", network="mlp", batch=3, epochs=1.0, momentum=0.0, weight_decay=0.0,
    decay="constant", pixels="unit", evaluations=1,
)  # fmt: skip


def made_images(count: int, classes: int = 47) -> Data:
    """Bytes of 28x28 with a dark border, as EMNIST's; every class occurs."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    pixels[..., :2, :] = 0
    split = Split(in_memory(pixels), torch.arange(count) % classes)
    return Data("made", split, split, tuple(map(str, range(classes))))


def gradients_by_hand(network: nn.Sequential, images: np.ndarray, labels: np.ndarray) -> list:
    """Section 5's three loops, and backwards: the mean loss's gradients in float64, in order."""
    from scipy.signal import convolve2d, correlate2d

    x, kept = images, []
    for layer in network:
        kept.append(x)
        if isinstance(layer, nn.Conv2d):
            w, b = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
            out = np.zeros((len(x), len(w), *x.shape[2:]))
            for n in range(len(x)):
                for o in range(w.shape[0]):
                    for i in range(w.shape[1]):
                        out[n, o] += correlate2d(padded[n, i], w[o, i], mode="valid")
            x = out + b[:, None, None]
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
        elif isinstance(layer, nn.MaxPool2d):
            n, c, h, _ = x.shape
            x = x.reshape(n, c, h // 2, 2, h // 2, 2).max((3, 5))
        elif isinstance(layer, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            assert isinstance(layer, nn.Linear)
            w, b = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            x = x @ w.T + b
    shares = np.exp(x - x.max(1, keepdims=True))
    back = shares / shares.sum(1, keepdims=True)
    back[np.arange(len(labels)), labels] -= 1
    back /= len(labels)
    found: list[np.ndarray] = []
    for layer, x in zip(reversed(network), reversed(kept), strict=True):
        if isinstance(layer, nn.Conv2d):
            w = layer.weight.detach().double().numpy()
            padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
            gradient, inner = np.zeros_like(w), np.zeros_like(padded)
            for n in range(len(x)):
                for o in range(w.shape[0]):
                    for i in range(w.shape[1]):
                        gradient[o, i] += correlate2d(padded[n, i], back[n, o], mode="valid")
                        inner[n, i] += convolve2d(back[n, o], w[o, i], mode="full")
            found = [gradient, back.sum((0, 2, 3)), *found]
            back = inner[..., 2:-2, 2:-2]
        elif isinstance(layer, nn.ReLU):
            back = back * (x > 0)
        elif isinstance(layer, nn.MaxPool2d):
            n, c, h, _ = x.shape
            cells = x.reshape(n, c, h // 2, 2, h // 2, 2)
            top = cells == cells.max((3, 5), keepdims=True)
            # Of equal pixels the first, in the order of rows; they are zeros that ReLU closed.
            back = (top * back[:, :, :, None, :, None]).reshape(x.shape)
        elif isinstance(layer, nn.Flatten):
            back = back.reshape(x.shape)
        else:
            w = layer.weight.detach().double().numpy()
            found = [back.T @ x, back.sum(0), *found]
            back = back @ w
    return found


def step_by_hand(settings: Settings, w: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The first step's change of one tensor, from the rules' equations with empty state."""
    lr = settings.lr
    if settings.optimizer == "sgd":
        return -lr * g
    if settings.optimizer == "rmsprop":
        return -lr * g / (np.sqrt((1 - settings.beta2) * g * g) + 1e-8)
    if settings.optimizer == "adam":  # the corrected moments of the first step are g and g²
        return -lr * g / (np.abs(g) + 1e-8)
    if w.ndim == 1:  # biases: neither decay nor adaptation
        return -lr * g
    size, slope, decay = np.linalg.norm(w), np.linalg.norm(g), settings.weight_decay
    return -lr * 0.001 * size / (slope + decay * size) * (g + decay * w)


RULES = {
    "sgd": {"lr": 0.1},
    "rmsprop": {"lr": 0.003, "beta2": 0.9},
    "adam": {"lr": 0.0001, "beta1": 0.9, "beta2": 0.9999},
    "lars": {"lr": 10.0, "momentum": 0.9, "weight_decay": 0.0005},
}


@pytest.mark.parametrize("network", ["mlp", "conv1", "conv2"])
def test_first_steps_by_hand(network: str) -> None:
    data = made_images(12)
    width = {"mlp": 1.0, "conv1": 0.3, "conv2": 1.0}[network]
    hand: list[np.ndarray] = []
    for rule, chosen in RULES.items():
        settings = replace(BASE, optimizer=rule, network=network, width=width, **chosen)
        trainer = Trainer(settings, data)
        before = [p.detach().double().numpy() for p in trainer.parameters]
        if not hand:  # the same network and images for every rule
            places = trainer.order.chosen(0)
            images = data.train.images.raw(places).double().numpy() / 255
            hand = gradients_by_hand(trainer.model, images, data.train.labels[places].numpy())
        trainer.take_step()
        for w, g, after in zip(before, hand, trainer.parameters, strict=True):
            assert w.shape == g.shape
            expected, moved = step_by_hand(settings, w, g), after.detach().double().numpy() - w
            large = np.abs(expected).max()
            assert large > 0
            # Where a gradient is small beside its tensor's, fp32 decides its sign: a rule that
            # divides by |g| may then move by the whole rate either way, but no further.
            sure = np.abs(g) > 1e-3 * np.abs(g).max()
            assert sure.mean() > 0.02
            slack = 2e-3 * np.abs(expected) + 2.0**-23 * np.abs(w) + 1e-6 * large
            assert (np.abs(moved - expected) <= slack)[sure].all(), (rule, w.shape)
            assert np.abs(moved).max() <= large * (1 + 1e-3) + 2.0**-23 * np.abs(w).max()
            if rule != "lars" or w.ndim == 1:  # decay moves what has no gradient
                assert (moved[g == 0] == 0).all()


def test_the_networks_of_section_5_layer_by_layer() -> None:
    x = torch.zeros(2, 1, 28, 28)
    shapes = {}
    for name in ("conv1", "conv2"):
        out, shapes[name] = x, []
        for layer in networks.build(name, (1, 28, 28), 47):
            out = layer(out)
            if not isinstance(layer, nn.ReLU):
                shapes[name].append(tuple(out.shape[1:]))
    # Convolution, pooling, flattening, affine layers: 10 · 14 · 14 = 1960 and 10 · 7 · 7 = 490.
    assert shapes["conv1"] == [(10, 28, 28), (10, 14, 14), (1960,), (576,), (160,), (47,)]
    assert shapes["conv2"] == [
        (5, 28, 28), (5, 14, 14), (10, 14, 14), (10, 7, 7), (490,), (150,), (47,),
    ]  # fmt: skip
    count = networks.parameters(networks.build("conv1", (1, 28, 28), 47))
    assert count == 10 * 26 + 1961 * 576 + 577 * 160 + 161 * 47
    affine = 785 * 100 + 101 * 100 + 101 * 47
    # "more than ten times as many weights" in the affine layers than the 100-100 network's.
    assert count - 260 > 10 * affine
    network = networks.build("conv1", (1, 28, 28), 47)
    kernels = network[0].weight
    assert 0.0095 < kernels.abs().max() <= 0.01
    for layer in (m for m in network if isinstance(m, nn.Linear)):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not layer.bias.any()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_moves_batch_normalisation(rule: str) -> None:
    """What the coursework could not test: its library never updated these parameters."""
    data = made_images(24, classes=5)
    settings = replace(BASE, optimizer=rule, network="mlp-bn", batch=12, **RULES[rule])
    trainer = Trainer(settings, data)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.take_step()
    names = [n for n in before if n.startswith(("2.", "5."))]
    assert names == ["2.weight", "2.bias", "5.weight", "5.bias"]
    for name in names:
        moved = (trainer.model.get_parameter(name) - before[name]).detach().abs()
        assert (moved > 0).float().mean() > 0.9, name


def test_scale_and_shift_of_the_coursework_and_its_defect() -> None:
    torch.manual_seed(1)
    network = networks.build("mlp-bn-normal", (1, 28, 28), 47)
    drawn = torch.cat(
        [p.detach() for n, p in network.named_parameters() if n.startswith(("2.", "5."))]
    )
    assert abs(float(drawn.mean())) < 3 / 20  # 400 numbers of N(0, 1)
    assert float(drawn.std()) == pytest.approx(1, abs=3 / math.sqrt(800))
    data = made_images(24, classes=5)
    settings = replace(BASE, optimizer="adam", network="mlp-bn-frozen", batch=12, lr=0.01)
    trainer = Trainer(settings, data)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.take_step()
    for name, parameter in trainer.model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == name.startswith(("2.", "5.")), name


def test_pixels_in_the_unit_range() -> None:
    data = in_unit_range(made_images(8))
    taken = data.train.images.take(torch.arange(8))
    assert (float(taken.min()), float(taken.max())) == (0.0, 1.0)
    assert torch.equal(taken, data.train.images.raw(torch.arange(8)) / 255)
    digits = in_unit_range(load("digits"))  # not bytes: 0 to 16
    assert float(digits.train.images.take(torch.arange(200)).max()) == 1.0
    assert Trainer(BASE, made_images(8)).data.train.images.std.item() == 255.0


def test_the_test_set_is_measured_apart_from_the_held_out_images() -> None:
    data = load("digits")
    settings = Settings(validation=300, test_too=True, epochs=1, evaluations=1, batch=64, lr=2.0)
    trainer = Trainer(settings, data)
    (last,) = trainer.run().evaluations
    cpu = torch.device("cpu")
    assert len(trainer.data.test) == 300
    assert (last["unseen_loss"], last["unseen_accuracy"]) == evaluated(
        trainer.model, data.test, cpu
    )
    assert last["test_accuracy"] == evaluated(trainer.model, trainer.data.test, cpu)[1]
    plain = Trainer(replace(settings, test_too=False), data).run().evaluations[0]
    assert plain == {k: v for k, v in last.items() if not k.startswith("unseen")}


def test_dropout_has_the_numbers_of_manual_seed() -> None:
    torch.manual_seed(17)
    expected = torch.rand(3)
    seed_dropout(17, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
