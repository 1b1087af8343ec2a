"""Scikit-learn's digits as four tensors, and the demonstration's network: for short scripts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lars_fused.study import data
from lars_fused.study.networks.alexnet import small_alexnet_bn

__all__ = ["Digits", "load", "small_alexnet_bn"]


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32, standardised over the training set; labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """The 1,297 training and 500 test images of `lars_fused.study.data.load("digits")`."""
    found = data.load("digits")
    every = [
        (split.images.take(torch.arange(len(split))), split.labels)
        for split in (found.train, found.test)
    ]
    return Digits(*every[0], *every[1])
