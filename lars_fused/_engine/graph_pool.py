"""The tables of captured steps.

A CUDA graph replays the copies and launches that it recorded, on the tables they were recorded
with. So a captured step has its own tables, which live as long as the optimizer; and since pinned
memory cannot be allocated during capture, the step before it makes them.

Nothing tells the allocator on which stream a graph is replayed. So the optimizer must outlive the
last replay, like every tensor that the graph reads (docs/guide/cuda-graphs.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch

from .launch_tables import LaunchTables
from .tensors import StepTensors


def refuse(capturable: bool, caller: str = "LARS") -> NoReturn:
    """Refuse capture if the caller does not allow it, or if there was no warm-up step."""
    if caller != "LARS":
        raise RuntimeError(
            f"{caller}: cannot be captured into a CUDA graph; "
            "use the optimizer, LARS(..., capturable=True)"
        )
    if not capturable:
        raise RuntimeError(
            "LARS: step() is being captured into a CUDA graph but capturable=False; "
            "construct LARS(..., capturable=True)"
        )
    raise RuntimeError(
        "LARS: step() is being captured into a CUDA graph before a step with the same gradients "
        "was run; first run one outside of the capture, as warm-up"
    )


class GraphPool:
    """The tables of an optimizer's captured steps, and a spare set for the next capture."""

    def __init__(self) -> None:
        self._spare: WeakKeyDictionary[object, list[LaunchTables]] = WeakKeyDictionary()
        self._captured: list[tuple[list[LaunchTables], StepTensors]] = []

    def reserve(self, step: object, make: Callable[[], list[LaunchTables]]) -> None:
        """Make the tables for a later capture of `step`; call this outside of a capture."""
        if step not in self._spare:
            # Captures outside of inference mode write into them too.
            with torch.inference_mode(False), torch.no_grad():
                self._spare[step] = make()

    def drop(self, step: object) -> None:
        """Forget the spare tables of `step`: its launches are no longer those."""
        self._spare.pop(step, None)

    def take(self, step: object, tensors: StepTensors) -> list[LaunchTables]:
        """The tables for a capture of `step`, kept with its tensors for every replay."""
        if step not in self._spare:
            raise RuntimeError(
                "LARS: a previous graph capture has used up the prepared tables; "
                "run one step() outside of a capture before the next capture"
            )
        tables = self._spare.pop(step)
        # Gradients belong to the caller, who must keep them alive for a replay anyway.
        self._captured.append((tables, tensors._replace(grads=[])))
        return tables
