"""ResNet-50, version 1: the stride in the first convolution of a bottleneck.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (224x224, 25,557,032
parameters). Below 64 pixels the stem is 3x3 with stride 1 and without pooling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused.study.networks.blocks import channels, conv_bn_relu, initialise_residual

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels and blocks of each stage."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, four times as many channels out; added to a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            *conv_bn_relu(inputs, inner, 1, stride),
            *conv_bn_relu(inner, inner, 3),
            *conv_bn_relu(inner, 4 * inner, 1)[:2],
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * inner:
            self.shortcut = nn.Sequential(*conv_bn_relu(inputs, 4 * inner, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, 4 inner, h / stride, w / stride)."""
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet50(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """(n, inputs, side, side) images to (n, classes) logits."""
    reached = channels(64, width)
    if side < 64:
        blocks = conv_bn_relu(inputs, reached, 3)
    else:
        blocks = [*conv_bn_relu(inputs, reached, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, (published, depth) in enumerate(STAGES):
        inner = channels(published, width)
        for block in range(depth):
            blocks.append(Bottleneck(reached, inner, 2 if stage and not block else 1))
            reached = 4 * inner
    network = nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(reached, classes)
    )
    initialise_residual(network)
    return network
