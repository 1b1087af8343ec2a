"""Doing the plan: training, sharpness, paths; each result is kept beside the run it is of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lars_fused.study import files, networks, runs
from lars_fused.study.data import Data, first
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.sharpness.maximise import Sharpness, sharpness
from lars_fused.study.experiments.sharpness.plan import PATHS, Box, Plan, Series, digest
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns, Subspace
from lars_fused.study.experiments.sharpness.surface import Point, Surface, Weights, along
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings

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


def measure(data: Data, settings: Settings, box: Box, out: Path) -> Sharpness:
    """The sharpness of a finished run: from its file, or by maximising."""
    path = runs.folder_of(out, settings) / box.name
    if path.exists():
        return _read(path, box)
    train = (first(data, box.images) if box.images else data).train
    built = network(data, settings)
    built.load_state_dict(weights(out, settings))
    surface = Surface(built, train)
    space = subspace_of(box, len(surface.start))
    found = sharpness(surface, surface.start, space, box.epsilon, iterations=box.iterations)
    files.write_json(path, {"box": asdict(box), "sharpness": asdict(found)})
    return found


def _read(path: Path, box: Box) -> Sharpness:
    saved = files.read_json(path)
    try:
        if saved["box"] != asdict(box):
            raise StudyError("it is of another box")
        nan = float("nan")
        values: dict[str, Any] = {k: nan if v is None else v for k, v in saved["sharpness"].items()}
        return Sharpness(**values)
    except (KeyError, TypeError, AttributeError, StudyError) as error:
        raise StudyError(
            f"{path} is not a sharpness ({error}); delete it and repeat the command"
        ) from error


def _path_file(series: Series, path: str, out: Path) -> Path:
    facts: dict[str, Any] = {"from": series.ends[0].key, "points": series.plan.points}
    return runs.folder_of(out, series.ends[1]) / f"path-{path}-{digest(facts)}.json"


def walk(data: Data, series: Series, path: str, out: Path) -> list[Point]:
    """Figure 5 for one series: from its file, or by evaluating every point."""
    found = walked(series, path, out)
    if found is not None:
        return found
    small, large = (weights(out, s) for s in series.ends)
    splits = data.train, data.test
    built = network(data, series.ends[0])
    points = along(built, (small, large), path, series.plan.alphas, splits)
    files.write_json(_path_file(series, path, out), {"points": [asdict(p) for p in points]})
    return points


def walked(series: Series, path: str, out: Path) -> list[Point] | None:
    """The points of a path, if they have been evaluated."""
    file = _path_file(series, path, out)
    if not file.exists():
        return None
    saved = files.read_json(file)
    try:
        nan = float("nan")
        rows = [{k: nan if v is None else v for k, v in p.items()} for p in saved["points"]]
        return [Point(**row) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{file} is not a path ({error}); delete it and repeat the command"
        ) from error


@dataclass(frozen=True)
class Measurement:
    """A finished run with its sharpness in every box."""

    result: Result
    sharpness: dict[tuple[str, float], Sharpness]


def finished(plan: Plan, out: Path) -> list[Measurement]:
    """The runs that are finished and measured."""
    found = []
    for series in plan.series():
        for settings in reversed(series.runs):
            result, folder = runs.find(out, settings), runs.folder_of(out, settings)
            boxes = {(b.matrix, b.epsilon): b for b in plan.boxes()}
            if result is None or not all((folder / b.name).exists() for b in boxes.values()):
                continue
            values = {key: _read(folder / b.name, b) for key, b in boxes.items()}
            found.append(Measurement(result, values))
    return found


def paths(plan: Plan, out: Path) -> dict[tuple[str, str], list[Point]]:
    """The finished paths of the first seed, by optimizer and kind."""
    found = {}
    for series in plan.series():
        for path in PATHS:
            points = walked(series, path, out) if series.seed == 0 else None
            if points is not None:
                found[series.optimizer, path] = points
    return found
