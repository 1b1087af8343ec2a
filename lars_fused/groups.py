"""Splitting a model's parameters into those that LARS adapts and those that it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = ["param_groups"]

Predicate: TypeAlias = Callable[[str, Tensor], bool]
Exclusion: TypeAlias = "str | Predicate"


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    exclude: Exclusion | Sequence[Exclusion] = (),
    exclude_ndim: int = 1,
) -> list[dict[str, Any]]:
    """Split parameters into a decayed, adapted group and an undecayed group that is not adapted.

    Biases and the scales of normalisation layers have few elements and norms near zero; decaying or
    adapting them costs accuracy at large batches (MAE, MoCo v3 and SimCLR all leave them out).
    Every tensor is assigned once, here, by its name and number of dimensions: what happens to it
    later, such as sharding, does not move it.

        optimizer = LARS(param_groups(model, 1e-4), lr=4.8, **conventions.MAE)

    Args:
        model: a module, or (name, parameter) pairs such as `model.named_parameters()` gives. A
            parameter that appears under several names (tied weights) is taken once, under its first
            name, and any of its names may be used to leave it out. Parameters that do not require a
            gradient are kept, because they may be unfrozen later; until then a step skips them.
        weight_decay: the weight decay β of the decayed group; finite and ≥ 0.
        exclude: what else to leave out, one or several of: a shell pattern for names, matched as a
            whole and with case (`"*.bias"`, `"head.*"`); a function of (name, parameter) that is
            true for what is left out. For (name, parameter) pairs as for a module.
        exclude_ndim: tensors of at most this many dimensions are left out; −1 leaves out none for
            its shape.

    Returns:
        At most two groups for `LARS`, the adapted one first, without empty ones. `params` of each
        is a list of (name, parameter), in the model's order, so that errors and `layer_stats()` can
        name layers:

        - `{"params": [...], "weight_decay": β, "adapt": True}`
        - `{"params": [...], "weight_decay": 0.0, "adapt": False}`

    Raises:
        TypeError: an element of `model` is no (name, parameter) pair, or one of `exclude` is
            neither a string nor callable.
        ValueError: weight_decay or exclude_ndim is out of range; a pattern matches no parameter
            (the error names it); there is no parameter at all; a lazy parameter has no shape yet; a
            name is used for two parameters.
    """
    if (
        isinstance(weight_decay, bool)
        or not isinstance(weight_decay, Real)
        or not math.isfinite(weight_decay)
        or weight_decay < 0
    ):
        raise ValueError(
            f"param_groups: weight_decay={weight_decay!r} is not allowed; "
            "must be a finite number >= 0"
        )
    if isinstance(exclude_ndim, bool) or not isinstance(exclude_ndim, int) or exclude_ndim < -1:
        raise ValueError(
            f"param_groups: exclude_ndim={exclude_ndim!r} is not allowed; must be an int >= -1"
        )
    rules = [exclude] if isinstance(exclude, str) or callable(exclude) else list(exclude)
    named = _names_by_parameter(model)
    patterns = _patterns(rules, [name for names, _ in named for name in names])
    predicates = [rule for rule in rules if not isinstance(rule, str)]

    adapted: list[tuple[str, Tensor]] = []
    left_out: list[tuple[str, Tensor]] = []
    for names, parameter in named:
        out = (
            parameter.ndim <= exclude_ndim
            or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
            or any(predicate(name, parameter) for name in names for predicate in predicates)
        )
        (left_out if out else adapted).append((names[0], parameter))
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": float(weight_decay), "adapt": True},
        {"params": left_out, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _names_by_parameter(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> list[tuple[list[str], Tensor]]:
    """Every parameter once, in order, with all of its names."""
    pairs: Iterable[tuple[str, Tensor]] = (
        model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else model
    )
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    owner: dict[str, int] = {}
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                f"param_groups: an element of type {type(pair).__name__} is not allowed; "
                "must be a module or (name, parameter) pairs, such as model.named_parameters()"
            )
        name, parameter = pair
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"param_groups: parameter {name!r} has no shape yet; run the model once before"
            )
        if owner.setdefault(name, id(parameter)) != id(parameter):
            raise ValueError(f"param_groups: the name {name!r} is used for two parameters")
        names, _ = by_id.setdefault(id(parameter), ([], parameter))
        names.append(name)
    if not by_id:
        raise ValueError("param_groups: there are no parameters to group")
    return list(by_id.values())


def _patterns(rules: list[Exclusion], names: list[str]) -> list[str]:
    """The patterns among the rules; each must match, or a misspelt one would go unseen."""
    patterns = []
    for rule in rules:
        if isinstance(rule, str):
            if not any(fnmatchcase(name, rule) for name in names):
                raise ValueError(
                    f"param_groups: exclude={rule!r} matches no parameter; "
                    f"the names are like {names[0]!r}"
                )
            patterns.append(rule)
        elif not callable(rule):
            raise TypeError(
                f"param_groups: exclude={rule!r} is not allowed; "
                "must be a pattern for names or a function of (name, parameter)"
            )
    return patterns
