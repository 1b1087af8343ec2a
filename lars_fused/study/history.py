"""What a run measures while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict


class FinalTest(TypedDict, total=False):
    """The test set's figures where `test_*` are those of held-out training images."""

    unseen_loss: float
    unseen_accuracy: float


class Evaluation(FinalTest):
    """Losses are means over images, accuracies in percent; taken after `step` steps.

    The training figures are of as many training images as there are test images, always the same
    ones, without augmentation and dropout.
    """

    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


class LayerNorms(TypedDict):
    """One step, counted from 1: every tensor in the model's order, before the step was taken."""

    step: int
    lr: float
    weight: list[float]
    gradient: list[float]
    trust_ratio: list[float]
    """q of LARS (the paper's local lr); empty for other optimizers."""


@dataclass
class History:
    """A run's measurements, in the order in which they were taken."""

    losses: list[float] = field(default_factory=list)
    """The training loss of each step, before it was taken."""
    rates: list[float] = field(default_factory=list)
    """γ of each step."""
    evaluations: list[Evaluation] = field(default_factory=list)
    layer_names: list[str] = field(default_factory=list)
    layers: list[LayerNorms] = field(default_factory=list)
    diverged: int = 0
    """The step, from 1, whose loss was not finite and ended the run; 0 for none."""

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end, in percent."""
        return self.evaluations[-1]["test_accuracy"]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> History:
        """What `dataclasses.asdict` made."""
        return cls(**saved)
