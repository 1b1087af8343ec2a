"""AlexNet as BVLC's Caffe has it, and AlexNet-BN, the LARS paper's first two networks.

Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
2012; layers, groups and initialisation of BVLC's `bvlc_alexnet` (227x227, 60,965,224 parameters).
AlexNet-BN has a batch normalisation in place of the bias of every layer but the last, and none of
the local response normalisations (You, Gitman, Ginsburg, 2018, section 3).

Smaller images have less resolution to give away. Below 128 pixels conv1 is 5x5 with stride 1, below
24 pixels it is 3x3 (conv2 as well) and the first pooling is left out. Narrower networks start with
Gaussians widened by the square root of what the fan-in lost, so that signals keep their size.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lars_fused.study.networks.blocks import ResponseNorm, Scale, channels, flat_features

CONVOLUTIONS = (96, 256, 384, 384, 256)
HIDDEN = 4096
GROUPED = (2, 4, 5)
PIXELS = 58.0
"""Deviation of ImageNet's pixels: Caffe feeds 0 to 255 less the mean, not standardised images."""

# Deviation, fan-in and bias that BVLC starts each layer with.
_START = {
    "conv1": (0.01, 363, 0.0),
    "conv2": (0.01, 1200, 0.1),
    "conv3": (0.01, 2304, 0.0),
    "conv4": (0.01, 1728, 0.1),
    "conv5": (0.01, 1728, 0.1),
    "fc6": (0.005, 9216, 0.1),
    "fc7": (0.005, 4096, 0.1),
    "fc8": (0.01, 4096, 0.0),
}


def _layer(
    module: nn.Conv2d | nn.Linear, name: str, batch_norm: bool, response: bool, dropout: float
) -> OrderedDict[str, nn.Module]:
    """A layer and what follows it, by name."""
    number = name[-1]
    parts: OrderedDict[str, nn.Module] = OrderedDict({name: module})
    if batch_norm:
        convolution = isinstance(module, nn.Conv2d)
        outputs = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        parts[f"bn{number}"] = (nn.BatchNorm2d if convolution else nn.BatchNorm1d)(outputs)
    parts[f"relu{number}"] = nn.ReLU(inplace=True)
    if response:
        assert isinstance(module, nn.Conv2d)
        parts[f"norm{number}"] = ResponseNorm(module.out_channels)
    if dropout:
        parts[f"drop{number}"] = nn.Dropout(dropout)
    return parts


def layers(
    inputs: int,
    side: int,
    classes: int,
    convolutions: Sequence[int],
    hidden: int,
    *,
    batch_norm: bool,
    groups: int = 1,
    dropout: float = 0.5,
) -> OrderedDict[str, nn.Module]:
    """AlexNet's layers by the names of the paper: conv1 to conv5, fc6 to fc8."""
    small, tiny = side < 128, side < 24
    body: OrderedDict[str, nn.Module] = OrderedDict()
    for number, outputs in enumerate(convolutions, 1):
        kernel = 5 if number <= 2 and not tiny else 3
        shape = (kernel, 1, kernel // 2) if small or number > 1 else (11, 4, 0)
        split = groups if number in GROUPED else 1
        module = nn.Conv2d(inputs, outputs, *shape, groups=split, bias=not batch_norm)
        response = number <= 2 and not batch_norm
        body |= _layer(module, f"conv{number}", batch_norm, response, 0.0)
        if number in (2, 5) or (number == 1 and not tiny):
            body[f"pool{number}"] = nn.MaxPool2d(2) if small else nn.MaxPool2d(3, 2)
        inputs = outputs
    body["flatten"] = nn.Flatten()
    first = next(iter(body.values()))
    assert isinstance(first, nn.Conv2d)
    features = flat_features(nn.Sequential(body), first.in_channels, side)
    for name in ("fc6", "fc7"):
        linear = nn.Linear(features, hidden, bias=not batch_norm)
        body |= _layer(linear, name, batch_norm, False, dropout)
        features = hidden
    body["fc8"] = nn.Linear(features, classes)
    return body


def _initialise(body: OrderedDict[str, nn.Module]) -> None:
    for name, (deviation, fan_in, bias) in _START.items():
        module = body[name]
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        own = module.weight[0].numel()
        nn.init.normal_(module.weight, 0.0, deviation * math.sqrt(fan_in / own))
        if module.bias is not None:
            nn.init.constant_(module.bias, bias)


def _build(inputs: int, side: int, classes: int, width: float, batch_norm: bool) -> nn.Sequential:
    widths = [channels(c, width, 2) for c in CONVOLUTIONS]
    body = layers(
        inputs,
        side,
        classes,
        widths,
        channels(HIDDEN, width),
        batch_norm=batch_norm,
        groups=2,
    )
    _initialise(body)
    return nn.Sequential(OrderedDict({"pixels": Scale(PIXELS)}) | body)


def alexnet(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """(n, inputs, side, side) images to (n, classes) logits."""
    return _build(inputs, side, classes, width, batch_norm=False)


def alexnet_bn(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """(n, inputs, side, side) images to (n, classes) logits."""
    return _build(inputs, side, classes, width, batch_norm=True)


def small_alexnet_bn(width: int = 16, hidden: int = 128, dropout: float = 0.2) -> nn.Sequential:
    """AlexNet-BN at the size of a digit: (n, 1, 8, 8) images to (n, 10) logits.

    The demonstration's: PyTorch's initialisation, no groups, less dropout.
    """
    convolutions = (width, 2 * width, 3 * width, 3 * width, 2 * width)
    return nn.Sequential(layers(1, 8, 10, convolutions, hidden, batch_norm=True, dropout=dropout))
