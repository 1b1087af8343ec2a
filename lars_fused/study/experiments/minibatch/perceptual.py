"""Perceptual distance to the mean image, through the deep features of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lars_fused.study import files, networks, runs
from lars_fused.study.data import Data, Images
from lars_fused.study.errors import StudyError


def features(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The output of every ReLU, each position's channels scaled to length 1.

    Raises:
        StudyError: the network has no ReLU.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        # A copy: a later layer may work in place.
        seen.append(nn.functional.normalize(output.detach().clone(), dim=1, eps=1e-10))

    hooks = [m.register_forward_hook(keep) for m in network.modules() if isinstance(m, nn.ReLU)]
    if not hooks:
        raise StudyError(
            "perceptual distance compares what ReLU layers put out, and this network has none: "
            "choose another --network, give --features, or leave out the metric perceptual"
        )
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            network(images)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def between(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Zhang et al. (2018), equation 1 with weights 1: squares, mean over places, sum over layers.

    Args:
        ours: features of n images, each (n, channels, ...).
        theirs: of one image, or of n.

    Returns:
        float64 of shape (n,).
    """
    total = torch.zeros(len(ours[0]), dtype=torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        squares = (a - b).double().square().sum(1)
        total += squares.flatten(1).mean(1) if squares.ndim > 1 else squares
    return total


def mean_image(images: Images, every: Iterable[Tensor]) -> Tensor:
    """The average of all images, standardised like them; (1, channels, h, w)."""
    total, count = torch.zeros(images.shape, dtype=torch.float64), 0
    for chosen in every:
        total += images.take(chosen).double().sum(0)
        count += len(chosen)
    return (total / count).float()[None]


def distances(
    network: nn.Module, images: Images, every: Iterable[Tensor]
) -> npt.NDArray[np.float64]:
    """The distance of each image to the mean image; `every` are their numbers, in pieces."""
    pieces = list(every)
    average = features(network, mean_image(images, pieces))
    found = [between(features(network, images.take(chosen)), average) for chosen in pieces]
    return torch.cat(found).numpy()


def digest(path: Path) -> str:
    """A short digest of a file of weights, by which runs that depend on it are told apart.

    Raises:
        StudyError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise StudyError(f"--features {path} cannot be read ({error.strerror})") from error


def from_file(path: Path, data: Data, network: str, width: float) -> nn.Module:
    """The network whose weights are in `path`: the weights.pt of a run of `lars-study train`.

    The result.json beside it says which network it is; without one it is `network` at `width`.

    Raises:
        StudyError: the weights are damaged, or are not of that network for images of this shape.
    """
    beside = path.with_name(runs.RESULT)
    if beside.exists():
        settings = runs.read(beside).settings
        network, width = settings.network, settings.width
    saved = files.read_tensors(path)
    if not isinstance(saved, dict) or not saved:
        raise StudyError(f"--features {path} is not the weights.pt of a run")
    classes = len(list(saved.values())[-1])
    built = networks.build(network, data.shape, classes, width)
    try:
        built.load_state_dict(saved)
    except RuntimeError as error:
        shape = "x".join(map(str, data.shape))
        raise StudyError(
            f"--features {path} does not fit {network} at width {width:g} for images of {shape}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    return built
