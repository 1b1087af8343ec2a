"""The training loop: every experiment of the package trains through `Trainer`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lars_fused import LARS, multi_tensor_l2norm
from lars_fused.study import files, networks
from lars_fused.study.data import Data, hold_out, in_unit_range
from lars_fused.study.data.augment import apply, views
from lars_fused.study.errors import StudyError
from lars_fused.study.evaluation import evaluation
from lars_fused.study.history import Evaluation, History
from lars_fused.study.optimizers import MomentumCorrection, optimizer_for, schedule_for
from lars_fused.study.order import Batches, Order, mixed, pieces, share, warmup_steps
from lars_fused.study.ranks import Ranks, RunningStatistics, alone
from lars_fused.study.settings import Settings

CHECKPOINT_SECONDS = 20.0

_AUGMENT, DROPOUT = 1, 2
"""Kinds of random numbers, each with seeds of its own."""


class Recorder:
    """What may look on while a run trains; the demonstration's keeps the first steps."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """When gradients are ready and the step is not yet taken."""

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """When the step is taken."""


def check_micro_batches(settings: Settings, model: nn.Module, ranks: Ranks) -> None:
    """Refuses before the start what batch normalisation would stumble over in the middle.

    Raises:
        StudyError: a process or a micro-batch would have too few images.
    """
    batch, micro = settings.batch, settings.micro_batch
    if batch < ranks.size:
        raise StudyError(f"--batch {batch} is smaller than the {ranks.size} processes")
    cut = pieces(torch.arange(batch), micro, ranks.size)
    if networks.normalises_batches(model) and len(cut[-1]) < 2:
        raise StudyError(
            f"--batch {batch} with --micro-batch {micro or batch} on {ranks.size} processes "
            "leaves one image to a micro-batch; batch normalisation needs two"
        )


class Trainer:
    """One run: the model, its optimizer, and the history.

    The seed alone fixes the initial weights, the order of the images, augmentation and dropout;
    each step and micro-batch has random numbers of its own, so a run that is resumed, or divided
    among processes, draws the same ones.

    Args:
        settings: of the run.
        data: as `lars_fused.study.data.load` gives it; the validation split is taken here.
        ranks: the processes that train together; this one alone by default.
        checkpoint: the file to resume from if it exists, and to save to now and then.
        model: to train in place of the network that the settings name.
        recorder: looks on.
        order: which images a step takes, in place of shuffled epochs; `settings.order` names it.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        *,
        ranks: Ranks | None = None,
        checkpoint: Path | None = None,
        model: Callable[[], nn.Module] | None = None,
        recorder: Recorder | None = None,
        order: Batches | None = None,
    ):
        self.settings, self.checkpoint = settings, checkpoint
        self.ranks = ranks or alone()
        self.recorder = recorder or Recorder()
        if settings.pixels == "unit":
            data = in_unit_range(data)
        self.unseen = data.test if settings.validation and settings.test_too else None
        self.data = hold_out(data, settings.validation) if settings.validation else data
        images = len(self.data.train)
        self.order = order or Order(images, settings.batch, settings.seed)
        self.steps = self.order.steps(settings.epochs)
        torch.manual_seed(settings.seed)
        if model is None:
            built = networks.build(
                settings.network, self.data.shape, len(self.data.classes), settings.width
            )
        else:
            built = model()
        self.model = built.to(self.ranks.device)
        check_micro_batches(settings, self.model, self.ranks)
        self.optimizer = optimizer_for(settings, self.model, self.ranks.device)
        warmup = warmup_steps(settings, images)
        self.schedule = schedule_for(settings, self.optimizer, warmup, self.steps)
        self.correction = MomentumCorrection(settings.momentum_correction, self.optimizer)
        self.statistics = RunningStatistics(self.model, self.ranks)
        self.trained = self._distributed()
        named = list(self.model.named_parameters())
        self.history = History(layer_names=[name for name, _ in named])
        self.parameters = [parameter for _, parameter in named]
        self.step = 0
        self.seconds = 0.0
        self._resume()

    def _distributed(self) -> nn.Module:
        if self.ranks.size == 1:
            return self.model
        cuda = self.ranks.device.type == "cuda"
        ids = [self.ranks.device.index] if cuda else None
        # Buffers are merged after each step instead (RunningStatistics).
        return DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)

    # -------------------------------------------------------------------- checkpoints

    def _resume(self) -> None:
        path = self.checkpoint
        if path is None or not self.ranks.agree(path.exists()):
            return
        saved = files.read_tensors(path)
        if saved["settings"] != self.settings.as_dict():
            raise StudyError(f"{path} belongs to a run with other settings; delete it")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.correction.previous = saved["previous_rates"]
        self.history = History.from_dict(saved["history"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        """Everything that the rest of the run depends on; a file whole or not at all."""
        if self.checkpoint is None or not self.ranks.first:
            return
        state = {
            "settings": self.settings.as_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "previous_rates": self.correction.previous,
            "history": asdict(self.history),
            "step": self.step,
            "seconds": self.seconds,
        }
        files.write_tensors(self.checkpoint, state)

    # ----------------------------------------------------------------------- training

    def _micro_batches(self, chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This rank's share of a step: the piece's number, images, labels."""
        split, seed = self.data.train, mixed(self.settings.seed, self.step, _AUGMENT)
        maps = views(self.settings.augment, len(chosen), seed)
        cut = pieces(torch.arange(len(chosen)), self.settings.micro_batch, self.ranks.size)
        for number in share(len(cut), self.ranks.rank, self.ranks.size):
            places = cut[number]
            images = split.images.take(chosen[places])
            if maps is not None:
                images = apply(images, maps[places])
            labels = split.labels[chosen[places]]
            yield number, images.to(self.ranks.device), labels.to(self.ranks.device)

    def _gradients(self) -> float:
        """The gradient of the mean loss over the global batch; that loss."""
        chosen = self.order.chosen(self.step)
        total = torch.zeros((), device=self.ranks.device)
        # Each piece adds its sum over the global batch's size; DDP divides by the ranks.
        weight = self.ranks.size / len(chosen)
        batches = list(self._micro_batches(chosen)) if self.ranks.size > 1 else None
        count = 0
        mine = len(batches) if batches is not None else 0
        self.statistics.before()
        for number, images, labels in batches or self._micro_batches(chosen):
            count += 1
            seed_dropout(mixed(self.settings.seed, self.step, DROPOUT + number), images.device)
            with self._synchronised(count == mine):
                loss = F.cross_entropy(self.trained(images), labels, reduction="sum") * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.statistics.after(count)
        return float(self.ranks.total(total) / self.ranks.size)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """DDP adds up gradients in the last backward pass of a step alone."""
        if last or not isinstance(self.trained, DistributedDataParallel):
            return nullcontext()
        return self.trained.no_sync()

    def take_step(self) -> None:
        """One step of the optimizer and what it measures."""
        self.optimizer.zero_grad()
        loss = self._gradients()
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.correction.before_step(first=self.step == 0)
        recorded = self._due(self.settings.layers, first=True)
        norms = self._norms() if recorded else ([], [])
        self.recorder.before(self.optimizer)
        self.optimizer.step()
        self.recorder.after(self.optimizer)
        self.schedule.step()
        self.step += 1
        self.history.losses.append(loss)
        self.history.rates.append(lr)
        if recorded:
            self.history.layers.append(
                {
                    "step": self.step,
                    "lr": lr,
                    "weight": norms[0],
                    "gradient": norms[1],
                    "trust_ratio": self._trust_ratios(),
                }
            )
        if not math.isfinite(loss):
            self.history.diverged = self.step

    def advance(self) -> None:
        """One step, and the evaluation that is due after it."""
        self.take_step()
        if self._due(self.settings.evaluations):
            self.history.evaluations.append(self.evaluate())

    def _norms(self) -> tuple[list[float], list[float]]:
        """N(w) and N(g) of every tensor, by the library's fused norms."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "every parameter of these networks is used"
        both = multi_tensor_l2norm([*self.parameters, *gradients], backend=self.backend).tolist()
        return both[: len(gradients)], both[len(gradients) :]

    @property
    def backend(self) -> str:
        """Of norms: on a CPU the portable one, whatever TRITON_INTERPRET says."""
        return "auto" if self.ranks.device.type == "cuda" else "torch"

    def _trust_ratios(self) -> list[float]:
        if not isinstance(self.optimizer, LARS):
            return []
        found = {str(name): stats for name, stats in self.optimizer.layer_stats().items()}
        return [found[name].trust_ratio for name in self.history.layer_names]

    def _due(self, times: int, *, first: bool = False) -> bool:
        """Whether the coming step (or, unless `first`, the one just taken) is one of `times`."""
        if not times:
            return False
        every = max(1, self.steps // times)
        if first:
            return self.step % every == 0
        return self.step % every == 0 or self.step == self.steps or bool(self.history.diverged)

    def run(
        self,
        progress: Callable[[Trainer], None] = lambda trainer: None,
        stop_after: int | None = None,
    ) -> History:
        """Train to the end, or to `stop_after` steps in all; saves there and now and then."""
        last = self.steps if stop_after is None else min(stop_after, self.steps)
        saved = began = time.perf_counter()
        before = self.seconds
        while self.step < last and not self.history.diverged:
            self.advance()
            now = time.perf_counter()
            self.seconds = before + now - began
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
            progress(self)
        self.save()
        return self.history

    def evaluate(self) -> Evaluation:
        """The present model on the test images, and on as many of the training images."""
        splits = self.data.train, self.data.test
        return evaluation(self.model, self.step, splits, self.unseen, self.ranks.device)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout on `device` draws from.

    `torch.manual_seed` does so for all devices; where no GPU has been used yet, it formats and
    keeps a traceback at every call, which takes as long as a small network's forward pass.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
