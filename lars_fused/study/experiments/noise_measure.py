"""tr(Σ) and |G|² of a network: exactly, from every example's gradient, and by `NoiseScale`.

The examples are the population: G is their mean gradient, Σ the covariance of the gradient of one
of them drawn at random. `NoiseScale` sees batches drawn with replacement, as the derivation of the
noise scale has them (Smith and Le, 2018; equations 7 to 14 of the lecture that `noise` follows).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lars_fused.distributed import NoiseScale
from lars_fused.study import networks
from lars_fused.study.errors import StudyError
from lars_fused.study.order import mixed

Loss = Callable[[Tensor, Tensor], Tensor]

AT_ONCE = 64
"""Examples whose gradients are in memory together."""

PLAIN_MEAN = 1.0 - 1e-9
"""A decay so slow that the running average of `NoiseScale` is the mean of its updates."""


@dataclass(frozen=True)
class Noise:
    """tr(Σ), |G|² and their ratio, with standard errors; an exact value's are 0."""

    trace: float
    square: float
    trace_error: float = 0.0
    square_error: float = 0.0
    value_error: float = 0.0

    @property
    def value(self) -> float:
        """tr(Σ)/|G|², in examples."""
        return self.trace / self.square if self.square > 0 else math.inf


def check(name: str, model: nn.Module) -> None:
    """Refuses a network in which one example's gradient depends on the others, or on chance.

    Raises:
        StudyError: it has batch normalisation or dropout.
    """
    if networks.normalises_batches(model) or any(
        isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules()
    ):
        raise StudyError(
            f"--network {name}: an example has no gradient of its own under batch normalisation or "
            "dropout; choose one without, such as mlp or conv2"
        )


def exact(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = F.cross_entropy) -> Noise:
    """From the gradient of every example, in float64.

    Args:
        model: not modified.
        images: (n, ...), the whole population.
        labels: (n, ...).
        loss: (outputs, labels) to their mean loss.
    """
    model = copy.deepcopy(model).double()
    _without_in_place(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(at: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss(functional_call(model, at, (image[None],)), label[None])

    each = vmap(grad(one), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = 0.0
    at_once = (torch.split(every, AT_ONCE) for every in (images, labels))
    for some, answers in zip(*at_once, strict=True):
        wide = answers.double() if answers.is_floating_point() else answers
        for name, gradients in each(weights, some.double(), wide).items():
            total[name] += gradients.sum(0)
            squares += float(gradients.square().sum())
    count = len(images)
    square = sum(float((t / count).square().sum()) for t in total.values())
    return Noise(squares / count - square, square)


def _without_in_place(model: nn.Module) -> None:
    """Vmap refuses to write into what it has not batched."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def estimated(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    small: int,
    pieces: int,
    updates: int,
    repeats: int,
    seed: int,
    loss: Loss = F.cross_entropy,
) -> Noise:
    """By `repeats` independent `NoiseScale`s; their spread gives the standard errors.

    Args:
        model: not modified; its gradients are.
        images: the population that batches are drawn from, with replacement.
        labels: of the images.
        small: b, the size of a micro-batch.
        pieces: how many of them make the batch B = b · pieces.
        updates: batches that each `NoiseScale` sees.
        repeats: independent estimates, at least 2.
        seed: of the draws.
        loss: (outputs, labels) to their mean loss.
    """
    parameters = list(model.parameters())
    traces, squares = [], []
    for repeat in range(repeats):
        noise = NoiseScale(small, decay=PLAIN_MEAN)
        generator = torch.Generator().manual_seed(mixed(seed, repeat, 0))
        for _ in range(updates):
            chosen = torch.randint(len(images), (pieces, small), generator=generator)
            model.zero_grad()
            for part in chosen:
                torch.autograd.backward(loss(model(images[part]), labels[part]) / pieces)
                noise.micro_batch(parameters)
            noise.update()
        traces.append(noise.covariance_trace)
        squares.append(noise.gradient_square)
    model.zero_grad()
    return combined(traces, squares)


def combined(traces: list[float], squares: list[float]) -> Noise:
    """Independent estimates as one; the ratio's standard error by leaving out one at a time."""
    count = len(traces)

    def error(values: list[float]) -> float:
        return statistics.stdev(values) / math.sqrt(count)

    sums = sum(traces), sum(squares)
    left = [(sums[0] - t) / (sums[1] - s) for t, s in zip(traces, squares, strict=True)]
    ratio_error = (count - 1) / math.sqrt(count) * statistics.stdev(left)
    return Noise(sums[0] / count, sums[1] / count, error(traces), error(squares), ratio_error)
