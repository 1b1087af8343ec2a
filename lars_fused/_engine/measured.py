"""What a step measured, where the step left it: read only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..options import Options
from .launch_tables import LaunchTables
from .tensors import Addresses, StepTensors
from .torch_part import HostResults, Results, TorchPart

Row = tuple[float, ...]
"""N(w), N(g), N(d), q and γq of one tensor."""


class Measured(NamedTuple):
    """The results of one run of a prepared step. The next one overwrites those of launches."""

    addresses: Addresses
    """Where its tensors were."""
    numels: Sequence[int]
    groups: Sequence[int]
    """For each tensor, its index into `options`."""
    options: Sequence[Options]
    launches: list[tuple[list[int], LaunchTables]]
    """Each launch: its tensors, and where their sums and ratios are."""
    of_torch: dict[TorchPart, Results | HostResults | None]

    def stats(self, now: StepTensors | None) -> dict[int, Row]:
        """The row of each tensor. Synchronises.

        `now`: the step's tensors if unchanged; they yield N(d) where the step did without it.
        """
        for _, tables in self.launches:
            tables.check_queue()
        found: dict[int, Row] = {}
        for index, sums, ratios in self._results(now):
            rows = torch.cat([sums.sqrt(), ratios], 1).tolist()
            for at, (i, row) in enumerate(zip(index, rows, strict=True)):
                if self.numels[i] == 0:
                    # This rank's shard is empty; other ranks may hold some of it.
                    row[3:] = _rates(sums[at], self.options[self.groups[i]])
                found[i] = tuple(row)
        return found

    def rows_on_device(self, now: StepTensors | None) -> list[tuple[list[int], Tensor]]:
        """The same where it is, by launch and without waiting; not of empty parts of a tensor."""
        found = []
        for index, sums, ratios in self._results(now):
            rows = torch.cat([sums.sqrt(), ratios], 1)
            held = [at for at, i in enumerate(index) if self.numels[i] > 0]
            if len(held) < len(index):
                rows = torch.stack([rows[at] for at in held]) if held else rows[:0]
            found.append(([index[at] for at in held], rows))
        return found

    def _results(self, now: StepTensors | None) -> list[tuple[list[int], Tensor, Tensor]]:
        found = [
            (index, tables.memory.sums, tables.memory.ratios) for index, tables in self.launches
        ]
        for part, results in self.of_torch.items():
            if results is not None:
                mine = None if now is None else now.select(part.index)
                sums, q, lr = results.tables(mine)
                found.append((part.index, sums, torch.stack([q, q * lr], 1)))
        return found


def _rates(sums: Tensor, o: Options) -> list[float]:
    q = float(reference.trust_ratios(sums.cpu().unsqueeze(0), [o])[0])
    return [q, q * float(o.lr)]
