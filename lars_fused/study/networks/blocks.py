"""What several networks are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def channels(published: int, width: float, multiple: int = 1) -> int:
    """`published` channels times the width, a positive multiple of `multiple`."""
    return max(multiple, multiple * round(published * width / multiple))


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, batch normalisation, ReLU; the resolution is kept at stride 1."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class Scale(nn.Module):
    """Multiplies by a constant: what turns standardised images back into pixel units."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor


class ResponseNorm(nn.Module):
    """AlexNet's local response normalisation: x / (1 + α/5 Σ x²)^0.75 over 5 neighbouring channels.

    α = 1e-4 as in AlexNet and GoogLeNet. What `torch.nn.LocalResponseNorm(5)` computes, with the
    sum as a product with a band of ones: that one pools over a third dimension, which takes a CPU
    many times as long.
    """

    band: Tensor

    def __init__(self, channels: int):
        super().__init__()
        at = torch.arange(channels)
        band = ((at[:, None] - at).abs() <= 2).float()[:, :, None, None]
        self.register_buffer("band", band, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w), the shape kept."""
        squares = nn.functional.conv2d(x * x, self.band.to(x.dtype))
        return x / (1.0 + (1e-4 / 5) * squares) ** 0.75


def flat_features(body: nn.Module, channels: int, side: int) -> int:
    """Features that `body` makes of an image of that size."""
    training = body.training
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, channels, side, side)).numel()
    body.train(training)
    return int(features)


def initialise_residual(network: nn.Module) -> None:
    """He et al.'s normal initialisation of every convolution, from its outputs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
