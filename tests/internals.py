"""The engine's private parts as far as tests look at them: the one file to adapt when they change.

What a test can say through `LARS` and `lars_step`, it says through them. Here is the rest: what a
step launched, faults put into it, and the pieces of a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from lars_fused import LARS, functional
from lars_fused._engine import fallback, launch, launch_schedule, launch_tables, plan
from lars_fused._engine import tensors as engine_tensors
from lars_fused._engine.new_state import StepState
from lars_fused._engine.prepared_step import PreparedStep
from lars_fused._engine.tensors import Addresses, Scaling
from lars_fused.kernels import layout
from lars_fused.options import Options

LaunchTables = launch_tables.LaunchTables
Dtypes = launch.Dtypes
kernels = launch.kernels  # the modules of `kernels/`; ImportError without triton


# ------------------------------------------------------------------ what a step was made of


def _last_step(optimizer: LARS) -> PreparedStep:
    ((step, *_),) = optimizer._engine.last
    return step


def launches(optimizer: LARS) -> list[LaunchTables]:
    """The launches of the optimizer's last step, each with its tables and its plan."""
    return _last_step(optimizer).tables


def tensors_in_kernels(optimizer: LARS) -> list[int]:
    """Which tensors of the last step the kernels updated, by their place among those stepped."""
    return sorted(i for part in _last_step(optimizer)._kernel_parts for i in part.index)


def tensors_in_portable(optimizer: LARS) -> list[int]:
    """Which tensors of the last step took the portable path."""
    return sorted(i for part in _last_step(optimizer)._torch_parts for i in part.index)


def remembered_steps(optimizer: LARS) -> int:
    """How many sets of gradients the optimizer has tables for."""
    return len(optimizer._engine.last)


def element_counts(tables: LaunchTables) -> Tensor:
    """The column of sizes in the host's copy of a launch's tensor table."""
    return tables.rows.host[:, layout.NUMEL]


def promise_alignment(tables: LaunchTables) -> None:
    """Say of every tensor that 128-bit accesses are allowed, whether or not they are."""
    tables.rows.host[:, layout.FLAGS] |= layout.ALIGNED


def lone_tables(
    device: torch.device, dtypes: Dtypes, numel: int, options: Options, fresh: bool = True
) -> LaunchTables:
    """The tables of one tensor, which `point_at` says where to find."""
    contents = launch_schedule.Contents((numel,), (options.adapt,), (0,), (fresh,), 1)
    tables = LaunchTables(device, dtypes, contents, halves=True)
    tables.rows.set_groups([options])
    return tables


def point_at(tables: LaunchTables, w: int, g: int, v: int = 0, copy: int = 0) -> None:
    """Say where in memory a lone tensor lies."""
    tables.rows.point(Addresses([w], [g], [v], [copy]))


def spare_launches(optimizer: LARS) -> list[LaunchTables]:
    """The tables that the next capture of the optimizer's last step would take."""
    return optimizer._engine._graphs._spare[_last_step(optimizer)]


def run(tables: LaunchTables, found_inf: Tensor | None = None) -> None:
    """One launch, or two, of these tables."""
    tables.step(Scaling(None, found_inf))


def step_of(
    w: Sequence[Tensor], g: Sequence[Tensor], v: Sequence[Tensor], options: Any
) -> tuple[Callable[[Tensor], None], Callable[[], list[int]]]:
    """A prepared step of tensors that share `options`, without an optimizer around it.

    The two functions: take it with a given found_inf, and how many steps each launch has taken.
    """
    grads, nothing = list(g), [None] * len(w)
    state = StepState(list(w), list(w), list(v), nothing, [True] * len(w))
    step = PreparedStep(state, grads, [0] * len(w), [options], "triton", str)
    seen = step.see(grads, step.addresses)
    assert seen is not None
    return (
        lambda found_inf: step.run(seen, [options], Scaling(None, found_inf)),
        lambda: [tables.steps_taken() for tables in step.tables],
    )


# ------------------------------------------------------------------ what a test changes


def forced_launches(count: int) -> AbstractContextManager[None]:
    """Within the block every step is one launch, or two."""
    return launch_tables.forced_launches(count)


def replace_launch(patch: pytest.MonkeyPatch, run: Callable[..., None]) -> Callable[..., None]:
    """`run(name, grid, args, dtypes, row, device)` stands for every launch; gives the real one."""
    real = launch.run
    patch.setattr(launch, "run", run)
    return real


def record_launches(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    names: list[str] = []

    def run(name: str, *rest: Any) -> None:
        names.append(name)
        real(name, *rest)

    real = replace_launch(patch, run)
    return names


def record_uploads(patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is sent to the device from now on."""
    shapes: list[tuple[int, ...]] = []
    upload = launch_tables.Rows._upload

    def record(self: launch_tables.Rows, device: Tensor, host: Tensor) -> None:
        shapes.append(tuple(host.shape))
        upload(self, device, host)

    patch.setattr(launch_tables.Rows, "_upload", record)
    return shapes


def forget_warnings(patch: pytest.MonkeyPatch) -> None:
    """Let the engine warn once more of what it has warned of in this process."""
    patch.setattr(fallback, "_warned", set())


def forget_plans() -> None:
    """Let every plan be made anew."""
    plan.cached_plan.cache_clear()


def count_reads_of_gradients(patch: pytest.MonkeyPatch) -> list[PreparedStep]:
    """Grows whenever a step reads whether its gradients are zero."""
    read, found = PreparedStep.gradients_are_zero, []

    def noted(step: PreparedStep, seen: Any) -> bool:
        found.append(step)
        return read(step, seen)

    patch.setattr(PreparedStep, "gradients_are_zero", noted)
    return found


def count_places_of_buffers(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows whenever `lars_step` asks a tensor whether it has memory, to tell buffers apart."""
    place, found = functional._place, []

    def noted(t: Tensor) -> object:
        found.append(t)
        return place(t)

    patch.setattr(functional, "_place", noted)
    return found


def keep_found_inf_from_the_host(patch: pytest.MonkeyPatch) -> None:
    """A found_inf on the CPU is then read by the step alone, as one that lies on a GPU is."""
    patch.setattr(engine_tensors, "on_host", lambda _: False)


def single_chunk(tables: LaunchTables, item: int) -> None:
    """Let a launch do one work item and nothing else."""
    replace_items(tables, torch.tensor([item]))


def replace_items(
    tables: LaunchTables, items: Tensor, n_items: int | None = None, programs: int = 1
) -> None:
    """Let a launch do these work items: all of them, or so many of those in the list."""
    n_items = items.numel() if n_items is None else n_items
    tables.arguments = tables.arguments._replace(items=items, n_items=n_items)
    tables.norm_items = tables.update_items = items
    tables.programs = programs


def compiled_kernels() -> set[Any]:
    """Keys of the kernels that this process has compiled for a GPU."""
    return set(launch._COMPILED)
