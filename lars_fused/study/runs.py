"""A folder of finished runs: each is found by its settings, and none is repeated."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lars_fused
from lars_fused.study import files, networks
from lars_fused.study.data import Data, hold_out, load
from lars_fused.study.errors import StudyError
from lars_fused.study.events import Events
from lars_fused.study.history import History
from lars_fused.study.loop import Trainer, check_micro_batches
from lars_fused.study.order import Batches, Order
from lars_fused.study.ranks import Ranks, alone
from lars_fused.study.settings import Settings

RESULT, CHECKPOINT, WEIGHTS = "result.json", "checkpoint.pt", "weights.pt"


@dataclass(frozen=True)
class Result:
    """A finished run as its file has it."""

    settings: Settings
    history: History
    steps: int
    images: int
    parameters: int
    seconds: float
    facts: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Test (or validation) accuracy at the end, in percent."""
        return self.history.accuracy

    @property
    def epochs_per_step(self) -> float:
        """The share of an epoch that a step is."""
        return self.settings.batch / self.images


def versions() -> dict[str, str]:
    """Of everything that a result can depend on."""
    found = {"python": platform.python_version(), "lars_fused": lars_fused.__version__}
    found["torch"] = torch.__version__
    for name in ("numpy", "triton", "scikit-learn", "scikit-image", "scipy", "pillow", "mlxtend"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def facts(ranks: Ranks) -> dict[str, Any]:
    """Where and by which command a result came about."""
    cuda = ranks.device.type == "cuda"
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "processes": ranks.size,
        "threads": torch.get_num_threads(),
        "command": ["lars-study", *sys.argv[1:]],
    }


def folder_of(out: Path, settings: Settings) -> Path:
    """Where a run with these settings lies."""
    return out / "runs" / settings.key


def find(out: Path, settings: Settings) -> Result | None:
    """The finished run with exactly these settings, if it is there."""
    path = folder_of(out, settings) / RESULT
    if not path.exists():
        return None
    result = read(path)
    if result.settings != settings:
        raise StudyError(f"{path} holds a run with other settings than its name says; delete it")
    return result


def read(path: Path) -> Result:
    """A finished run from its file.

    Raises:
        StudyError: the file is damaged or of another version.
    """
    saved = files.read_json(path)
    try:
        return Result(
            Settings.from_dict(saved["settings"]),
            History.from_dict(files.numbers(saved["history"])),
            saved["steps"],
            saved["images"],
            saved["parameters"],
            saved["seconds"],
            {k: saved[k] for k in ("versions", "device", "processes", "threads", "command")},
        )
    except (KeyError, TypeError, StudyError) as error:
        raise StudyError(
            f"{path} is not a result of this version ({error}); delete it to run it anew"
        ) from error


def train(
    settings: Settings,
    out: Path,
    *,
    ranks: Ranks | None = None,
    data: Data | None = None,
    keep_weights: bool = False,
    tensorboard: bool = False,
    progress: Callable[[Trainer], None] = lambda trainer: None,
    stop_after: int | None = None,
    order: Batches | None = None,
) -> Result | None:
    """The finished run with these settings: from its file, or by training it.

    A run that was interrupted goes on from its checkpoint, to the bitwise identical result.

    Args:
        settings: of the run.
        out: the folder of all runs.
        ranks: the processes that train together.
        data: in place of what the settings name.
        keep_weights: leave the trained weights beside the result.
        tensorboard: write events beside the result.
        progress: called after every step.
        stop_after: stop after this many steps in all, as if interrupted; then nothing is returned.
        order: which images a step takes; `settings.order` must name it.
    """
    ranks = ranks or alone()
    folder = folder_of(out, settings)
    done = ranks.agree((folder / RESULT).exists())
    if done and (not keep_weights or ranks.agree((folder / WEIGHTS).exists())):
        return find(out, settings)
    if data is None:
        data = load(settings.data, settings.resolution, settings.train_images)
    trainer = Trainer(settings, data, ranks=ranks, checkpoint=folder / CHECKPOINT, order=order)
    events = Events(folder / "events", trainer.step) if tensorboard and ranks.first else None

    def seen(trainer: Trainer) -> None:
        progress(trainer)
        if events is not None:
            events(trainer)

    try:
        history = trainer.run(seen, stop_after)
    finally:
        if events is not None:
            events.close()
    if trainer.step < trainer.steps and not history.diverged:
        return None
    result = of(trainer)
    if ranks.first:
        if keep_weights:
            files.write_tensors(folder / WEIGHTS, trainer.model.state_dict())
        write(folder, result)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def of(trainer: Trainer) -> Result:
    """What a run that is at its end has to report."""
    return Result(
        trainer.settings,
        trainer.history,
        trainer.steps,
        len(trainer.data.train),
        networks.parameters(trainer.model),
        trainer.seconds,
        facts(trainer.ranks),
    )


def write(folder: Path, result: Result) -> None:
    """The result as JSON, and as tables for whoever wants to plot it otherwise."""
    history = result.history
    files.write_csv(
        folder / "steps.csv",
        ["step", "lr", "training_loss"],
        zip(range(1, len(history.losses) + 1), history.rates, history.losses, strict=True),
    )
    columns = list(history.evaluations[0])
    files.write_csv(
        folder / "evaluations.csv",
        columns,
        ([e[c] for c in columns] for e in history.evaluations),  # type: ignore[literal-required]
    )
    saved = {
        "settings": result.settings.as_dict(),
        "accuracy": result.accuracy,
        "steps": result.steps,
        "images": result.images,
        "parameters": result.parameters,
        "seconds": result.seconds,
        **result.facts,
        "history": asdict(history),
    }
    files.write_json(folder / RESULT, saved)  # last: a run is finished when this is there


def check(settings: Settings, data: Data, ranks: Ranks | None = None) -> None:
    """Whether a run can start, so that a sweep fails at once and not after hours.

    Raises:
        StudyError: names the option that is in the way.
    """
    if settings.validation:
        data = hold_out(data, settings.validation)
    Order(len(data.train), settings.batch, settings.seed)
    model = networks.build(settings.network, data.shape, len(data.classes), settings.width)
    check_micro_batches(settings, model, ranks or alone())
