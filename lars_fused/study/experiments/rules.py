"""Learning rules and networks compared: grids, batch normalisation, convolutions.

Every point of a grid trains with several seeds at a constant rate on the same training images,
validation images held out; accuracy is measured after every epoch. The epoch with the best
validation accuracy is the one an early stop would have kept, and the test accuracy reported is the
one of that epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from lars_fused.study import files, runs
from lars_fused.study.data import Data
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import coursework
from lars_fused.study.history import Evaluation
from lars_fused.study.loop import Trainer
from lars_fused.study.plans import StudyPlan
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

RULES = ("sgd", "rmsprop", "adam", "lars")


@dataclass(frozen=True)
class Plan(StudyPlan):
    """The whole study; `base` is what all runs share.

    Attributes:
        base: batch, epochs, data, images held out.
        rules: of `RULES`.
        sgd_lrs, rmsprop_lrs: their grids.
        adam_lrs, adam_beta1, adam_beta2: Adam's grid is their product.
        lars_lrs, lars_momenta, lars_decays: of LARS's, γ, momentum and weight decay.
        seeds: runs of a point of a grid.
        networks: trained with Adam at the coursework's choice.
        network_seeds: runs of each.
    """

    rules: tuple[str, ...]
    sgd_lrs: tuple[float, ...]
    rmsprop_lrs: tuple[float, ...]
    adam_lrs: tuple[float, ...]
    adam_beta1: tuple[float, ...]
    adam_beta2: tuple[float, ...]
    lars_lrs: tuple[float, ...]
    lars_momenta: tuple[float, ...]
    lars_decays: tuple[float, ...]
    seeds: int
    networks: tuple[str, ...]
    network_seeds: int

    def __post_init__(self) -> None:
        """Refuses an unfair comparison."""
        for rule in self.rules:
            if rule not in RULES:
                raise StudyError(f"--rules {rule} is unknown; choose from {', '.join(RULES)}")
        if not self.rules and not self.networks:
            raise StudyError("--rules none and --networks none leave nothing to train")
        adam, lars = len(self.grid("adam")), len(self.grid("lars"))
        if {"adam", "lars"} <= set(self.rules) and adam != lars:
            raise StudyError(
                f"the grid of Adam has {adam} points and that of LARS {lars}: they are compared "
                "only if they are tuned alike; change --adam-* or --lars-*"
            )

    def grid(self, rule: str) -> list[Settings]:
        """The points of a rule's grid, with seed 0."""
        base = replace(self.base, optimizer=rule, network="mlp")
        if rule == "sgd":
            return [replace(base, lr=lr) for lr in self.sgd_lrs]
        if rule == "rmsprop":
            beta = coursework.RMSPROP_DECAY
            return [replace(base, lr=lr, beta2=beta) for lr in self.rmsprop_lrs]
        if rule == "adam":
            points = product(self.adam_lrs, self.adam_beta1, self.adam_beta2)
            return [replace(base, lr=lr, beta1=b1, beta2=b2) for lr, b1, b2 in points]
        points = product(self.lars_lrs, self.lars_momenta, self.lars_decays)
        return [replace(base, lr=lr, momentum=m, weight_decay=wd) for lr, m, wd in points]

    def network(self, name: str) -> Settings:
        """How a network is trained: sections 4 to 6."""
        lr, beta1, beta2 = coursework.CHOSEN
        return replace(self.base, optimizer="adam", network=name, lr=lr, beta1=beta1, beta2=beta2)

    def runs(self) -> list[Settings]:
        """Every run, none twice; neighbours differ in cost, so that shares take about as long."""
        grids = [
            replace(point, seed=seed)
            for rule in self.rules
            for point in self.grid(rule)
            for seed in range(self.seeds)
        ]
        others = [
            replace(self.network(name), seed=seed)
            for name in self.networks
            for seed in range(self.network_seeds)
        ]
        return list(dict.fromkeys([*others, *grids]))


def keeps_weights(settings: Settings) -> bool:
    """Whether a run's weights are needed: to see how far batch normalisation moved."""
    return settings.network.startswith("mlp-bn")


def described(settings: Settings) -> str:
    """A point of a grid in a few words."""
    words = [f"lr {settings.lr:g}"]
    if settings.optimizer == "adam":
        words += [f"β1 {settings.beta1:g}", f"β2 {settings.beta2:g}"]
    if settings.optimizer == "lars":
        words += [f"μ {settings.momentum:g}", f"decay {settings.weight_decay:g}"]
    return ", ".join(words)


@dataclass(frozen=True)
class Peak:
    """The epoch of a run with the best validation accuracy, and what came after it."""

    result: Result
    at: Evaluation
    last: Evaluation

    @property
    def epoch(self) -> float:
        """Counted from 1."""
        return self.at["step"] * self.result.epochs_per_step

    @property
    def fallen(self) -> float:
        """Over-fitting as lost validation accuracy: the best less the last, in points."""
        return self.at["test_accuracy"] - self.last["test_accuracy"]

    @property
    def gap(self) -> float:
        """Over-fitting as the gap at the end: training less validation accuracy, in points."""
        return self.last["train_accuracy"] - self.last["test_accuracy"]


def peak(result: Result) -> Peak:
    """The first of the epochs with the best validation accuracy."""
    every = result.history.evaluations
    return Peak(result, max(every, key=lambda e: (e["test_accuracy"], -e["step"])), every[-1])


@dataclass(frozen=True)
class Outcome:
    """The finished runs of a point, by seed."""

    settings: Settings
    peaks: tuple[Peak, ...]

    @property
    def validation(self) -> list[float]:
        """Best validation accuracy by seed."""
        return [p.at["test_accuracy"] for p in self.peaks]

    @property
    def test(self) -> list[float]:
        """Test accuracy at that epoch, by seed."""
        return [p.at["unseen_accuracy"] for p in self.peaks]

    @property
    def first(self) -> list[float]:
        """Validation accuracy after the first epoch, by seed."""
        return [p.result.history.evaluations[0]["test_accuracy"] for p in self.peaks]

    @property
    def mean(self) -> float:
        """Of the best validation accuracies."""
        return statistics.mean(self.validation)


def outcome(point: Settings, seeds: int, out: Path) -> Outcome | None:
    """A point whose runs are all there."""
    found = [runs.find(out, replace(point, seed=seed)) for seed in range(seeds)]
    done = [peak(result) for result in found if result is not None]
    return Outcome(point, tuple(done)) if len(done) == seeds else None


def outcomes(points: Iterable[Settings], seeds: int, out: Path) -> list[Outcome]:
    """The points that are finished."""
    return [o for p in points if (o := outcome(p, seeds, out)) is not None]


def best(found: Sequence[Outcome]) -> Outcome:
    """The point with the best mean; of equals the first of the grid."""
    return max(found, key=lambda o: o.mean)


def moved(result: Result, out: Path, data: Data) -> dict[str, float]:
    """How far training moved each scale and shift of batch normalisation: ‖w − w₀‖/‖w₀‖.

    w₀ is the network as the seed makes it. A shift that starts at zero has ‖w‖ instead.
    """
    start = Trainer(result.settings, data).model
    trained = files.read_tensors(runs.folder_of(out, result.settings) / runs.WEIGHTS)
    found = {}
    for name, module in start.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for part in ("weight", "bias"):
                before = getattr(module, part).detach()
                size = float(before.norm()) or 1.0
                found[f"{name}.{part}"] = float((trained[f"{name}.{part}"] - before).norm()) / size
    return found
