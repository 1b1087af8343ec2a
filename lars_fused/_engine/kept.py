"""What an optimizer keeps between steps: prepared steps, and the hyper-parameters it last read."""

from __future__ import annotations

from typing import NamedTuple

from ..options import Options
from .measured import Measured
from .prepared_step import PreparedStep
from .tensors import Addresses

Pattern = tuple[bool, ...]
"""Which gradients are missing."""
COMPLETE: Pattern = ()


class Ready(NamedTuple):
    """A prepared step, and what its last run left for the next one."""

    step: PreparedStep
    where: list[int]
    """The parameters that it updates."""
    addresses: Addresses
    """Where its tensors were when they were last found to match."""
    measured: Measured | None = None


class PreparedSteps(dict[Pattern, Ready]):
    """The prepared steps of an optimizer by pattern of missing gradients; the oldest go first."""

    room = 8
    """How many are kept."""
    alone = True
    """Whether nothing runs on the device beside a step, so that a launch may take all of it."""
    taken = 0
    """How many steps they took, or parts of steps; those too that only the device skipped."""

    def add(self, pattern: Pattern, ready: Ready) -> None:
        """Keep one more."""
        self[pattern] = ready
        while len(self) > self.room:
            del self[next(iter(self))]


class Hyper(NamedTuple):
    """The hyper-parameters of all groups, and the values that they were read from."""

    values: list[tuple[object, ...]]
    """Empty where one is a tensor, which may have been written since."""
    options: list[Options]
    """Of each group, and once more for what the optimizer excludes of each."""
    facts: list[tuple[bool, ...]]
    """What plans depend on, of each of the options."""


UNREAD = Hyper([], [], [])


class FirstGradient:
    """Whether any parameter has had a gradient yet, and the steps before it."""

    came = False
    steps_without = 0
