"""The state of a step: checked and allocated before it, committed to the optimizer after launch.

New state is a zero momentum buffer, or an fp32 master of a low-precision parameter. A step that
raises, or that a `found_inf` on the host skips, commits nothing. A `found_inf` on the device is not
read by the host: the zero buffer then stays, which gives the same weights, and the launch tables
record on the device that the first step is still pending. `FirstSteps` keeps such state out of
checkpoints and copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..options import Options, Settings
from . import sharding, validate
from .tensors import StepTensors

State = defaultdict[Tensor, Any]
"""The optimizer's state of every parameter."""
Held = Mapping[str, Any]
"""The optimizer's state of one parameter."""
STATE_KEYS = ("momentum_buffer", "master_param")
"""The tensors in it."""
Key = tuple[int, str]
"""The `id` of a parameter, and a key of its state."""


class NewTensor(NamedTuple):
    """A state tensor that the optimizer does not hold yet."""

    at: int
    """The `id` of its parameter."""
    key: str
    value: Tensor
    replaces: bool
    """It replaces a tensor that the optimizer holds in another dtype, layout or device."""


class StepState:
    """The parameters of a step and their state, as the user sees them: DTensors or not."""

    def __init__(
        self,
        params: list[Tensor],
        weights: list[Tensor],
        buffers: list[Tensor | None],
        copies: list[Tensor | None],
        fresh: list[bool],
        pending: Sequence[NewTensor] = (),
    ):
        self.params, self.weights, self.buffers = params, weights, buffers
        self.copies, self.fresh, self.pending = copies, fresh, pending
        self.created = [(id(params[n.at]), n.key) for n in pending if not n.replaces]
        self.layouts = [sharding.layout(p) for p in params]
        self.sharded = any(self.layouts)
        self._masters = any(c is not None for c in copies)
        # The values that the optimizer's state holds for all parameters, as `_read` lists them.
        self._held: list[object] | None = None
        self._key: str | None = None

    def tensors(self, grads: Sequence[Tensor | None]) -> StepTensors:
        """The step's tensors; for sharded ones, this rank's part, which may change between steps.

        `fingerprint` detects missing gradients, at no extra cost.
        """
        if not self.sharded:
            grads = cast("Sequence[Tensor]", grads)
            return StepTensors(self.weights, grads, self.buffers, self.copies, self._masters)
        local = sharding.local
        return StepTensors(
            [local(t) for t in self.weights], [local(t) for t in cast("Sequence[Tensor]", grads)],
            [local(t) for t in self.buffers], [local(t) for t in self.copies], self._masters,
        )  # fmt: skip

    def commit(self, state: State) -> None:
        """Commit new state tensors to the optimizer, after the launch."""
        for new in self.pending:
            state[self.params[new.at]][new.key] = new.value
        if self.pending or self._held is None:
            keys = set(chain.from_iterable(state.values()))
            one = len(keys) == 1 and all(state.values())
            self._key = keys.pop() if one else None
            self._held = self._read(state)
        self.pending = ()

    def is_held_by(self, state: State) -> bool:
        """Whether the optimizer still holds the tensors that it held when this was committed."""
        now, held = self._read(state), self._held
        if now is None or held is None or len(now) != len(held):
            return False
        return all(map(is_, now, held))

    def _read(self, state: State) -> list[object] | None:
        """Every value of the state; twice as fast if every entry has the same single key."""
        if self._key is None:
            return list(chain.from_iterable(map(dict.values, state.values())))
        try:
            return list(map(itemgetter(self._key), state.values()))
        except KeyError:
            return None


def prepare(
    params: list[Tensor],
    grads: list[Tensor],
    held: Sequence[Held],
    options: Sequence[Options],
    settings: Settings,
    untaken: set[Key],
    label: Callable[[int], str],
) -> StepState:
    """Check every tensor of a step and allocate missing state. Modifies nothing.

    Args:
        params: the parameters that have gradients.
        grads: their gradients.
        held: the optimizer's state of each.
        options: hyper-parameters of each.
        settings: options of the optimizer.
        untaken: state that was made for first steps that were then not taken.
        label: prefix of a message about the i-th parameter.
    """
    weights: list[Tensor] = []
    buffers: list[Tensor | None] = []
    copies: list[Tensor | None] = []
    fresh: list[bool] = []
    pending: list[NewTensor] = []

    def own(i: int, key: str, dtype: torch.dtype, start: Tensor | None = None) -> Tensor:
        """The state tensor in `dtype` and with the parameter's device and layout.

        Where the optimizer holds none it is a copy of `start`, or zeros.
        """
        p, now = params[i], held[i].get(key)
        if (
            isinstance(now, Tensor) and now.dtype == dtype and now.device == p.device
            and validate.same_layout(sharding.local(now), sharding.local(p))
        ):  # fmt: skip
            return now
        value = _like(p, start if now is None else now, dtype)
        pending.append(NewTensor(i, key, value, replaces=now is not None))
        return value

    for i, (p, g, o) in enumerate(zip(params, grads, options, strict=True)):
        check_tensors(p, g, {k: held[i].get(k) for k in STATE_KEYS}, partial(label, i))
        masters = settings.master_weights and p.dtype in validate.LOW_PRECISION
        weights.append(own(i, "master_param", torch.float32, p) if masters else p)
        copies.append(p if masters else None)
        v = held[i].get("momentum_buffer")
        fresh.append(v is None or (id(p), "momentum_buffer") in untaken)
        if o.momentum == 0:
            buffers.append(None)
            continue
        dtype = momentum_dtype(p, settings.momentum_dtype)
        buffers.append(own(i, "momentum_buffer", dtype))
    return StepState(params, weights, buffers, copies, fresh, pending)


def _like(p: Tensor, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`start`, or zeros, in `dtype` and with the layout of `p`."""
    own = sharding.local(p)
    if validate.in_memory(own):
        part = torch.empty_like(own, dtype=dtype, memory_format=torch.preserve_format)
    else:  # state of a wrapper subclass is plain: only the parameter needs to be one
        part = torch.empty(own.shape, dtype=dtype, device=own.device)
    if start is None:
        part.zero_()
    else:
        part.copy_(sharding.local(start))
    return sharding.like(p, part)


def momentum_dtype(p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Storage of the momentum of `p`: for float64 parameters always float64."""
    return torch.float64 if p.dtype == torch.float64 else dtype


def new_buffer(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum buffer of zeros with the layout of `p`."""
    return _like(p, None, momentum_dtype(p, dtype))


def check_tensors(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor | None],
    label: Callable[[], str],
    remedy: str = "delete it to start from zero",
) -> None:
    """Raise unless a parameter, its gradient and its state are compatible.

    `remedy`: against state that does not fit, for the message.
    """
    validate.check_parameter(p, label)
    validate.check_gradient(p, g, label)
    for key, value in state.items():
        if value is not None:
            validate.check_state(p, key, value, label, remedy)
    sharding.check(p, {"gradient": g, **state}, label)


class Masters:
    """Detects parameters that were edited behind their master weights, and adopts the edits.

    Whatever loads or edits a parameter bumps its version counter. If the parameter then differs
    from its rounded master, the master is stale.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}

    def refresh(self, state: StepState) -> None:
        """Before a step: adopt edits made since the last one."""
        for copy, master in zip(state.copies, state.weights, strict=True):
            if copy is None or self._versions.get(id(copy), copy._version) == copy._version:
                continue
            p, w = sharding.local(copy), sharding.local(master)
            w.copy_(torch.where(p == w.to(p.dtype), w, p.float()))

    def note(self, state: StepState) -> None:
        """After a step: record the current versions."""
        self._versions |= {id(c): c._version for c in state.copies if c is not None}


class _Counted(Protocol):
    """A prepared step, which counts its steps on the device."""

    state: StepState

    def untaken(self) -> set[int]:
        """The `id` of each parameter whose steps were all skipped. Synchronises."""


class FirstSteps:
    """State whose first step may have been skipped by a flag that only the device knows."""

    def __init__(self) -> None:
        self._doubts: dict[Key, list[_Counted]] = {}
        self._noted: list[_Counted] = []
        self.shown: set[Key] = set()
        """State that was made to be read or loaded into: a checkpoint has it all the same."""
        self.begun = False
        """Whether a step was run that left no state."""

    def note_unstepped(self, step: _Counted) -> None:
        """The state of a step was made, and the step not run."""
        self.shown.update(step.state.created)
        self.note(step, certain=False)

    def note(self, step: _Counted, certain: bool) -> None:
        """Record a step: certainly taken, or possibly skipped by a flag."""
        created, step.state.created = step.state.created, []
        if not certain and not created and step in self._noted:
            return
        if not certain:
            self._doubts.update({key: [] for key in created if key not in self._doubts})
        if not self._doubts:
            return
        ids = {id(p) for p in step.state.params}
        for key in [key for key in self._doubts if key[0] in ids]:
            if certain:
                del self._doubts[key]
            elif step not in self._doubts[key]:
                self._doubts[key].append(step)
        self._noted.append(step)

    def untaken(self) -> set[Key]:
        """State whose steps were all skipped so far. Synchronises only if in doubt."""
        skipped = {id(step): step.untaken() for step in self._noted} if self._doubts else {}
        self._doubts = {
            (p, key): noted
            for (p, key), noted in self._doubts.items()
            if all(p in skipped[id(step)] for step in noted)
        }
        if not self._doubts:
            self._noted = []
        return set(self._doubts)

    def taken(self, state: State, for_checkpoint: bool) -> State:
        """The state without what was made for first steps that were then not taken.

        Args:
            state: the optimizer's.
            for_checkpoint: keep what was made to be read, or to be loaded into.
        """
        untaken = self.untaken()
        if for_checkpoint:
            untaken -= self.shown
        if not untaken:
            return state
        kept = {
            p: {key: value for key, value in held.items() if (id(p), key) not in untaken}
            for p, held in state.items()
        }
        return defaultdict(dict, {p: held for p, held in kept.items() if held})
