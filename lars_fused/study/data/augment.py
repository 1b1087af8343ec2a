"""Augmentation in small: what the paper does to ImageNet's images, on images of any size.

The draws belong to the images of a whole step and to its seed, so they do not depend on how the
step is cut into micro-batches or divided among processes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 1 / 8
"""The paper crops 224 of 256 pixels: an eighth is cut away, on either side."""


def views(kind: str, images: int, seed: int) -> Tensor | None:
    """An affine map (n, 2, 3) for each image of a step, as `affine_grid` takes it."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(images, generator=generator)

    if kind == "minimal":
        width = height = torch.ones(images)
        room = torch.full((images,), 2 * SHIFT)
        reach_x = reach_y = room
    else:  # Szegedy et al., 2015
        area, aspect = uniform(0.08, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        reach_x, reach_y = 1 - width, 1 - height
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    maps = torch.zeros(images, 2, 3)
    maps[:, 0, 0], maps[:, 1, 1] = width * flip, height
    maps[:, 0, 2], maps[:, 1, 2] = reach_x * uniform(-1, 1), reach_y * uniform(-1, 1)
    return maps


def apply(images: Tensor, maps: Tensor) -> Tensor:
    """The images seen through their maps; what lies outside continues the border."""
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
