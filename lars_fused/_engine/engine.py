"""What an optimizer keeps between steps, and how `LARS.step()` finds its prepared step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import options as table
from ..options import Options, Settings
from . import graph_pool, launch, new_state, rank_check, validate
from .graph_pool import GraphPool
from .measured import Measured, Row
from .members import Layers, Origins, is_bias
from .new_state import State
from .prepared_step import PreparedStep, Seen
from .tensors import Scaling, StepTensors

_GRAD = attrgetter("grad")
Groups = Sequence[dict[str, Any]]
_PREPARED = 8
"""How many prepared steps to cache, one per pattern of missing gradients."""


class Taken(NamedTuple):
    """One run of a prepared step."""

    step: PreparedStep
    where: list[int]
    """The parameters that it updated."""
    measured: Measured


class Engine:
    """The prepared steps of one optimizer. Everything but captured tables can be rebuilt."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.room = _PREPARED
        self.origins = Origins()
        self.layers = Layers()
        self._without_any = 0  # steps before the first one with a gradient
        self._graphs = GraphPool()
        self._compared = False  # sharded parameters, against those of other ranks
        self.begin_with_new_state()

    def begin_with_new_state(self) -> None:
        """Forget what is known about state tensors: they have been replaced."""
        self._first_steps = new_state.FirstSteps()
        self._masters = new_state.Masters()
        self.forget()

    def forget(self) -> None:
        """Drop all prepared steps."""
        self._flat: list[Tensor] = []
        self._sizes: list[int] = []
        self._group_of: list[int] = []
        self._row_of: list[int] = []  # of each parameter, its options
        self._values: list[tuple[Any, ...]] = []
        self._options: list[Options] = []
        self._prepared: dict[tuple[bool, ...], tuple[PreparedStep, list[int]]] = {}
        self.last: list[Taken] = []
        """What the last step consisted of: parts, if it was taken in parts."""

    # ------------------------------------------------------------------------- steps

    def step(self, groups: Groups, state: State, scaling: Scaling) -> None:
        """Update every parameter that has a gradient.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state; new state tensors are added to it.
            scaling: what GradScaler passed to the step.
        """
        self._read(groups)
        if scaling.skips_for_certain():
            return
        ready = self._find(list(map(_GRAD, self._flat)), groups, state)
        if ready is None:
            return
        step, where, seen = ready
        if not state and self._asks_for_state(step, seen):
            step.state.commit(state)
            self._masters.note(step.state)
            self._first_steps.note_unstepped(step)
            self._prepared = {}  # its tables would take a first step, even after another took it
            return
        self.last = []
        self._run(step, where, seen, state, scaling)

    def _asks_for_state(self, step: PreparedStep, seen: Seen) -> bool:
        """Whether this is how torch.distributed.checkpoint has a new optimizer make its state.

        A step before any other, with learning rates of 0 and gradients of 0. It would not be
        without effect: a momentum buffer may hold the decay, and the first step's privileges (no
        dampening) would be used up. Reads the gradients, once, where the learning rate starts at 0.
        """
        for o in self._options:
            if (isinstance(o.lr, Tensor) and o.lr.device.type != "cpu") or o.lr != 0:
                return False
        return step.gradients_are_zero(seen)

    def step_part(
        self, groups: Groups, state: State, grads: Mapping[int, Tensor], scaling: Scaling
    ) -> None:
        """Take part of a step: update the parameters with these ids from these gradients."""
        self._read(groups)
        ready = self._find([grads.get(id(p)) for p in self._flat], groups, state)
        if ready is not None:
            self._run(*ready, state, scaling)

    def _read(self, groups: Groups) -> None:
        """Check and adopt parameters and hyper-parameters if any have changed."""
        members = [group["params"] for group in groups]
        sizes, flat = list(map(len, members)), list(chain.from_iterable(members))
        if sizes != self._sizes or not all(map(is_, flat, self._flat)):
            self.layers.check(groups)
            self._take_params(flat, sizes, groups)
        values = [tuple(map(group.__getitem__, Options._fields)) for group in groups]
        tensors = any(isinstance(value[0], Tensor) for value in values)  # the learning rate
        if tensors or values != self._values:
            for g, group in enumerate(groups):
                table.check(group, f"LARS: param_groups[{g}]: ", read_device=False)
            self._options = self._with_excluded([Options(*value) for value in values])
            self._values = [] if tensors else values

    def _with_excluded(self, options: list[Options]) -> list[Options]:
        """Of each group, and once more for what the optimizer excludes of each."""
        if self.settings.exclude_ndim < 0:
            return options
        return options + [o._replace(adapt=False, weight_decay=0.0) for o in options]

    def _take_params(self, flat: list[Tensor], sizes: list[int], groups: Groups) -> None:
        first: dict[int, int] = {}
        for i, p in enumerate(flat):
            if first.setdefault(id(p), i) != i:
                raise ValueError(
                    f"{validate.describe(f'parameter {i}', p)}: is a duplicate; "
                    "each parameter may appear only once in param_groups"
                )
        self._prepared = {}
        self.origins.keep(flat)
        self._flat, self._sizes = flat, sizes
        self._group_of = [g for g, size in enumerate(sizes) for _ in range(size)]
        ndim, names = (
            self.settings.exclude_ndim,
            [n for g in groups for n in g.get("param_names", ())],
        )
        self._row_of = list(self._group_of)
        for i, p in enumerate(flat):
            if p.dim() <= ndim or (ndim >= 1 and names and is_bias(names[i])):
                self._row_of[i] += len(sizes)

    def _find(
        self, grads: list[Tensor | None], groups: Groups, state: State
    ) -> tuple[PreparedStep, list[int], Seen] | None:
        """The prepared step for these gradients: a cached one if it matches, else a new one.

        Returns:
            The step, the parameters that it updates, and the fingerprint of its tensors; None if no
            parameter has a gradient.
        """
        if len(self.last) == 1 and len(self.last[0][1]) == len(grads):  # fast path
            step, where = self.last[0][:2]
            if seen := self._match(step, grads, state):
                return step, where, seen
        missing = tuple(map(is_, grads, repeat(None)))
        present = [g for g in grads if g is not None]
        if not present:
            self._explain_no_gradient(groups)
            return None
        if missing in self._prepared:
            step, where = self._prepared[missing]
            if seen := self._match(step, present, state):
                return step, where, seen
        where = [i for i, absent in enumerate(missing) if not absent]
        step = self._prepare(where, present, groups, state)
        self._prepared[missing] = step, where
        while len(self._prepared) > self.room:
            del self._prepared[next(iter(self._prepared))]
        seen = step.see(present)
        assert seen is not None, "every gradient was checked"
        return step, where, seen

    def _explain_no_gradient(self, groups: Groups) -> None:
        """Raise or warn where it looks as if no parameter would ever get one."""
        self._refuse_replaced(groups)
        self._without_any += self._without_any >= 0
        if self._without_any == 2 and self._flat:
            warnings.warn(
                f"LARS: two steps, and none of the {len(self._flat)} parameters has had a "
                "gradient; if the model was sharded, moved or replaced after the optimizer was "
                "made, make the optimizer after that",
                RuntimeWarning,
                stacklevel=5,
            )

    def _refuse_replaced(self, groups: Groups) -> None:
        self.origins.refuse_replaced(self._flat, lambda i: self._label(i, groups))

    def _match(
        self, step: PreparedStep, grads: Sequence[Tensor | None], state: State
    ) -> Seen | None:
        """The fingerprint of the step's tensors, if the step is valid for these gradients."""
        seen = step.see(grads)
        if seen and step.matches(seen, self._options) and step.state.is_held_by(state):
            return seen
        return None

    def _prepare(
        self, where: list[int], grads: list[Tensor], groups: Groups, state: State
    ) -> PreparedStep:
        """Check every tensor of this step and partition the work; modifies no tensor."""
        if any(launch.capturing(p.device) for p in self._flat if p.is_cuda):
            graph_pool.refuse(self.settings.capturable)

        def label(i: int) -> str:
            return self._label(where[i], groups)

        self._without_any = -1
        if len(where) < len(self._flat):
            self._refuse_replaced(groups)
        params, group_of = [self._flat[i] for i in where], [self._row_of[i] for i in where]
        for i, p in enumerate(params):
            validate.check_writable(p, partial(label, i))
        # A first step differs from a step with a zero buffer only if there is dampening.
        dampened = any(o.dampening for o in self._options)
        untaken = self._first_steps.untaken() if dampened else set()
        if untaken:
            self._prepared = {}  # its tables would take the same first steps again
        # State and tables made here must also be writable outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            made = new_state.prepare(
                params, grads, [state.get(p, {}) for p in params],
                [self._options[g] for g in group_of], self.settings, untaken, label,
            )  # fmt: skip
            pool = self._graphs if self.settings.capturable else None
            step = PreparedStep(
                made, grads, group_of, self._options, self.settings.backend, label, pool
            )
        if not self._compared and (split := step.split_over()):
            for group, ids in split:
                rank_check.compare(groups, group, ids)
            self._compared = True
        return step

    def _run(
        self, step: PreparedStep, where: list[int], seen: Seen, state: State, scaling: Scaling
    ) -> None:
        try:
            if self.settings.master_weights:
                self._masters.refresh(step.state)
            measured = step.run(seen, self._options, scaling)
        except BaseException:
            # Keep nothing that an interrupted launch may have left inconsistent.
            self._prepared, self.last = {}, []
            raise
        step.state.commit(state)
        if self.settings.master_weights:
            self._masters.note(step.state)
        self.last.append(Taken(step, where, measured))
        self._first_steps.note(step, certain=scaling.found_inf is None)

    def _label(self, flat_index: int, groups: Groups) -> str:
        """The prefix of a message about one parameter."""
        g = self._group_of[flat_index]
        i = flat_index - self._group_of.index(g)
        names = groups[g].get("param_names")
        name = names[i] if names else None
        return validate.describe(f"param_groups[{g}]['params'][{i}]", self._flat[flat_index], name)

    # ------------------------------------------------------------------ after a step

    def taken_state(self, state: State, for_checkpoint: bool = False) -> State:
        """The state without what a first step made that was then not taken."""
        return self._first_steps.taken(state, for_checkpoint)

    def backends(self, groups: Groups) -> set[str]:
        """The backends of the last step; before the first step, those expected for the devices."""
        ran = set().union(*(taken.step.backends for taken in self.last))
        if ran:
            return ran
        if self.settings.backend != "auto":
            return {self.settings.backend}
        devices = {p.device for group in groups for p in group["params"]}
        return {"torch" if launch.why_not(device) else "triton" for device in devices}

    def stats(self) -> dict[int, Row]:
        """Each parameter's N(w), N(g), N(d), q and γq in the last step. Synchronises."""
        found: dict[int, Row] = {}
        for taken in self.last:
            rows = taken.measured.stats(self._tensors_of(taken))
            found |= {taken.where[i]: row for i, row in rows.items()}
        return found

    def rows_on_device(self) -> list[tuple[list[int], list[Options], Tensor]]:
        """The same as `stats` where it is, without waiting: parameters, their options, rows."""
        found = []
        for taken in self.last:
            for index, rows in taken.measured.rows_on_device(self._tensors_of(taken)):
                params = [taken.where[i] for i in index]
                found.append((params, [self._options[self._row_of[i]] for i in params], rows))
        return found

    def _tensors_of(self, taken: Taken) -> StepTensors | None:
        return taken.step.tensors_of(taken.measured, [self._flat[i].grad for i in taken.where])
