"""DPN-92 for CIFAR: a residual and a densely connected path side by side.

Chen et al., "Dual Path Networks", 2017; stem and stages of the CIFAR variant that the mini-batch
study takes from github.com/kuangliu/pytorch-cifar (3x32x32, 34,236,634 parameters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused.study.networks.blocks import channels, conv_bn_relu, initialise_residual

# Inner channels (32 groups), residual channels, blocks, channels that each block adds.
STAGES = ((96, 256, 3, 16), (192, 512, 4, 32), (384, 1024, 20, 24), (768, 2048, 3, 128))
GROUPS = 32


class DualPath(nn.Module):
    """The first `residual` channels are added to the input's, the `dense` others are appended."""

    def __init__(
        self, inputs: int, inner: int, residual: int, dense: int, groups: int, stride: int | None
    ):
        super().__init__()
        self.residual = residual
        outputs = residual + dense
        grouped = nn.Conv2d(inner, inner, 3, stride or 1, 1, groups=groups, bias=False)
        self.branch = nn.Sequential(
            *conv_bn_relu(inputs, inner, 1),
            *(grouped, nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *conv_bn_relu(inner, outputs, 1)[:2],
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride is not None:  # the first block of a stage
            self.shortcut = nn.Sequential(*conv_bn_relu(inputs, outputs, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, c + dense, h / stride, w / stride) behind a shortcut of c."""
        kept, out = self.shortcut(x), self.branch(x)
        at = self.residual
        return F.relu(torch.cat([kept[:, :at] + out[:, :at], kept[:, at:], out[:, at:]], 1))


def dpn92(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """(n, inputs, side, side) images to (n, classes) logits.

    A stage halves the resolution only while more than 2 pixels a side are left to halve.
    """
    groups = channels(GROUPS, width)
    reached = channels(64, width)
    blocks = conv_bn_relu(inputs, reached, 3)
    for stage, (inner, residual, depth, dense) in enumerate(STAGES):
        halve = stage > 0 and side > 2
        side = -(-side // 2) if halve else side
        inner = groups * max(1, round(inner * width / groups))
        residual, dense = channels(residual, width), channels(dense, width)
        for block in range(depth):
            stride = (2 if halve else 1) if block == 0 else None
            blocks.append(DualPath(reached, inner, residual, dense, groups, stride))
            reached = residual + 2 * dense if block == 0 else reached + dense
    network = nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(reached, classes)
    )
    initialise_residual(network)
    return network
