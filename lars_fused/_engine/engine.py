"""How `LARS.step()` finds its prepared step, and what is known of it afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_

import torch
from torch import Tensor

from .. import options as table
from ..options import Options, Settings
from . import graph_pool, launch, new_state, parameters, partition, rank_check, sharding, validate
from .graph_pool import GraphPool
from .kept import COMPLETE, UNREAD, FirstGradient, Hyper, Pattern, PreparedSteps, Ready
from .measured import Measured, Row
from .members import Layers, Origins
from .new_state import State
from .parameters import Groups
from .partition import Choice
from .prepared_step import PreparedStep, plan_facts
from .tensors import Scaling, Seen, StepTensors

_GRAD = attrgetter("grad")


class Engine:
    """The prepared steps of one optimizer. Everything but captured tables can be rebuilt."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.prepared = PreparedSteps()
        self.origins = Origins()
        self.layers = Layers()
        self._first_gradient = FirstGradient()
        self._graphs = GraphPool()
        self._compared = False  # sharded parameters, against those of other ranks
        self._first_steps = new_state.FirstSteps()
        self._masters = new_state.Masters()
        self._params = parameters.NONE
        self._hyper = UNREAD
        self.last: list[Ready] = []
        """What the last step consisted of: parts, if it was taken in parts."""

    def begin_with_new_state(self) -> None:
        """Forget what is known about state tensors: they have been replaced."""
        self._first_steps = new_state.FirstSteps()
        self._masters = new_state.Masters()
        self.forget()

    def forget(self) -> None:
        """Drop all prepared steps."""
        self._params, self._hyper = parameters.NONE, UNREAD
        self.prepared.clear()
        self.last = []

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
        found = self._find(list(map(_GRAD, self._params.flat)), groups, state)
        if found is None:
            return
        _, ready, seen = found
        if not state and self._asks_for_state(ready.step, seen):
            step = ready.step
            step.state.commit(state)
            self._masters.note(step.state)
            self._first_steps.note_unstepped(step)
            self.prepared.clear()  # its tables would take a first step, even after another took it
            return
        self.last = []
        self._run(*found, state, scaling)
        # State tells later steps from the first; without momentum there never is any.
        self._first_steps.begun |= not state

    def _asks_for_state(self, step: PreparedStep, seen: Seen) -> bool:
        """Whether this is how torch.distributed.checkpoint has a new optimizer make its state.

        A step before any other, with learning rates of 0 and gradients of 0. It would not be
        without effect: a momentum buffer may hold the decay, and the first step's privileges (no
        dampening) would be used up. Reads the gradients where the learning rate starts at 0.
        """
        if self._first_steps.begun:
            return False
        for o in self._hyper.options:
            if (isinstance(o.lr, Tensor) and o.lr.device.type != "cpu") or o.lr != 0:
                return False
        return step.gradients_are_zero(seen)

    def step_part(
        self, groups: Groups, state: State, grads: Mapping[int, Tensor], scaling: Scaling
    ) -> None:
        """Take part of a step: update the parameters with these ids from these gradients."""
        self._read(groups)
        found = self._find([grads.get(id(p)) for p in self._params.flat], groups, state)
        if found is not None:
            self._run(*found, state, scaling)

    def _read(self, groups: Groups) -> None:
        """Check and adopt parameters and hyper-parameters if any have changed."""
        members = [group["params"] for group in groups]
        sizes, flat = list(map(len, members)), list(chain.from_iterable(members))
        if sizes != self._params.sizes or not all(map(is_, flat, self._params.flat)):
            self.layers.check(groups)
            self._params = parameters.parameters(groups, self.settings.exclude_ndim)
            self.prepared.clear()
            self.origins.keep(flat)
        try:
            values: list[tuple[object, ...]] = [
                tuple(map(group.__getitem__, Options._fields)) for group in groups
            ]
        except KeyError:  # the check names what is missing
            values = []
        tensors = any(isinstance(value[0], Tensor) for value in values)  # the learning rate
        if tensors or not values or values != self._hyper.values:
            for g, group in enumerate(groups):
                table.check(group, f"LARS: param_groups[{g}]: ", read_device=False)
            options = [table.pick(group) for group in groups]
            if self.settings.exclude_ndim >= 0:
                options += [o._replace(adapt=False, weight_decay=0.0) for o in options]
            self._hyper = Hyper([] if tensors else values, options, plan_facts(options))

    def _find(
        self, grads: list[Tensor | None], groups: Groups, state: State
    ) -> tuple[Pattern, Ready, Seen] | None:
        """The prepared step for these gradients: a cached one if it matches, else a new one.

        Returns:
            Which gradients are missing, the step, and the fingerprint of its tensors; None if no
            parameter has a gradient.
        """
        if (ready := self.prepared.get(COMPLETE)) and (seen := self._match(ready, grads, state)):
            return COMPLETE, ready, seen
        missing = tuple(map(is_, grads, repeat(None)))
        present = [g for g in grads if g is not None]
        if not present:
            self._explain_no_gradient(groups)
            return None
        pattern = missing if True in missing else COMPLETE
        ready = self.prepared.get(pattern) if pattern else None
        if ready and (seen := self._match(ready, present, state)):
            return pattern, ready, seen
        where = [i for i, absent in enumerate(missing) if not absent]
        step = self._prepare(where, present, groups, state)
        ready = Ready(step, where, step.addresses)
        self.prepared.add(pattern, ready)
        read = step.see(present, ready.addresses)
        assert read is not None, "every gradient was checked"
        return pattern, ready, read

    def _explain_no_gradient(self, groups: Groups) -> None:
        """Raise or warn where it looks as if no parameter would ever get one."""
        self._refuse_replaced(groups)
        if self._first_gradient.came:
            return
        self._first_gradient.steps_without += 1
        if self._first_gradient.steps_without == 2 and self._params.flat:
            warnings.warn(
                f"LARS: two steps, and none of the {len(self._params.flat)} parameters has had a "
                "gradient; if the model was sharded, moved or replaced after the optimizer was "
                "made, make the optimizer after that",
                RuntimeWarning,
                stacklevel=5,
            )

    def _refuse_replaced(self, groups: Groups) -> None:
        params = self._params
        self.origins.refuse_replaced(params.flat, lambda i: params.label(i, groups))

    def _match(self, ready: Ready, grads: Sequence[Tensor | None], state: State) -> Seen | None:
        """The fingerprint of a step's tensors, if the step is valid for these gradients."""
        step = ready.step
        seen = step.see(grads, ready.addresses)
        if seen and step.matches(seen, self._hyper.facts) and step.state.is_held_by(state):
            return seen
        return None

    def _prepare(
        self, where: list[int], grads: list[Tensor], groups: Groups, state: State
    ) -> PreparedStep:
        """Check every tensor of this step and partition the work; modifies no tensor."""
        every, options = self._params, self._hyper.options
        if any(launch.capturing(p.device) for p in every.flat if p.is_cuda):
            graph_pool.refuse(self.settings.capturable)

        def label(i: int) -> str:
            return every.label(where[i], groups)

        self._first_gradient.came = True
        if len(where) < len(every.flat):
            self._refuse_replaced(groups)
        params, row_of = [every.flat[i] for i in where], [every.row_of[i] for i in where]
        for i, p in enumerate(params):
            validate.check_writable(p, partial(label, i))
        # A first step differs from a step with a zero buffer only if there is dampening.
        dampened = any(o.dampening for o in options)
        untaken = self._first_steps.untaken() if dampened else set()
        if untaken:
            self.prepared.clear()  # its tables would take the same first steps again
        # State and tables made here must also be writable outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            made = new_state.prepare(
                params, grads, [state.get(p, {}) for p in params],
                [options[row] for row in row_of], self.settings, untaken, label,
            )  # fmt: skip
            pool = self._graphs if self.settings.capturable else None
            step = PreparedStep(
                made, grads, row_of, options, self.settings.backend, label, pool,
                alone=self.prepared.alone,
            )  # fmt: skip
        if not self._compared and (split := step.split_over()):
            for group, ids in split:
                rank_check.compare(groups, group, ids)
            self._compared = True
        return step

    def _run(
        self, pattern: Pattern, ready: Ready, seen: Seen, state: State, scaling: Scaling
    ) -> None:
        step = ready.step
        try:
            if self.settings.master_weights:
                self._masters.refresh(step.state)
            measured = step.run(seen, self._hyper.options, scaling, ready.measured)
        except BaseException:
            # Keep nothing that an interrupted launch may have left inconsistent.
            self.prepared.clear()
            self.last = []
            raise
        step.state.commit(state)
        if self.settings.master_weights:
            self._masters.note(step.state)
        taken = Ready(step, ready.where, seen.fingerprint.addresses, measured)
        self.prepared[pattern] = taken
        self.last.append(taken)
        self.prepared.taken += 1
        self._first_steps.note(step, certain=scaling.found_inf is None)

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

    def report(self, groups: Groups) -> list[str]:
        """Which backends updated the tensors of the last step, and why, in words."""
        found: dict[int, Choice] = {}
        for step, where, *_ in self.last:
            found |= {where[i]: choice for i, choice in step.choices().items()}
        return partition.report(found, lambda i: self._params.name(i, groups))

    def stats(self) -> dict[int, Row]:
        """Each parameter's N(w), N(g), N(d), q and γq in the last step. Synchronises."""
        found: dict[int, Row] = {}
        for where, measured, now in self._measured():
            found |= {where[i]: row for i, row in measured.stats(now).items()}
        return found

    def rows_on_device(self) -> list[tuple[list[int], list[Options], list[bool], Tensor]]:
        """The same as `stats` where it is, without waiting.

        Returns:
            By launch: parameters, their options, whether N(g) is known, rows.
        """
        options, found = self._hyper.options, []
        flat, row_of = self._params.flat, self._params.row_of
        for where, measured, now in self._measured():
            for index, rows in measured.rows_on_device(now):
                params = [where[i] for i in index]
                own = [options[row_of[i]] for i in params]
                known = [
                    sharding.gradient_norm_known(flat[i], o)
                    for i, o in zip(params, own, strict=True)
                ]
                found.append((params, own, known, rows))
        return found

    def _measured(self) -> Iterator[tuple[list[int], Measured, StepTensors | None]]:
        """Of each part of the last step: its parameters, what it measured, its tensors now."""
        for step, where, _, measured in self.last:
            if measured is not None:
                grads = [self._params.flat[i].grad for i in where]
                yield where, measured, step.tensors_of(measured, grads)
