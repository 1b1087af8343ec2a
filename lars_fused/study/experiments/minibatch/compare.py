"""Algorithm 1: how far each mini-batch's gradient is from that of all images, epoch by epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused import multi_tensor_l2norm
from lars_fused.study import files, runs
from lars_fused.study.data import Data
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch.cache import GradientCache, digest_of, stamp
from lars_fused.study.loop import CHECKPOINT_SECONDS, DROPOUT, Trainer, seed_dropout
from lars_fused.study.order import Fixed, mixed
from lars_fused.study.settings import Settings

DISTANCES, PARTIAL, CACHE = "distances.pt", "distances.partial.pt", "cache"


@dataclass
class Distances:
    """What Algorithm 1 measures, of E epochs, K mini-batches and L tensors.

    Attributes:
        names: of the L tensors.
        layers: N(∇k − ∇e) by tensor; float64, (E, K, L).
        full: N(∇e) by tensor; float64, (E, L).
        rates: γ at the start of each epoch.
    """

    names: list[str]
    layers: Tensor
    full: Tensor
    rates: list[float]

    @property
    def total(self) -> Tensor:
        """D(e, k) over all tensors together; (E, K)."""
        return self.layers.square().sum(2).sqrt()

    def phases(self) -> list[range]:
        """The training phases: stretches of epochs, counted from 0, at equal rates."""
        starts = [e for e in range(len(self.rates)) if e == 0 or self.rates[e] != self.rates[e - 1]]
        ends = [*starts, len(self.rates)][1:]
        return [range(a, b) for a, b in zip(starts, ends, strict=True)]

    def until(self, epochs: int) -> Distances:
        """The first epochs alone."""
        kept = self.layers[:epochs], self.full[:epochs], self.rates[:epochs]
        return Distances(self.names, *kept)

    def save(self, path: Path) -> None:
        """Write all of it."""
        files.write_tensors(path, dict(vars(self)))


def load(path: Path) -> Distances:
    """What `Distances.save` wrote.

    Raises:
        StudyError: the file is damaged.
    """
    saved = files.read_tensors(path)
    try:
        return Distances(**saved)
    except TypeError as error:
        raise StudyError(f"{path} holds no distances; delete it and repeat the command") from error


def mean_gradient(gradients: Callable[[int], list[Tensor]], sizes: list[int]) -> list[Tensor]:
    """Equation 3: ∇e = Σ mₖ∇ₖ / N, summed in float64; `gradients` gives those of mini-batch k."""
    total: list[Tensor] = []
    for k, size in enumerate(sizes):
        found = gradients(k)
        total = total or [torch.zeros_like(g, dtype=torch.float64) for g in found]
        for sum_, gradient in zip(total, found, strict=True):
            sum_.add_(gradient, alpha=size)
    images = sum(sizes)
    return [(sum_ / images).float() for sum_ in total]


def distance(gradients: list[Tensor], full: list[Tensor], backend: str = "auto") -> Tensor:
    """N(∇k − ∇e) of each tensor, by the library's multi-tensor norm; float64, (L,)."""
    differences = torch._foreach_sub(gradients, full)
    return multi_tensor_l2norm(list(differences), backend=backend).cpu()


class Comparison:
    """net_normal trains in a fixed order; net_compare stays at the start of the epoch.

    Interrupted, it goes on from the last epoch that was saved, and takes from the cache what is
    still valid there, to the bitwise identical result.

    Args:
        settings: of net_normal's run; `order` names the order.
        data: the images; the mini-batches count within its training set.
        batches: the mini-batches, in their fixed order.
        folder: of the run: checkpoint, cache, results.
        model: to train in place of the network that the settings name.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        batches: list[Tensor],
        folder: Path,
        model: Callable[[], nn.Module] | None = None,
    ):
        self.settings, self.batches, self.folder = settings, batches, folder
        self.trainer = Trainer(
            settings,
            data,
            checkpoint=folder / runs.CHECKPOINT,
            order=Fixed(batches),
            model=model,
        )
        parameters = self.trainer.parameters
        self.cache = GradientCache(folder / CACHE, [p.shape for p in parameters], len(batches))
        names = self.trainer.history.layer_names
        none = torch.zeros(0, len(batches), len(names), dtype=torch.float64)
        self.distances = Distances(names, none, none.sum(1), [])
        if self.trainer.step:
            held = load(folder / PARTIAL)
            self.distances = held.until(self.trainer.step // len(batches))
        self._saved = 0.0

    def run(
        self,
        progress: Callable[[Trainer], None] = lambda trainer: None,
        stop_after: int | None = None,
    ) -> Distances:
        """Train to the end, or to `stop_after` epochs in all."""
        last = round(self.settings.epochs) if stop_after is None else stop_after
        trainer = self.trainer
        while trainer.step < last * len(self.batches) and not trainer.history.diverged:
            self._epoch(progress)
        return self.distances

    def finish(self) -> None:
        """Write the results and clear the cache; the run is then a finished one."""
        self.distances.save(self.folder / DISTANCES)
        runs.write(self.folder, runs.of(self.trainer))
        self.cache.clear()
        for name in (PARTIAL, runs.CHECKPOINT):
            (self.folder / name).unlink(missing_ok=True)

    def _epoch(self, progress: Callable[[Trainer], None]) -> None:
        """One turn of the outer loop."""
        trainer, sizes = self.trainer, [len(b) for b in self.batches]
        began, rate = time.perf_counter(), float(trainer.optimizer.param_groups[0]["lr"])
        start = _Start(trainer, self.cache, self.batches)
        for k in range(len(self.batches)):
            trainer.advance()
            if trainer.history.diverged:
                return  # an epoch without an end has no full gradient
            start.gradients(k)
            progress(trainer)
        device, backend = trainer.ranks.device, trainer.backend
        full = [g.to(device) for g in mean_gradient(start.gradients, sizes)]
        rows = [
            distance([g.to(device) for g in start.gradients(k)], full, backend)
            for k in range(len(sizes))
        ]
        found = self.distances
        found.layers = torch.cat([found.layers, torch.stack(rows)[None]])
        found.full = torch.cat([found.full, multi_tensor_l2norm(full, backend=backend).cpu()[None]])
        found.rates.append(rate)
        took = time.perf_counter() - began
        trainer.seconds += took
        self._saved += took
        if self._saved > CHECKPOINT_SECONDS or trainer.step == trainer.steps:
            # Distances first: those of epochs beyond the checkpoint are cut off again.
            found.save(self.folder / PARTIAL)
            trainer.save()
            self._saved = 0.0


class _Start:
    """net_compare: the model as the epoch found it, and its gradients by way of the cache."""

    def __init__(self, trainer: Trainer, cache: GradientCache, batches: list[Tensor]):
        self.trainer, self.cache, self.batches = trainer, cache, batches
        self.first = trainer.step
        self.model = copy.deepcopy(trainer.model)
        self.parameters = list(self.model.parameters())
        self.facts = {
            "settings": trainer.settings.as_dict(),
            "parameters": digest_of(self.parameters),
        }

    def gradients(self, k: int) -> list[Tensor]:
        """∇k, from the cache; computed and cached where the cache has it not, or not any more."""
        images = digest_of([self.batches[k]])
        stamped = stamp(**self.facts, step=self.first + k, images=images)
        found = self.cache.read(k, stamped)
        if found is None:
            found = self._compute(k)
            self.cache.write(k, found, stamped)
        return found

    def _compute(self, k: int) -> list[Tensor]:
        split, chosen = self.trainer.data.train, self.batches[k]
        device = self.trainer.ranks.device
        # The random numbers of net_normal's step: dropout cuts the same units.
        seed_dropout(mixed(self.trainer.settings.seed, self.first + k, DROPOUT), device)
        output = self.model(split.images.take(chosen).to(device))
        loss = F.cross_entropy(output, split.labels[chosen].to(device))
        return [g.float().cpu() for g in torch.autograd.grad(loss, self.parameters)]
