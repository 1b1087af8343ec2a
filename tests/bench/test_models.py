"""The model shapes of the benches, against parameter counts that others published."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from bench import models

pytestmark = pytest.mark.cpu

# name: (parameters, tensors). Sources of the parameter counts:
#   AlexNet, ResNet-50, ViT-B/16: "num_params" of the IMAGENET1K_V1 weights in torchvision/models/
#     alexnet.py, resnet.py, vision_transformer.py.
#   GoogLeNet: netscope's count of BVLC's network, as listed in HewlettPackard/dlcookbook-dlbs.
#   BERT-large: reported for transformers.AutoModel.from_pretrained("bert-large-uncased").
# AlexNet-BN has no published count: a test of its own derives it.
PUBLISHED = {
    "AlexNet": (61_100_840, 16),
    "ResNet-50": (25_557_032, 161),
    "GoogLeNet": (6_998_552, 116),
    "ViT-B/16": (86_567_656, 152),
    "BERT-large": (335_141_888, 391),
}


# Counted below, by other means than a published number.
COUNTED = {"AlexNet-BN", "10,000 tiny tensors", "one 100M tensor"}


def test_every_model_is_counted() -> None:
    missing = set(models.MODELS) - {*PUBLISHED, *COUNTED}
    assert not missing, f"add the parameters and tensors of {missing} to PUBLISHED"


@pytest.mark.parametrize("model", PUBLISHED)
def test_counts_are_the_published_ones(model: str) -> None:
    shapes = models.MODELS[model]()
    assert (models.parameters(shapes), len(shapes)) == PUBLISHED[model]


@pytest.mark.parametrize("model", models.MODELS)
def test_names_are_unique_and_shapes_are_not_empty(model: str) -> None:
    shapes = models.MODELS[model]()
    assert not [name for name, times in Counter(name for name, _ in shapes).items() if times > 1]
    assert all(shape and min(shape) > 0 for _, shape in shapes)


def test_googlenet_with_its_auxiliary_heads_is_the_network_of_the_caffe_zoo() -> None:
    # BVLC's training network counts 13,378,280. Each head: a 1x1 convolution to 128 maps, 4x4 of
    # which meet 1,024 units, then 1,000 classes; they hang on 4a (512 maps) and 4d (528 maps).
    heads = sum(
        (maps * 128 + 128) + (2048 * 1024 + 1024) + (1024 * 1000 + 1000) for maps in (512, 528)
    )
    assert models.parameters(models.googlenet()) + heads == 13_378_280


def test_alexnet_bn_trades_seven_biases_for_seven_norms() -> None:
    plain, normed = dict(models.alexnet()), dict(models.alexnet_bn())
    weights = {name: shape for name, shape in plain.items() if name.endswith(".weight")}
    assert weights.items() <= normed.items()
    # 64 + 192 + 384 + 256 + 256 + 4096 + 4096 biases become as many scales and as many shifts.
    assert models.parameters(models.alexnet_bn()) - models.parameters(models.alexnet()) == 9_344
    assert sum(len(shape) == 1 for shape in normed.values()) == 7 * 2 + 1


def test_the_layer_wise_rate_is_for_tensors_with_more_than_one_dimension() -> None:
    shapes = models.resnet50()
    # 53 convolutions and the classifier; the rest are 53 pairs of scale and shift and one bias.
    assert sum(models.adapted(*entry) for entry in shapes) == 54
    assert not models.adapted("fc.bias", (1000,))
    assert not models.adapted("temperature", ())


def test_the_synthetic_models_are_what_they_are_called() -> None:
    tiny = models.tiny_tensors()
    assert len(tiny) == 10_000
    assert max(prod(shape) for _, shape in tiny) <= 512
    assert models.parameters(models.one_large_tensor()) == 100_000_000
