"""Loss and accuracy of a model as it is used: in evaluation mode, over whole sets of images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused.study.data import Split
from lars_fused.study.history import Evaluation

AT_ONCE = 1000
"""Images in memory together."""


def pieces_of(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a split in order, with their labels, `AT_ONCE` at a time."""
    every = torch.arange(len(split))
    for chosen in torch.split(every, AT_ONCE):
        yield split.images.take(chosen), split.labels[chosen]


@torch.no_grad()
def evaluated(model: nn.Module, split: Split, device: torch.device) -> tuple[float, float]:
    """Mean loss, and accuracy in percent, of a model in evaluation mode."""
    training = model.training
    model.eval()
    loss, right = 0.0, 0
    for images, labels in pieces_of(split):
        output, labels = model(images.to(device)), labels.to(device)
        loss += float(F.cross_entropy(output, labels, reduction="sum"))
        right += int((output.argmax(1) == labels).sum())
    model.train(training)
    return loss / len(split), 100.0 * right / len(split)


def evaluation(
    model: nn.Module,
    step: int,
    splits: tuple[Split, Split],
    unseen: Split | None,
    device: torch.device,
) -> Evaluation:
    """What a run measures of its model now and then.

    Args:
        model: after `step` steps.
        step: counted from 1.
        splits: training and test images; of the first, as many are looked at as the second has.
        unseen: the test images, where the second of `splits` is held-out training images.
        device: of the model.
    """
    train, test = splits
    some = torch.arange(min(len(test), len(train)))
    train_loss, train_accuracy = evaluated(model, train.subset(some), device)
    test_loss, test_accuracy = evaluated(model, test, device)
    measured: Evaluation = {
        "step": step,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }
    if unseen is not None:
        loss, accuracy = evaluated(model, unseen, device)
        measured |= {"unseen_loss": loss, "unseen_accuracy": accuracy}
    return measured
