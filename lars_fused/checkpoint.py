"""Loading optimizer checkpoints without losing precision."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, sharding

_TENSOR_KEYS = ("momentum_buffer", "master_param")
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Restore:
    """Around `Optimizer.load_state_dict`: checks first, exact dtypes after.

    The base class casts state to the parameter's dtype through a static call that a subclass cannot
    override, and keeps tensors that need no cast, which then alias the checkpoint. This context
    notes the dict that arrives after all user hooks and re-takes its tensors as copies.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
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
        """Each parameter with its key in the checkpoint and what to call it."""
        ids = chain.from_iterable(g["params"] for g in saved["param_groups"])
        params = []
        for g, group in enumerate(self._optimizer.param_groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for i, (p, name) in enumerate(zip(group["params"], names, strict=True)):
                params.append((p, checks.describe(f"param_groups[{g}]['params'][{i}]", p, name)))
        return [(key, p, label) for key, (p, label) in zip(ids, params, strict=True)]

    def _before(self, _: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Refuse what does not fit, before anything is changed; add options that are missing."""
        missing = [key for key in ("state", "param_groups") if key not in saved]
        if missing:
            raise ValueError(
                f"LARS: the checkpoint has no {' and no '.join(map(repr, missing))}; "
                "it must be what state_dict() gave"
            )
        groups = self._optimizer.param_groups
        mine, theirs = ([len(g["params"]) for g in gs] for gs in (groups, saved["param_groups"]))
        if mine != theirs:
            raise ValueError(
                f"LARS: the checkpoint has parameter groups of {theirs} parameters, "
                f"the optimizer of {mine}; they must be equal"
            )
        known = []
        for g, (group, old) in enumerate(zip(groups, saved["param_groups"], strict=True)):
            kept = {name: group[name] for name in checks.OPTION_NAMES}
            known.append({**kept, **old})
            checks.check_options(known[-1], f"LARS: the checkpoint's param_groups[{g}]: ")
        for key, p, label in self._pairs(saved):
            self._check_state(saved["state"].get(key, {}), p, label)
        self._loaded = {**saved, "param_groups": known}
        return self._loaded

    @staticmethod
    def _check_state(held: Any, p: Tensor, label: str) -> None:
        for name in _TENSOR_KEYS:
            value = held.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype not in checks.MOMENTUM_DTYPES:
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
                    f"{label}: the checkpoint's {name} is laid out as {where}, unlike "
                    "the parameter; load with torch.distributed.checkpoint, which lays it out anew"
                )
        # Loaded as it is, another optimizer's state would be ignored and its momentum lost.
        if held and not any(name in held for name in _TENSOR_KEYS):
            raise ValueError(
                f"{label}: the checkpoint's state is {sorted(map(str, held))}; LARS keeps "
                f"{list(_TENSOR_KEYS)}; use convert_state_dict for another optimizer's checkpoint"
            )

    def _after(self, optimizer: Optimizer) -> None:
        for key, p, _ in self._pairs(self._loaded):
            state = optimizer.state.get(p)
            if state is None:
                continue
            for name, value in self._loaded["state"][key].items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    part = sharding.local(sharding.shard_of(p, value))
                    own = torch.empty_like(part, device=sharding.local(p).device).copy_(part)
                    state[name] = sharding.like(p, own)
            # A master that no step will write would be out of date when it is next read.
            if not (optimizer.defaults["master_weights"] and p.dtype in _LOW_PRECISION):
                state.pop("master_param", None)
