"""Doing the plan: the parts that are not yet in the out folder, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from lars_fused.study import files, networks, runs
from lars_fused.study.data import Data
from lars_fused.study.experiments.minibatch import metrics, perceptual, prune
from lars_fused.study.experiments.minibatch.compare import DISTANCES, Comparison, Distances, load
from lars_fused.study.experiments.minibatch.plan import ARMS, METRICS, Plan, cut
from lars_fused.study.loop import Trainer
from lars_fused.study.order import steps_for
from lars_fused.study.runs import Result

Progress = Callable[[Trainer], None]


@dataclass(frozen=True)
class Part:
    """A comparison, or a run of an arm: parts need nothing of one another."""

    kind: str
    name: str
    seed: int = 0

    @property
    def label(self) -> str:
        """For people."""
        return self.name if self.kind == "comparison" else f"{self.name}, seed {self.seed}"


def parts(plan: Plan) -> list[Part]:
    """All of a plan, in the order in which they are done."""
    found = [Part("comparison", metric) for metric in plan.metrics]
    return found + [Part("arm", arm, s) for s in range(plan.prune_seeds) for arm in ARMS]


class Workshop:
    """The data of a study with what is derived from it when it is first needed.

    Args:
        plan: of the study.
        data: that the plan names.
        out: the folder of the study.
        features: the file of `--features`.
    """

    def __init__(self, plan: Plan, data: Data, out: Path, features: Path | None = None):
        self.plan, self.data, self.out, self.features = plan, data, out, features

    @cached_property
    def eye(self) -> nn.Module:
        """The network whose features are compared: from the file, or trained for the purpose."""
        base = self.plan.base
        if self.features is not None:
            return perceptual.from_file(self.features, self.data, base.network, base.width)
        settings = self.plan.own_features
        runs.train(settings, self.out, data=self.data, keep_weights=True)
        classes = len(self.data.classes)
        built = networks.build(settings.network, self.data.shape, classes, settings.width)
        built.load_state_dict(files.read_tensors(runs.folder_of(self.out, settings) / runs.WEIGHTS))
        return built

    @cached_property
    def scores(self) -> dict[str, metrics.Scores]:
        """Of every metric that the plan needs."""
        needed = METRICS if self.plan.prune_seeds else self.plan.metrics
        images = self.data.train.images
        return {
            name: metrics.scores(name, images, self.eye if name == "perceptual" else None)
            for name in needed
        }

    @property
    def orders(self) -> Mapping[str, Tensor]:
        """The images by ascending score."""
        return {name: metrics.ascending(found) for name, found in self.scores.items()}

    def comparison(self, metric: str) -> Comparison:
        """Algorithm 1 in the order of a metric, from where it stands."""
        settings = self.plan.comparison(metric)
        batches = cut(self.orders[metric], settings.batch)
        return Comparison(settings, self.data, batches, runs.folder_of(self.out, settings))

    def compare(self, metric: str, progress: Progress) -> int:
        """Do a comparison, unless it is finished; how many cached gradients were damaged."""
        if found(self.plan, metric, self.out) is not None:
            return 0
        comparison = self.comparison(metric)
        comparison.cache.check_space()
        comparison.run(progress)
        comparison.finish()
        return comparison.cache.damaged

    def train(self, arm: str, seed: int, progress: Progress) -> Result:
        """Do a run of an arm, unless it is finished."""
        settings = self.plan.arm(arm, seed)
        total = steps_for(settings.epochs, settings.batch, len(self.data.train))
        order = prune.order_of(arm, settings, self.orders, total) if arm != "random" else None
        result = runs.train(settings, self.out, data=self.data, progress=progress, order=order)
        assert result is not None, "it was trained to the end"
        return result


def found(plan: Plan, metric: str, out: Path) -> tuple[Result, Distances] | None:
    """A finished comparison."""
    settings = plan.comparison(metric)
    result = runs.find(out, settings)
    if result is None:
        return None
    return result, load(runs.folder_of(out, settings) / DISTANCES)


def arms(plan: Plan, out: Path) -> dict[str, list[Result]]:
    """The runs of each arm by seed, of the seeds that all arms have finished."""
    rows = [
        [runs.find(out, plan.arm(arm, seed)) for arm in ARMS] for seed in range(plan.prune_seeds)
    ]
    present = [[result for result in row if result is not None] for row in rows]
    whole = [row for row in present if len(row) == len(ARMS)]
    return {arm: [row[i] for row in whole] for i, arm in enumerate(ARMS)}
