"""Doing the plan: sharpness of finished runs and paths between them, each kept when it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lars_fused.study import files, kept, networks, runs
from lars_fused.study.data import Data, first
from lars_fused.study.experiments.sharpness.maximise import Sharpness, sharpness
from lars_fused.study.experiments.sharpness.plan import PATHS, Box, Plan, Series
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns, Subspace
from lars_fused.study.experiments.sharpness.surface import Point, Surface, Weights, along
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

SHARPNESS, WALKED = "sharpness", "paths"
"""Kinds of what is kept in the out folder."""

MATRIX_SEED = 2016
"""Of a random A: the same for all networks, so that they are compared in one subspace."""


def weights(out: Path, settings: Settings) -> Weights:
    """The trained weights of a finished run."""
    found: Weights = files.read_tensors(runs.folder_of(out, settings) / runs.WEIGHTS)
    return found


def network(data: Data, settings: Settings) -> nn.Module:
    """The network of a run, not yet its weights."""
    return networks.build(settings.network, data.shape, len(data.classes), settings.width)


def subspace_of(box: Box, n: int) -> Subspace:
    """A for a function of n numbers."""
    if box.matrix == "identity":
        return Identity(n)
    return RandomColumns(n, box.columns, MATRIX_SEED)


def _box(settings: Settings, box: Box) -> kept.Wanted:
    return {"run": settings.as_dict(), "box": asdict(box)}


def measure(data: Data, settings: Settings, box: Box, out: Path) -> Sharpness:
    """The sharpness of a finished run: from its file, or by maximising."""
    climb = partial(_climb, data, settings, box, out)
    return Sharpness(**kept.measure(out, SHARPNESS, _box(settings, box), climb))


def _climb(data: Data, settings: Settings, box: Box, out: Path) -> dict[str, Any]:
    train = (first(data, box.images) if box.images else data).train
    built = network(data, settings)
    built.load_state_dict(weights(out, settings))
    surface = Surface(built, train)
    space = subspace_of(box, len(surface.start))
    return asdict(sharpness(surface, surface.start, space, box.epsilon, iterations=box.iterations))


def measured(settings: Settings, box: Box, out: Path) -> Sharpness | None:
    """The sharpness of a run, if it has been measured."""
    held = kept.find(out, SHARPNESS, _box(settings, box))
    return None if held is None else Sharpness(**held)


def _path(series: Series, path: str) -> kept.Wanted:
    ends = [settings.as_dict() for settings in series.ends]
    return {"ends": ends, "path": path, "alphas": series.plan.alphas}


def walk(data: Data, series: Series, path: str, out: Path) -> None:
    """Figure 5 for one series: every point is evaluated, unless they are there."""
    kept.measure(out, WALKED, _path(series, path), partial(_evaluate, data, series, path, out))


def _evaluate(data: Data, series: Series, path: str, out: Path) -> list[dict[str, Any]]:
    small, large = (weights(out, s) for s in series.ends)
    splits = data.train, data.test
    built = network(data, series.ends[0])
    return [asdict(p) for p in along(built, (small, large), path, series.plan.alphas, splits)]


def walked(series: Series, path: str, out: Path) -> list[Point] | None:
    """The points of a path, if they have been evaluated."""
    held = kept.find(out, WALKED, _path(series, path))
    return None if held is None else [Point(**point) for point in held]


@dataclass(frozen=True)
class Measurement:
    """A finished run with its sharpness in every box."""

    result: Result
    sharpness: dict[tuple[str, float], Sharpness]


def finished(plan: Plan, out: Path) -> list[Measurement]:
    """The runs that are finished and measured."""
    done = []
    for series in plan.series():
        for settings in reversed(series.runs):
            result = runs.find(out, settings)
            values = {(b.matrix, b.epsilon): measured(settings, b, out) for b in plan.boxes()}
            held = {key: value for key, value in values.items() if value is not None}
            if result is not None and len(held) == len(values):
                done.append(Measurement(result, held))
    return done


def paths(plan: Plan, out: Path) -> dict[tuple[str, str], list[Point]]:
    """The finished paths of the first seed, by optimizer and kind."""
    found = {}
    for series in plan.series():
        for path in PATHS:
            points = walked(series, path, out) if series.seed == 0 else None
            if points is not None:
                found[series.optimizer, path] = points
    return found
