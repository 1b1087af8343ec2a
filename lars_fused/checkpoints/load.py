"""Loads optimizer checkpoints without losing precision."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import options as table
from .._engine import sharding, validate
from .._engine.new_state import STATE_KEYS
from ..options import Options

_OTHERS = {
    "mu", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum",
    "acc_delta", "prev", "row_var", "col_var", "momentum",
}  # fmt: skip
"""State of torch's other optimizers, and of other implementations of LARS."""
_FOREIGN = {"trust_coeff", "always_adapt", "eta", "is_skipped", "weight_decay_filter"}
"""Options of groups that only other implementations of LARS have."""


class Restore:
    """Wraps `Optimizer.load_state_dict`: checks before, exact dtypes after.

    The base class casts state to the parameter's dtype through a static call that a subclass cannot
    override, and keeps tensors that need no cast, which then alias the checkpoint. This context
    captures the dict as it is after all user hooks and loads its tensors again as copies.
    """

    def __init__(self, optimizer: Optimizer, keeps_masters: bool):
        self._optimizer, self._keeps_masters = optimizer, keeps_masters
        self._loaded: dict[str, Any] = {}

    def __enter__(self) -> Restore:
        self._handles = [
            self._optimizer.register_load_state_dict_pre_hook(self._before),
            self._optimizer.register_load_state_dict_post_hook(self._after, prepend=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _pairs(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor, str]]:
        """Each parameter with its key in the checkpoint and its label for messages."""
        ids = chain.from_iterable(g["params"] for g in saved["param_groups"])
        params = []
        for g, group in enumerate(self._optimizer.param_groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for i, (p, name) in enumerate(zip(group["params"], names, strict=True)):
                params.append((p, validate.describe(f"param_groups[{g}]['params'][{i}]", p, name)))
        return [(key, p, label) for key, (p, label) in zip(ids, params, strict=True)]

    def _before(self, _: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Refuse a misfit before anything is changed; add options that are missing."""
        missing = [key for key in ("state", "param_groups") if key not in saved]
        if missing:
            raise ValueError(
                f"LARS: the checkpoint has no {' and no '.join(map(repr, missing))}; "
                "it must be what state_dict() returned"
            )
        groups = self._optimizer.param_groups
        mine, theirs = ([len(g["params"]) for g in gs] for gs in (groups, saved["param_groups"]))
        if mine != theirs:
            raise ValueError(
                f"LARS: the checkpoint has parameter groups of {theirs} parameters, "
                f"the optimizer has groups of {mine}; they must be equal"
            )
        known = []
        for g, (group, old) in enumerate(zip(groups, saved["param_groups"], strict=True)):
            kept = {name: group[name] for name in Options._fields}
            known.append({**kept, **old})
            table.check(known[-1], f"LARS: the checkpoint's param_groups[{g}]: ")
        of = {key: g for g, old in enumerate(saved["param_groups"]) for key in old["params"]}
        for key, p, label in self._pairs(saved):
            held, g = saved["state"].get(key, {}), of[key]
            self._check_state(held, p, label)
            if held.get("momentum_buffer") is not None:
                self._check_meaning(known[g], saved["param_groups"][g], g, label)
        self._loaded = {**saved, "param_groups": known}
        return self._loaded

    @staticmethod
    def _check_meaning(group: dict[str, Any], old: dict[str, Any], g: int, label: str) -> None:
        """Refuse momentum that another optimizer means differently, under the same key.

        That of `torch.optim.SGD` is free of the learning rate. Where ours is too, it is continued.
        `group`: ours, as it would be loaded. With momentum 0 it does not read the buffer.
        """
        foreign = sorted(_FOREIGN.intersection(old))
        inside = group["lr_in_momentum"]
        if "lr_in_momentum" in old or group["momentum"] == 0 or not (inside or foreign):
            return
        if foreign or ("nesterov" in old and "trust_coefficient" not in old):
            whose = f"has {foreign[0]!r}" if foreign else "is like that of torch.optim.SGD"
            cause = (
                f"it {whose}, and its momentum may mean something else than with "
                f"lr_in_momentum={inside}; use convert_state_dict, which converts it"
            )
            if not foreign:
                cause += ", or LARS(..., lr_in_momentum=False) to go on with the momentum of SGD "
                cause += "as it is"
        else:
            cause = (
                "nothing says whether its momentum holds the learning rate; set 'lr_in_momentum' "
                "in the checkpoint's groups to what the momentum was made with (True unless LARS "
                "was given another)"
            )
        raise ValueError(
            f"{label}: the checkpoint has a momentum_buffer, and its param_groups[{g}] no "
            f"'lr_in_momentum': {cause}"
        )

    @staticmethod
    def _check_state(held: Any, p: Tensor, label: str) -> None:
        for name in STATE_KEYS:
            value = held.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype not in table.MOMENTUM_DTYPES:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{label}: the checkpoint's {name} is a {kind}; must be a floating-point tensor"
                )
            if value.shape != p.shape:
                raise ValueError(
                    f"{label}: the checkpoint's {name} has shape {tuple(value.shape)}; "
                    f"must be {tuple(p.shape)}"
                )
            where = sharding.layout(value)
            if where not in (None, sharding.layout(p)):
                raise ValueError(
                    f"{label}: the checkpoint's {name} is laid out as {where.placements} on "
                    f"{where.mesh}, unlike the parameter; load with torch.distributed.checkpoint, "
                    "which reshards it"
                )
        # Loaded as it is, another optimizer's state would be ignored and its momentum lost. What
        # wrappers of this optimizer (Lookahead, schedule-free) keep beside ours is none of that.
        if not _OTHERS.isdisjoint(held) and not any(name in held for name in STATE_KEYS):
            raise ValueError(
                f"{label}: the checkpoint's state is {sorted(map(str, held))}; LARS keeps "
                f"{list(STATE_KEYS)}; use convert_state_dict for another optimizer's checkpoint"
            )

    def _after(self, optimizer: Optimizer) -> None:
        for key, p, _ in self._pairs(self._loaded):
            state = optimizer.state.get(p)
            if state is None:
                continue
            for name, value in self._loaded["state"][key].items():
                if not isinstance(value, Tensor):
                    state[name] = copy.deepcopy(value)  # torch makes a generator's name of a string
                elif value.is_floating_point() and value.shape == p.shape:
                    part = sharding.local(sharding.shard_of(p, value))
                    own = torch.empty_like(part, device=sharding.local(p).device).copy_(part)
                    state[name] = sharding.like(p, own)
                else:
                    state[name] = value.detach().to(state[name].device, copy=True)
            # A master that no step will write would be out of date when it is next read.
            if not (self._keeps_masters and p.dtype in validate.LOW_PRECISION):
                state.pop("master_param", None)
