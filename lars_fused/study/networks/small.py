"""Small networks: F2 and C1 of Keskar et al., the coursework's three, and a linear model."""

from __future__ import annotations

from torch import nn

from lars_fused.study.networks.blocks import channels, flat_features


def linear(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """Softmax regression; the width has nothing to act on."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs * side * side, classes))


def f2(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """F2: seven layers of 512 ReLU units with batch normalisation.

    Keskar et al., "On Large-Batch Training for Deep Learning", 2016; there for TIMIT, 360 features
    to 1,973 classes.
    """
    units = channels(512, width)
    features = inputs * side * side
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(7):
        parts += [nn.Linear(features, units), nn.BatchNorm1d(units), nn.ReLU(inplace=True)]
        features = units
    return nn.Sequential(*parts, nn.Linear(features, classes))


def c1(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """C1: twice 64 filters of 5x5 with stride 2 and max pooling, then 384 and 192 units.

    Keskar et al., 2016; there for CIFAR-10. Batch normalisation in every hidden layer, dropout of
    0.5 behind the two fully connected ones. The size of the pooling is not in the text: 3 with
    stride 2, as in AlexNet. Below 24 pixels the convolutions have stride 1, and the pooling is 2.
    """
    stride = 2 if side >= 24 else 1
    filters = channels(64, width)
    body: list[nn.Module] = []
    reached = inputs
    for _ in range(2):
        body += [nn.Conv2d(reached, filters, 5, stride, 2), nn.BatchNorm2d(filters), nn.ReLU(True)]
        body.append(nn.MaxPool2d(3, 2, 1) if side >= 24 else nn.MaxPool2d(2))
        reached = filters
    body.append(nn.Flatten())
    features = flat_features(nn.Sequential(*body), inputs, side)
    for units in (channels(384, width), channels(192, width)):
        body += [nn.Linear(features, units), nn.BatchNorm1d(units), nn.ReLU(True), nn.Dropout(0.5)]
        features = units
    return nn.Sequential(*body, nn.Linear(features, classes))


def _glorot(network: nn.Sequential) -> nn.Sequential:
    """Affine layers by Glorot's uniform rule, kernels from U(−0.01, 0.01), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, -0.01, 0.01)
        else:
            continue
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    return network


def _affine(features: int, units: list[int], classes: int, batch_norm: bool) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for outputs in units:
        parts.append(nn.Linear(features, outputs))
        parts += [nn.BatchNorm1d(outputs)] if batch_norm else []
        parts.append(nn.ReLU(inplace=True))
        features = outputs
    return [*parts, nn.Linear(features, classes)]


def multilayer(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """Two hidden layers of 100 ReLU units: the coursework's baseline for EMNIST."""
    units = channels(100, width)
    parts = _affine(inputs * side * side, [units, units], classes, batch_norm=False)
    return _glorot(nn.Sequential(nn.Flatten(), *parts))


def multilayer_bn(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """The same with batch normalisation before each ReLU (section 4)."""
    units = channels(100, width)
    parts = _affine(inputs * side * side, [units, units], classes, batch_norm=True)
    return _glorot(nn.Sequential(nn.Flatten(), *parts))


def multilayer_bn_normal(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """The same, with scale and shift drawn from N(0, 1) as the coursework has them."""
    network = multilayer_bn(inputs, side, classes, width)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network


def multilayer_bn_frozen(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """The same, with scale and shift that never move: what the coursework's defect amounted to."""
    network = multilayer_bn_normal(inputs, side, classes, width)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.requires_grad_(False)
    return network


def one_convolution(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """10 filters of 5x5, max pooling, 576 and 160 units (section 5)."""
    filters = channels(10, width)
    body = [nn.Conv2d(inputs, filters, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten()]
    units = [channels(576, width), channels(160, width)]
    parts = _affine(filters * (side // 2) ** 2, units, classes, batch_norm=False)
    return _glorot(nn.Sequential(*body, *parts))


def two_convolutions(inputs: int, side: int, classes: int, width: float = 1.0) -> nn.Sequential:
    """5 and 10 filters of 5x5, each with max pooling, then 150 units (section 5)."""
    first, second = channels(5, width), channels(10, width)
    body: list[nn.Module] = []
    for reached, filters in ((inputs, first), (first, second)):
        body += [nn.Conv2d(reached, filters, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2)]
    parts = _affine(second * (side // 4) ** 2, [channels(150, width)], classes, batch_norm=False)
    return _glorot(nn.Sequential(*body, nn.Flatten(), *parts))
