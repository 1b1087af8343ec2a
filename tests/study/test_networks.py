"""Networks: published parameter counts at the published input, and small images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lars_fused.study import networks
from lars_fused.study.errors import StudyError
from lars_fused.study.networks import NETWORKS
from lars_fused.study.networks.blocks import ResponseNorm

pytestmark = pytest.mark.cpu


def affine(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


# By hand from the texts where nobody printed a count.
BIASES = 96 + 256 + 384 + 384 + 256 + 4096 + 4096
PUBLISHED = {
    "alexnet": 60_965_224,  # BVLC's bvlc_alexnet
    "alexnet-bn": 60_965_224 + BIASES,  # a scale and a shift in place of each bias
    "resnet50": 25_557_032,  # He et al.'s, as every model zoo counts it
    "googlenet": 6_998_552,  # BVLC's bvlc_googlenet without its auxiliary classifiers
    "dpn92": 34_236_634,  # kuangliu/pytorch-cifar
    "f2": affine(360, 512) + 6 * affine(512, 512) + 7 * 2 * 512 + affine(512, 1973),
    "c1": affine(3 * 25, 64) + affine(64 * 25, 64) + 4 * 64  # two convolutions, normalised
    + affine(64 * 2 * 2, 384) + affine(384, 192) + 2 * (384 + 192) + affine(192, 10),
    "mlp": affine(784, 100) + affine(100, 100) + affine(100, 47),
    "mlp-bn": affine(784, 100) + affine(100, 100) + affine(100, 47) + 4 * 100,
    "mlp-bn-normal": affine(784, 100) + affine(100, 100) + affine(100, 47) + 4 * 100,
    "mlp-bn-frozen": affine(784, 100) + affine(100, 100) + affine(100, 47),
    "conv1": affine(25, 10) + affine(1960, 576) + affine(576, 160) + affine(160, 47),
    "conv2": affine(25, 5) + affine(125, 10) + affine(490, 150) + affine(150, 47),
    "linear": affine(784, 47),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_published_parameter_counts(name: str) -> None:
    channels, side, classes = NETWORKS[name].input
    with torch.device("meta"):
        shape = (channels, side, side)
        # Building runs the convolutions once: without memory that takes no time.
        network = networks.build(name, shape, classes)
    assert networks.parameters(network) == NETWORKS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_small_images_reach_every_parameter(name: str, shape: tuple[int, int, int]) -> None:
    if name == "dpn92" and shape != (3, 32, 32):
        shape = (1, 8, 8)
    network = networks.build(name, shape, 7, 1 / 16 if name == "dpn92" else 1 / 8)
    output = network(torch.randn(3, *shape))
    assert output.shape == (3, 7)
    output.square().sum().backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # A bias in front of a batch normalisation moves nothing; dropout and ReLU may close a path.
    dead = [n for n in still if not n.endswith("bias")]
    assert len(dead) <= 2, dead


def test_alexnet_is_bvlcs() -> None:
    network = networks.build("alexnet", (3, 227, 227), 1000, 0.25)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [c.groups for c in convolutions] == [1, 2, 1, 2, 2]
    assert [c.out_channels for c in convolutions] == [24, 64, 96, 96, 64]
    assert network.fc6.in_features == 64 * 6 * 6
    assert [n for n in ("bn1", "norm1", "norm3") if hasattr(network, n)] == ["norm1"]
    # Gaussians as wide as BVLC's after the loss of fan-in: 0.01 sqrt(2304 / 576) for conv3.
    assert network.conv3.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.conv4.bias.eq(0.1).all()


def test_resnet_is_version_1() -> None:
    network = networks.build("resnet50", (3, 64, 64), 10, 0.125)
    strided = [
        module.kernel_size
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2) and "branch" in name
    ]
    assert strided == [(1, 1)] * 3


def test_response_normalisation_is_torchs() -> None:
    images = 50 * torch.randn(2, 12, 5, 4, dtype=torch.float64)
    ours = ResponseNorm(12).double()(images)
    # Ours multiplies by α/5 where torch averages over five: float64's rounding lies between.
    assert torch.allclose(ours, nn.LocalResponseNorm(5)(images), rtol=1e-12, atol=1e-12)


def test_the_courseworks_initialisation() -> None:
    network = networks.build("conv2", (1, 28, 28), 47)
    first, second = (m for m in network if isinstance(m, nn.Conv2d))
    for convolution in (first, second):
        assert 0.009 < convolution.weight.abs().max() <= 0.01
        assert convolution.bias.eq(0).all()
    glorot = (6 / (490 + 150)) ** 0.5
    hidden = next(m for m in network if isinstance(m, nn.Linear))
    assert 0.99 * glorot < hidden.weight.abs().max() <= glorot


@pytest.mark.parametrize(
    ("name", "shape", "width", "message"),
    [
        ("vgg", (1, 8, 8), 1.0, "--network vgg is unknown; choose from alexnet"),
        ("mlp", (1, 8, 9), 1.0, "square images of at least 6 pixels a side, not 9 x 8"),
        ("mlp", (1, 4, 4), 1.0, "square images"),
        ("mlp", (1, 8, 8), 5.0, r"--width 5 is not allowed: it must lie in \(0, 4\]"),
    ],
)
def test_impossible_networks_are_refused(name, shape, width, message) -> None:
    with pytest.raises(StudyError, match=message):
        networks.build(name, shape, 10, width)
