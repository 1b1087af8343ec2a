"""The parts of a noise study that are no training runs, and how each is found or made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lars_fused.study import kept, runs
from lars_fused.study.data import Data
from lars_fused.study.experiments import noise_measure
from lars_fused.study.experiments.noise import Curve, Plan, WellCell
from lars_fused.study.experiments.noise_measure import Noise
from lars_fused.study.experiments.wells import ended_flat
from lars_fused.study.loop import Trainer
from lars_fused.study.settings import Settings

WELLS, GRADIENTS = "wells", "gradients"


def well(plan: Plan, cell: WellCell, out: Path, *, make: bool = True) -> dict[str, Any] | None:
    """Shares of a cell on the made loss: {"lr", "steps", "flat"}; None if it is not there."""
    wanted = {
        **asdict(cell), "wells": plan.wells.as_dict(), "chains": plan.chains, "time": plan.time,
        "seed": plan.base.seed,
    }  # fmt: skip
    lr = plan.wells.lr(cell.temperature, cell.batch)

    def compute() -> dict[str, Any]:
        flat, steps = ended_flat(
            plan.wells, lr, cell.batch, tilt=cell.tilt, chains=plan.chains, time=plan.time,
            seed=plan.base.seed,
        )  # fmt: skip
        return {"lr": lr, "steps": steps, "flat": flat}

    found: dict[str, Any] | None = (
        kept.measure(out, WELLS, wanted, compute) if make else kept.find(out, WELLS, wanted)
    )
    return found


def measured_run(plan: Plan, images: int) -> Settings:
    """The run along which gradient noise is measured."""
    batch = max(b for b in plan.batches if b <= images and b <= max(32, plan.batches[0]))
    return plan.settings(plan.base.lr, images, batch, 0, images)


@dataclass(frozen=True)
class Point:
    """The gradient noise after `step` steps, both ways."""

    step: int
    exact: Noise
    estimated: Noise

    @property
    def deviations(self) -> dict[str, float]:
        """How many of its standard errors each estimate is off."""
        return {
            name: (getattr(self.estimated, name) - getattr(self.exact, name))
            / (getattr(self.estimated, f"{name}_error") or math.inf)
            for name in ("trace", "square", "value")
        }


def gradient_noise(
    plan: Plan, images: int, out: Path, data: Data | None = None
) -> list[Point] | None:
    """The points at which gradient noise was measured; made if `data` is given."""
    settings = measured_run(plan, images)
    steps = sorted({round(share * plan.steps) for share in plan.measured_at})
    trainer: Trainer | None = None
    found = []
    for step in steps:
        wanted = {
            "settings": settings.as_dict(), "step": step, "examples": plan.examples,
            "small": plan.small, "pieces": plan.pieces, "updates": plan.updates,
            "repeats": plan.repeats,
        }  # fmt: skip
        held = kept.find(out, GRADIENTS, wanted)
        if held is None:
            if data is None:
                return None
            # Without a checkpoint: what an interruption costs is a few hundred steps.
            trainer = trainer or Trainer(settings, data)
            trainer.run(stop_after=step)
            held = kept.measure(out, GRADIENTS, wanted, partial(_both, plan, trainer))
        found.append(Point(step, Noise(**held["exact"]), Noise(**held["estimated"])))
    return found


def _both(plan: Plan, trainer: Trainer) -> dict[str, Any]:
    split = trainer.data.train
    some = torch.arange(min(plan.examples, len(split)))
    images, labels = split.images.take(some), split.labels[some]
    model = trainer.model
    noise_measure.check(trainer.settings.network, model)
    return {
        "exact": asdict(noise_measure.exact(model, images, labels)),
        "estimated": asdict(
            noise_measure.estimated(
                model, images, labels, small=plan.small, pieces=plan.pieces,
                updates=plan.updates, repeats=plan.repeats, seed=trainer.step,
            )
        ),
    }  # fmt: skip


def curve(plan: Plan, lr: float, size: int, images: int, out: Path) -> Curve | None:
    """A curve whose runs are all finished; half a curve may have its best batch at a false edge."""
    batches, accuracies = [], []
    for batch in plan.batches:
        if batch > size:
            continue
        found = [runs.find(out, s) for s in plan.point(lr, size, batch, images)]
        done = [result.accuracy for result in found if result is not None]
        if len(done) < plan.seeds:
            return None
        batches.append(batch)
        accuracies.append(tuple(done))
    return Curve(lr, size, tuple(batches), tuple(accuracies))
