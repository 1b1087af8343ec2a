"""Events for TensorBoard, for those who want to watch a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lars_fused.study.errors import StudyError

if TYPE_CHECKING:
    from lars_fused.study.loop import Trainer


class Events:
    """Writes the loss and rate of every step, and every evaluation, under `folder`."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise StudyError(
                "--tensorboard needs the package tensorboard: pip install tensorboard"
            ) from error
        # A resumed run writes its steps since the checkpoint again: the old ones are hidden.
        self.writer = SummaryWriter(str(folder), purge_step=step)

    def __call__(self, trainer: Trainer) -> None:
        """To be called after every step."""
        history, step = trainer.history, trainer.step
        figures = {"training loss": history.losses[-1], "learning rate": history.rates[-1]}
        if history.evaluations and history.evaluations[-1]["step"] == step:
            evaluation = dict(history.evaluations[-1])
            evaluation.pop("step")
            figures |= evaluation  # type: ignore[arg-type]
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self.writer.close()
