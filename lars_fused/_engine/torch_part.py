"""The tensors of a step that torch operations update, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from . import decayed_norm, torch_step
from . import tensors as step_tensors
from .tensors import Scaling, StepTensors

Tables = tuple[Tensor, Tensor, Tensor]


class _Taken(NamedTuple):
    """One step on a CPU."""

    found: torch_step.Found
    options: list[Options]
    scale: float
    whole: bool  # each tensor is a whole layer, not a shard

    def tables(self, now: StepTensors | None = None) -> Tables:
        """Squared norms, ratios, learning rates. `now`: the step's tensors, to find N(d) from."""
        sums, ratios = self.found.tables()
        lr = torch_step.learning_rates(self.options, ratios)
        if now is not None and self.whole:
            for i in sums[:, 2].isnan().nonzero().view(-1).tolist():
                known: tuple[float, float] = tuple(sums[i, :2].tolist())
                sums[i, 2] = decayed_norm.square(
                    now.weights[i], now.grads[i], now.buffers[i], self.options[i], float(lr[i]),
                    float(ratios[i]), self.scale, known,
                )  # fmt: skip
        return sums, ratios, lr


class TorchPart:
    """Some tensors of a step, on one device, and whether their first step is pending."""

    def __init__(self, device: torch.device, index: list[int], first: list[bool]):
        self.device, self.index, self._first = device, index, first
        self._taken = 0
        self._flagged: Tensor | None = None  # steps that a flag on the device did not skip
        self._memo: dict[Any, Any] = {}  # torch_step's preparation for these tensors
        self._last: _Taken | None = None  # on a CPU
        self._tables: Tables | None = None  # elsewhere

    def run(
        self, tensors: StepTensors, groups: Sequence[int], options: Sequence[Options],
        scaling: Scaling, whole: Tensor | None,
    ) -> None:  # fmt: skip
        """Take one step.

        Args:
            tensors: of the whole step.
            groups: for each tensor, its index into `options`.
            options: hyper-parameters of each group.
            scaling: loss scale, and the flag that skips the step.
            whole: N(w)², N(g)², N(d)² of whole layers, for tensors that other ranks share.
        """
        flag = scaling.found_inf
        if flag is not None and (self.device.type == "cpu" or step_tensors.on_host(flag)):
            if float(flag) != 0:
                return
            flag = None
        own, scale = self._options(groups, options), self._scale(scaling)
        mine = tensors if len(self.index) == len(tensors.weights) else tensors.select(self.index)
        found = torch_step.step_(
            *mine[:4], own, self._first_now(own), scale, whole, flag, memo=self._memo
        )
        if self.device.type == "cpu":
            self._last = _Taken(found, own, float(scale), whole is None)
        else:
            sums, ratios = found.tables()
            tables = sums, ratios, torch_step.learning_rates(own, ratios)
            if flag is not None:
                passed = flag.to(self.device).reshape(()) == 0
                if self._tables is not None:
                    a, b, c = map(torch.where, [passed] * 3, tables, self._tables)
                    tables = a, b, c
                self._flagged = passed.long() + (0 if self._flagged is None else self._flagged)
            self._tables = tables
        if flag is None:
            self._first, self._taken = [False] * len(self.index), self._taken + 1

    def _first_now(self, own: list[Options]) -> list[bool]:
        """Whether this is a tensor's first step, synchronising only if necessary."""
        if self.device.type == "cpu":
            return self._first
        # New buffers are zero: without dampening the first step is like any other.
        first = [f and o.dampening != 0 for f, o in zip(self._first, own, strict=True)]
        if any(first) and self._flagged is not None and int(self._flagged) > 0:
            first = self._first = [False] * len(first)
        return first

    def square_sums(
        self, tensors: StepTensors, groups: Sequence[int], options: Sequence[Options],
        scaling: Scaling,
    ) -> Tensor:  # fmt: skip
        """N(w)², N(g)², N(d)² of each tensor; for sharded ones, of this rank's part."""
        mine, own = tensors.select(self.index), self._options(groups, options)
        return torch_step.square_sums_of(
            mine.weights, mine.grads, own, self._scale(scaling), memo=self._memo
        )

    def _options(self, groups: Sequence[int], options: Sequence[Options]) -> list[Options]:
        own = [options[groups[i]] for i in self.index]
        if self.device.type == "cpu" and any(isinstance(o.lr, Tensor) for o in options):
            return [o._replace(lr=float(o.lr)) for o in own]  # the tensor may be written later
        return own

    def _scale(self, scaling: Scaling) -> float | Tensor:
        scale = scaling.grad_scale
        return 1.0 if scale is None else scale.to(self.device).double()

    def results(self, now: StepTensors | None = None) -> tuple[list[int], Tensor, Tensor] | None:
        """Each tensor's index, sums, and [q, γq] in the last step that was taken.

        `now`: the tensors of the whole step, if N(g + βw) is wanted where the step did without.
        """
        mine = None if now is None else now.select(self.index)
        tables = self._tables if self._last is None else self._last.tables(mine)
        if tables is None:
            return None
        sums, ratios, lr = tables
        return self.index, sums, torch.stack([ratios, ratios * lr], 1)

    def steps_taken(self) -> int:
        """How many steps found_inf did not skip. Synchronises if necessary."""
        return self._taken + (0 if self._flagged is None else int(self._flagged))
