"""Section 3.2: a score for every image, by which the training set is put in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lars_fused.study.data import Images
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch import perceptual

Scores = npt.NDArray[np.float64]
AT_ONCE = 1000


def pixels(images: Images) -> Callable[[Tensor], npt.NDArray[Any]]:
    """A function that gives images (n, h, w, channels) in [0, 1], of any kind of pixel.

    Bytes are divided by 255; other pixels run from 0, or their least value below it, to their
    greatest.
    """
    if not isinstance(images.pixels, Tensor) or images.pixels.dtype == torch.uint8:
        low, high = 0.0, 255.0
    else:
        stored = images.pixels[images.index]
        low, high = min(0.0, float(stored.min())), float(stored.max())
    width = (high - low) or 1.0

    def scaled(chosen: Tensor) -> npt.NDArray[Any]:
        found = (images.raw(chosen).double() - low) / width
        return found.clamp(0, 1).permute(0, 2, 3, 1).numpy()

    return scaled


def intensity(images: npt.NDArray[Any]) -> Scores:
    """M₁: the sum over all pixels and channels, of images (n, h, w, c); shape (n,)."""
    found: Scores = images.sum((1, 2, 3))
    return found


def colour(images: npt.NDArray[Any]) -> Scores:
    """The mean colour of each image in HSV, to be sorted by hue, saturation, value; (n, 3).

    A grey image has hue and saturation 0: grey images are sorted by their value.
    """
    from skimage.color import rgb2hsv

    mean = images.mean((1, 2))
    if mean.shape[1] == 1:
        mean = np.repeat(mean, 3, axis=1)
    if mean.shape[1] != 3:
        raise StudyError(f"the metric colour takes 1 or 3 channels, not {mean.shape[1]}")
    found: Scores = rgb2hsv(mean[None])[0]
    return found


def edges(images: npt.NDArray[Any]) -> Scores:
    """M₃: the number of pixels that Canny's detector marks in the grey image; (n,).

    Its smoothing is a Gaussian of 1 pixel at 32 pixels a side, and less for smaller images.
    """
    from skimage.feature import canny

    grey = images.mean(3)
    sigma = min(1.0, grey.shape[1] / 32)
    # scikit-image has no types.
    marked = [canny(one, sigma=sigma, mode="nearest") for one in grey]  # type: ignore[no-untyped-call]
    return np.array([one.sum() for one in marked], np.float64)


PIXEL_METRICS: dict[str, Callable[[npt.NDArray[Any]], Scores]] = {
    "intensity": intensity,
    "colour": colour,
    "edges": edges,
}


def scores(metric: str, images: Images, network: nn.Module | None = None) -> Scores:
    """The metric of every image; `network` is for "perceptual" alone."""
    every = torch.split(torch.arange(len(images)), AT_ONCE)
    if metric == "perceptual":
        assert network is not None, "perceptual distance needs a network"
        return perceptual.distances(network, images, every)
    scaled = pixels(images)
    return np.concatenate([PIXEL_METRICS[metric](scaled(chosen)) for chosen in every])


def ascending(found: Scores) -> Tensor:
    """Image numbers by ascending score, the first column first; equals in their own order."""
    columns = found[:, None] if found.ndim == 1 else found
    return torch.from_numpy(np.lexsort(columns.T[::-1]))
