"""The tensors of a step that torch operations update, on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Options
from . import decayed_norm, torch_step
from . import tensors as step_tensors
from .partition import Choice
from .tensors import Scaling, StepTensors


class Results(NamedTuple):
    """What a step measured, as tables: squared norms [n, 3], trust ratios and γ [n]."""

    sums: Tensor
    ratios: Tensor
    lr: Tensor

    def tables(self, _: StepTensors | None = None) -> Results:
        """As they are."""
        return self

    def where(self, passed: Tensor, before: Results) -> Results:
        """These, or those of the step before if the device skipped this one."""
        return Results(*(torch.where(passed, a, b) for a, b in zip(self, before, strict=True)))


class HostResults(NamedTuple):
    """What a step on a CPU measured, as numbers, and what else N(d) follows from."""

    found: torch_step.Found
    options: list[Options]
    scale: float
    whole: bool  # each tensor is a whole layer, not a shard

    def tables(self, now: StepTensors | None = None) -> Results:
        """As tables. `now`: the step's tensors, to find N(d) from."""
        sums, ratios = self.found.tables()
        lr = torch_step.learning_rates(self.options, ratios)
        if now is not None and self.whole:
            for i in sums[:, 2].isnan().nonzero().view(-1).tolist():
                known: tuple[float, float] = tuple(sums[i, :2].tolist())
                sums[i, 2] = decayed_norm.square(
                    now.weights[i], now.grads[i], now.buffers[i], self.options[i], float(lr[i]),
                    float(ratios[i]), self.scale, known,
                )  # fmt: skip
        return Results(sums, ratios, lr)


class _Progress:
    """Which tensors still wait for their first step, and how many steps were taken."""

    def __init__(self, device: torch.device, first: list[bool]):
        self._first = first
        self._certain = 0
        self._in_doubt = False  # a flag on the device decided about a step
        self._flagged = torch.zeros((), dtype=torch.int64, device=device)  # how often it let it be

    def note(self, passed: Tensor | None) -> None:
        """A step was taken: for certain (None), or where `passed` is true."""
        if passed is None:
            self._first, self._certain = [False] * len(self._first), self._certain + 1
        else:
            self._in_doubt = True
            self._flagged += passed

    def first(self, options: list[Options]) -> list[bool]:
        """Whether this is a tensor's first step, synchronising only if necessary."""
        if self._flagged.device.type == "cpu":
            return self._first
        # New buffers are zero: without dampening the first step is like any other.
        first = [f and o.dampening != 0 for f, o in zip(self._first, options, strict=True)]
        if any(first) and self._in_doubt and int(self._flagged) > 0:
            first = self._first = [False] * len(first)
        return first

    def taken(self) -> int:
        """How many steps found_inf did not skip. Synchronises if necessary."""
        return self._certain + (int(self._flagged) if self._in_doubt else 0)


class TorchPart:
    """Some tensors of a step, on one device, divided between torch's backends."""

    def __init__(
        self, index: list[int], tensors: StepTensors, groups: Sequence[int],
        options: Sequence[Options], first: Sequence[bool], reasons: Mapping[int, str],
        split: bool = False,
    ):  # fmt: skip
        """Divide the tensors and plan their steps; nothing is written.

        Args:
            index: which of the step's tensors, all on one device.
            tensors: of the whole step.
            groups: for each tensor, its index into `options`.
            options: hyper-parameters of each group.
            first: for each tensor, whether its next step is its first.
            reasons: for each of `index`, why the kernels do not update it.
            split: `square_sums` will be called, for tensors that other ranks share.
        """
        mine = tensors.select(index)
        self._reasons = reasons
        self.index, self.device = index, mine.weights[0].device
        self._progress = _Progress(self.device, [first[i] for i in index])
        own = [options[groups[i]] for i in index]
        self._step = torch_step.prepare(*mine[:4], own)
        # Separate batches: those of a step also have rows for its buffers.
        self._norms = torch_step.prepare_norms(mine.weights, mine.grads, own) if split else None

    def run(
        self, tensors: StepTensors, groups: Sequence[int], options: Sequence[Options],
        scaling: Scaling, whole: Tensor | None, before: Results | HostResults | None,
    ) -> Results | HostResults | None:  # fmt: skip
        """Take one step.

        Args:
            tensors: of the whole step.
            groups: for each tensor, its index into `options`.
            options: hyper-parameters of each group.
            scaling: loss scale, and the flag that skips the step.
            whole: N(w)², N(g)², N(d)² of whole layers, for tensors that other ranks share.
            before: what the step before measured.

        Returns:
            What was measured; where the step was skipped, `before`.
        """
        flag = scaling.found_inf
        if flag is not None and (self.device.type == "cpu" or step_tensors.on_host(flag)):
            if float(flag) != 0:
                return before
            flag = None
        own, scale = self._options(groups, options), self._scale(scaling)
        mine = tensors if len(self.index) == len(tensors.weights) else tensors.select(self.index)
        found = torch_step.step_(
            *mine[:4], own, self._progress.first(own), scale, whole, flag, prepared=self._step
        )
        if self.device.type == "cpu":
            self._progress.note(None)
            return HostResults(found, own, float(scale), whole is None)
        sums, ratios = found.tables()
        results = Results(sums, ratios, torch_step.learning_rates(own, ratios))
        if flag is None:
            self._progress.note(None)
            return results
        passed = flag.to(self.device).reshape(()) == 0
        self._progress.note(passed)
        return results if before is None else results.where(passed, before.tables())

    def square_sums(
        self, tensors: StepTensors, groups: Sequence[int], options: Sequence[Options],
        scaling: Scaling,
    ) -> Tensor:  # fmt: skip
        """N(w)², N(g)², N(d)² of each tensor; for sharded ones, of this rank's part."""
        mine, own = tensors.select(self.index), self._options(groups, options)
        return torch_step.square_sums_of(
            mine.weights, mine.grads, own, self._scale(scaling), prepared=self._norms
        )

    def _options(self, groups: Sequence[int], options: Sequence[Options]) -> list[Options]:
        if self.device.type == "cpu" and any(isinstance(o.lr, Tensor) for o in options):
            options = [o._replace(lr=float(o.lr)) for o in options]  # it may be written later
        return [options[groups[i]] for i in self.index]

    def _scale(self, scaling: Scaling) -> float | Tensor:
        scale = scaling.grad_scale
        return 1.0 if scale is None else scale.to(self.device).double()

    def choices(self) -> dict[int, Choice]:
        """Which backend updates each tensor, and why."""
        offered, parts, reasons = self._step.division
        found = {}
        for name, part in parts.items():
            for at in part:
                i = self.index[at]
                refused = [("triton", self._reasons[i])]
                refused += [(offered, reasons[at])] if at in reasons else []
                found[i] = Choice(name, tuple(refused))
        return found

    def steps_taken(self) -> int:
        """How many steps found_inf did not skip. Synchronises if necessary."""
        return self._progress.taken()
