"""Everything that determines a run, as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lars_fused import conventions, scaled_lr
from lars_fused.study.errors import StudyError

CONVENTIONS = tuple(sorted(conventions.__all__))
CHOICES = {
    "optimizer": ("lars", "sgd", "rmsprop", "adam"),
    "convention": CONVENTIONS,
    "scaling": ("none", "linear", "sqrt"),
    "decay": ("poly", "step", "cosine", "constant"),
    "augment": ("none", "minimal", "extended"),
    "pixels": ("standardised", "unit"),
}


@dataclass(frozen=True)
class Settings:
    """One training run. Two runs with equal settings on the same machine have equal results.

    Attributes:
        data: a name of `lars_fused.study.data.NAMES`.
        resolution: pixels a side that the images are resampled to; 0 leaves them.
        train_images: training images used; 0 for all.
        validation: training images held out to stand in for the test set; 0 for the test set.
        augment: "none"; "minimal" shifts by up to an eighth and flips; "extended" crops 8 to 100 %
            of the area at aspect ratios of 3/4 to 4/3 and flips.
        pixels: "standardised" by channel over the training images, or "unit", in [0, 1].
        network, width: a name of `lars_fused.study.networks.NETWORKS`, and its share of channels.
        optimizer, convention: `convention` is for LARS: a name of `lars_fused.conventions`.
        lr: γ at `base_batch` images a step, or as it is with scaling="none".
        scaling, base_batch: the rule by which γ goes from `base_batch` to `batch`.
        trust_coefficient: η of LARS; 0 takes the convention's.
        momentum: of LARS and SGD.
        beta1, beta2: Adam's; beta2 is also RMSprop's decay.
        weight_decay: β; biases and normalisation are left out unless `adapt_all`.
        adapt_all: decay and adapt every tensor, as the paper's Algorithm 1 is written.
        batch: images per step, over all processes and micro-batches.
        micro_batch: images in memory at once; 0 for as many as a process has. Batch normalisation
            sees one micro-batch at a time.
        epochs: how often each image is shown.
        warmup_epochs, warmup_start: linear warm-up, from that share of γ.
        decay, power: the shape after warm-up; `power` is the polynomial's.
        milestones, step_factor: shares of the run after which decay="step" multiplies γ.
        momentum_correction: None leaves each optimizer its own form; True has the momentum buffer
            follow changes of γ (Goyal et al., 2017, remark 2), False not.
        seed: of the initial weights, the order of the images, augmentation and dropout.
        test_too: with `validation`, measure the test set as well, apart from the held-out images.
        evaluations: about how many times the test set is looked at; the last step always is one.
        layers: about how many times every layer's norms are recorded; the first step is one.
        order: what decides the images of a step: "" for one shuffle an epoch, else the name that
            an experiment gives to its own order.
    """

    data: str = "digits"
    resolution: int = 0
    train_images: int = 0
    validation: int = 0
    augment: str = "none"
    pixels: str = "standardised"
    network: str = "mlp"
    width: float = 1.0
    optimizer: str = "lars"
    convention: str = "PAPER"
    lr: float = 5.0
    scaling: str = "none"
    base_batch: int = 256
    trust_coefficient: float = 0.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 5e-4
    adapt_all: bool = False
    batch: int = 256
    micro_batch: int = 0
    epochs: float = 20.0
    warmup_epochs: float = 0.0
    warmup_start: float = 0.1
    decay: str = "poly"
    power: float = 2.0
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    step_factor: float = 0.1
    momentum_correction: bool | None = None
    seed: int = 0
    test_too: bool = False
    evaluations: int = 10
    layers: int = 0
    order: str = ""

    def __post_init__(self) -> None:
        """Refuses what no run can use, by the name of its option."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _refused(self, name, f"one of {', '.join(allowed)}")
        for name in ("batch", "base_batch", "evaluations"):
            if getattr(self, name) < 1:
                raise _refused(self, name, "at least 1")
        for name in ("lr", "epochs", "power", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise _refused(self, name, "a positive number")
        for name in (
            "trust_coefficient",
            "weight_decay",
            "warmup_epochs",
            "warmup_start",
            "step_factor",
            "micro_batch",
            "validation",
            "layers",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise _refused(self, name, "not negative")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _refused(self, name, "in [0, 1)")
        if self.warmup_start > 1:
            raise _refused(self, "warmup_start", "in [0, 1]")
        if list(self.milestones) != sorted(self.milestones) or any(
            not 0 < m < 1 for m in self.milestones
        ):
            raise _refused(self, "milestones", "shares of the run in ascending order")

    @property
    def peak_lr(self) -> float:
        """γ after warm-up, scaled to the batch."""
        if self.scaling == "none":
            return self.lr
        return scaled_lr(self.lr, self.batch, self.base_batch, self.scaling)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Settings:
        """What `as_dict` made; an unknown name means a file of another version."""
        known = {field.name for field in fields(cls)}
        if unknown := set(saved) - known:
            raise StudyError(f"settings of another version: {', '.join(sorted(unknown))}")
        return cls(**(saved | {"milestones": tuple(saved["milestones"])}))

    @property
    def key(self) -> str:
        """A name for the run's folder: readable, and different for different settings."""
        # Defaults are left out: a setting that a later version adds leaves earlier runs findable.
        defaults = Settings().as_dict()
        chosen = {k: v for k, v in self.as_dict().items() if v != defaults[k]}
        text = json.dumps(chosen, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.optimizer}-b{self.batch}-lr{self.peak_lr:.4g}-s{self.seed}-{digest}"


def _refused(settings: Settings, name: str, allowed: str) -> StudyError:
    option = "--" + name.replace("_", "-")
    return StudyError(f"{option} {getattr(settings, name)} is not allowed: it must be {allowed}")
