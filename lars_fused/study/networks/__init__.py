"""The networks of the experiments, by name, with the sizes that were published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lars_fused.study.errors import StudyError
from lars_fused.study.networks import alexnet, dpn, googlenet, resnet, small

__all__ = ["NETWORKS", "Network", "build", "normalises_batches", "parameters"]

Builder = Callable[[int, int, int, float], nn.Sequential]


@dataclass(frozen=True)
class Network:
    """How a network is built, and what it is at the input it was published for.

    Attributes:
        build: (channels, side, classes, width) to a module of (n, channels, side, side) images.
        input: (channels, side, classes) of the publication.
        parameters: their number at that input and width 1.
        about: one line for `lars-study recipes`.
    """

    build: Builder
    input: tuple[int, int, int]
    parameters: int
    about: str


IMAGENET = (3, 224, 1000)
CIFAR = (3, 32, 10)
EMNIST = (1, 28, 47)

NETWORKS = {
    "alexnet": Network(alexnet.alexnet, (3, 227, 1000), 60_965_224, "AlexNet (BVLC)"),
    "alexnet-bn": Network(
        alexnet.alexnet_bn, (3, 227, 1000), 60_974_792, "AlexNet with batch normalisation"
    ),
    "resnet50": Network(resnet.resnet50, IMAGENET, 25_557_032, "ResNet-50 v1"),
    "googlenet": Network(
        googlenet.googlenet, IMAGENET, 6_998_552, "GoogLeNet (BVLC) without auxiliary losses"
    ),
    "dpn92": Network(dpn.dpn92, CIFAR, 34_236_634, "DPN-92 for CIFAR"),
    # 360 features have no square shape: 10 channels of 6x6.
    "f2": Network(small.f2, (10, 6, 1973), 2_780_085, "F2: seven layers of 512"),
    "c1": Network(small.c1, CIFAR, 283_274, "C1: two convolutions, two layers"),
    "mlp": Network(small.multilayer, EMNIST, 93_347, "two layers of 100"),
    "mlp-bn": Network(small.multilayer_bn, EMNIST, 93_747, "two layers of 100, normalised"),
    "mlp-bn-normal": Network(
        small.multilayer_bn_normal, EMNIST, 93_747, "the same, scale and shift from N(0, 1)"
    ),
    "mlp-bn-frozen": Network(
        small.multilayer_bn_frozen, EMNIST, 93_347, "the same, scale and shift never updated"
    ),
    "conv1": Network(small.one_convolution, EMNIST, 1_229_683, "one convolution"),
    "conv2": Network(small.two_convolutions, EMNIST, 82_137, "two convolutions"),
    "linear": Network(small.linear, EMNIST, 36_895, "softmax regression"),
}


def build(name: str, shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """The network called `name` for images of that shape.

    Raises:
        StudyError: the name is unknown, the images are not square, or too small.
    """
    if name not in NETWORKS:
        raise StudyError(f"--network {name} is unknown; choose from {', '.join(NETWORKS)}")
    if not 0 < width <= 4:
        raise StudyError(f"--width {width:g} is not allowed: it must lie in (0, 4]")
    channels, side, other = shape
    if side != other or side < 6:
        raise StudyError(
            f"the networks take square images of at least 6 pixels a side, not {other} x {side}; "
            "--resolution resamples them"
        )
    return NETWORKS[name].build(channels, side, classes, width)


def parameters(network: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def normalises_batches(network: nn.Module) -> bool:
    """Whether it has batch normalisation, which takes two images to have a variance."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
