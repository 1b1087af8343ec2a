"""GoogLeNet as BVLC's Caffe has it, without its auxiliary losses.

Szegedy et al., "Going Deeper with Convolutions", 2014 (224x224, 6,998,552 parameters without the
auxiliary classifiers). No batch normalisation. Below 64 pixels the stem is 3x3 with stride 1 and
the first pooling is left out; below 24 pixels the second one too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lars_fused.study.networks.blocks import ResponseNorm, channels

# 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; projection behind the pooling. None: a pooling.
INCEPTIONS: tuple[tuple[int, ...] | None, ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


def _convolutions(widths: tuple[int, ...], *kernels: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for (inputs, outputs), kernel in zip(pairwise(widths), kernels, strict=True):
        parts += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
    return parts


class Inception(nn.Module):
    """Four branches side by side, their outputs stacked."""

    def __init__(self, inputs: int, widths: list[int]):
        super().__init__()
        one, three_in, three, five_in, five, pooled = widths
        pool = nn.MaxPool2d(3, 1, 1)
        self.branches = nn.ModuleList(
            [
                nn.Sequential(*_convolutions((inputs, one), 1)),
                nn.Sequential(*_convolutions((inputs, three_in, three), 1, 3)),
                nn.Sequential(*_convolutions((inputs, five_in, five), 1, 5)),
                nn.Sequential(pool, *_convolutions((inputs, pooled), 1)),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h, w)."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def _stem(inputs: int, side: int, first: int, second: int) -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    if side >= 64:
        opening: list[nn.Module] = [
            nn.Conv2d(inputs, first, 7, 2, 3),
            nn.ReLU(inplace=True),
            pool(),
        ]
    else:
        opening = [nn.Conv2d(inputs, first, 3, 1, 1), nn.ReLU(inplace=True)]
    closing: list[nn.Module] = [pool()] if side >= 24 else []
    between = _convolutions((first, first, second), 1, 3)
    return [*opening, ResponseNorm(first), *between, ResponseNorm(second), *closing]


def googlenet(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """(n, inputs, side, side) images to (n, classes) logits."""
    reached = channels(192, width)
    blocks = _stem(inputs, side, channels(64, width), reached)
    for published in INCEPTIONS:
        if published is None:
            blocks.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            continue
        block = Inception(reached, [channels(c, width) for c in published])
        blocks.append(block)
        reached = block.outputs
    network = nn.Sequential(
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(reached, classes),
    )
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # BVLC's: xavier, biases 0.2, the last 0
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.constant_(module.bias, 0.2 if isinstance(module, nn.Conv2d) else 0.0)
    return network
