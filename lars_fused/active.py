"""The parameters of a step that have gradients, with their state, ready to be stepped again."""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import checks, functional, sharding
from .batch import Batch
from .reference import Options
from .stepper import Stepper


class Active:
    """The parameters that have gradients, with their state, ready to be stepped again.

    `optimizer`: the `LARS` that makes it. It is read, and changed by `commit` and `retract` alone.
    """

    def __init__(self, optimizer: Any, grads: list[Tensor | None]):
        self.where = [i for i, g in enumerate(grads) if g is not None]
        self.params = [optimizer._flat[i] for i in self.where]
        defaults, state = optimizer.defaults, optimizer.state
        options, groups = optimizer._options, [optimizer._group_of[i] for i in self.where]
        present = [g for g in grads if g is not None]
        self.missing = [g is None for g in grads] if len(present) < len(grads) else None

        weights: list[Tensor] = []
        buffers: list[Tensor | None] = []
        copies: list[Tensor | None] = []
        fresh: list[bool] = []
        self._commit: list[tuple[Tensor, str, Tensor]] = []
        self.new_state: list[tuple[int, str]] = []  # what is not a cast of existing state
        for at, p, g, group in zip(self.where, self.params, present, groups, strict=True):
            held = state.get(p, {})
            kept = {k: held.get(k) for k in ("momentum_buffer", "master_param")}
            functional.check_tensors(p, g, kept, partial(optimizer.label, at))
            w = p
            if defaults["master_weights"] and p.dtype in (torch.float16, torch.bfloat16):
                w = self._own(p, "master_param", held.get("master_param"), p, torch.float32)
                self._note_new(held, "master_param", len(weights))
            weights.append(w)
            copies.append(None if w is p else p)
            v = held.get("momentum_buffer")
            fresh.append(v is None)
            if options[group].momentum == 0:
                buffers.append(None)
                continue
            new = functional.new_buffer(p, defaults["momentum_dtype"])
            self._note_new(held, "momentum_buffer", len(buffers))
            buffers.append(self._own(p, "momentum_buffer", v, new, new.dtype))
        self._layouts = [sharding.layout(p) for p in self.params]
        self.dtensors = any(self._layouts)
        self.shards = sharding.Shards(self.params)
        self._whole = (weights, buffers, copies)  # as the state holds them, DTensors or not
        self.batch = Batch(weights, present, buffers, copies, groups)
        self._localise(present)
        self.stepper = Stepper(
            self.batch, options, fresh, defaults["backend"],
            lambda i: optimizer.label(self.where[i]), defaults["capturable"], self.shards,
        )  # fmt: skip
        self._held: list[Tensor] = []  # every tensor of the state, when this was last stepped

    def _localise(self, grads: list[Tensor]) -> None:
        """Put this rank's parts into the batch: wrappers of sharded tensors may change theirs."""
        if not self.dtensors:
            self.batch.grads = grads
            return
        weights, buffers, copies = ([*map(sharding.local, ts)] for ts in self._whole)
        self.batch.weights, self.batch.buffers, self.batch.copies = weights, buffers, copies
        self.batch.grads = [*map(sharding.local, grads)]

    def _own(
        self, p: Tensor, key: str, held: Tensor | None, start: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The state tensor as the step needs it: device, dtype and layout of `start`."""
        if (
            held is not None and held.dtype == dtype and held.device == p.device
            and checks.same_layout(sharding.local(held), sharding.local(p))
        ):  # fmt: skip
            return held
        part = torch.empty_like(sharding.local(p), dtype=dtype, memory_format=torch.preserve_format)
        part.copy_(sharding.local(start if held is None else held))
        value = sharding.like(p, part)
        self._commit.append((p, key, value))
        return value

    @property
    def uncommitted(self) -> bool:
        """Whether state was prepared that the optimizer does not hold yet."""
        return bool(self._commit)

    def _note_new(self, held: Any, key: str, index: int) -> None:
        if held.get(key) is None:
            self.new_state.append((index, key))

    def retract(self, state: Any) -> bool:
        """Remove state that was made for steps none of which was taken; whether there was any."""
        if not self.new_state:
            return False
        untaken = set(self.stepper.untaken())
        gone = [(self.params[i], key) for i, key in self.new_state if i in untaken]
        self.new_state = []
        for p, key in gone:
            if state[p].pop(key, None) is not None and not state[p]:
                del state[p]
        return bool(gone)

    def same(self, grads: list[Tensor | None], options: list[Options], state: Any) -> bool:
        """Take over this step's gradients if everything else is as it was."""
        if self.missing is None:
            present = grads  # if one is None, `fits` says so
        else:
            if [g is None for g in grads] != self.missing:
                return False
            present = [grads[i] for i in self.where]
        held = self._tensors(state)
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            return False
        if self.dtensors and [sharding.layout(g) for g in present] != self._layouts:
            return False
        self._localise(present)  # type: ignore[arg-type]  # all have gradients, see above
        return self.stepper.fits(self.batch, options)

    @staticmethod
    def _tensors(state: Any) -> list[Tensor]:
        return list(chain.from_iterable(map(dict.values, state.values())))

    def commit(self, state: Any) -> None:
        """Put new state tensors into the optimizer, after all checks."""
        for p, key, value in self._commit:
            state[p][key] = value
        if self._commit or not self._held:
            self._held = self._tensors(state)
        self._commit = []
