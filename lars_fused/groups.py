"""Splits a model's parameters into those that LARS adapts and those that it does not."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from . import options as table
from ._engine.members import NamedParameter, is_bias

__all__ = ["param_groups"]

Predicate: TypeAlias = Callable[[str, Tensor], bool]
Exclusion: TypeAlias = "str | Predicate"

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"norm([123]d)?$", re.IGNORECASE)


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    exclude_ndim: int = 1,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Split parameters into a group with decay and adaptation and a group with neither.

    Biases and the scales of normalisation layers have few elements and norms near zero; decaying or
    adapting them costs accuracy at large batches (MAE, MoCo v3 and SimCLR all leave them out).
    Every tensor is assigned once, here, by its name, its number of dimensions and the module that
    owns it: what happens to it later, such as sharding, does not move it.

        optimizer = LARS(param_groups(model, 1e-4), lr=4.8, **conventions.MAE)

    Args:
        model: a module, or (name, parameter) pairs such as those from `model.named_parameters()`.
            A parameter with several names (tied weights) is listed once, under its first name, and
            any of its names may be used to exclude it. Parameters that do not require a
            gradient are kept, because they may be unfrozen later; until then a step skips them.
        weight_decay: the weight decay β of the decayed group; finite and ≥ 0.
        exclude: what else to leave out, one or several of: a name or a shell pattern for names,
            matched as a whole and with case (`"*.bias"`, `"head.*"`); a function of (name,
            parameter) that is true for what is left out. For (name, parameter) pairs as for a
            module. Names in a collection that this model does not have are passed over, so that
            the lists that come with models, such as `model.no_weight_decay()` in timm, can be given
            as they are.
        exclude_ndim: tensors of at most this many dimensions are left out; −1 leaves out none. From
            1 on (the default) also the biases and normalisation layers that have more: what a
            normalisation module owns (BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm, their
            subclasses, and modules whose class is called so: `...Norm`, `...Norm2d`), and what is
            called a bias (`bias`, `bias_k`, `in_proj_bias`).
        strict: whether every name in `exclude` must be one of a parameter.

    Returns:
        At most two groups for `LARS`, the adapted one first, without empty ones. `params` of each
        is a list of (name, parameter), in the model's order, so that errors and `layer_stats()` can
        name layers; each pair also answers as its parameter (`numel()`, `device`), for optimizers
        that take no names, such as ZeroRedundancyOptimizer:

        - `{"params": [...], "weight_decay": β, "adapt": True}`
        - `{"params": [...], "weight_decay": 0.0, "adapt": False}`

        Made from a module, they follow it: `LARS` takes the parameters that the module holds then
        under the same names, so that `fully_shard` may come between.

    Raises:
        TypeError: an element of `model` is no (name, parameter) pair, or one of `exclude` is
            neither a string nor callable.
        ValueError: weight_decay or exclude_ndim is out of range; a pattern, a single string or, if
            `strict`, a name matches no parameter (the error names it); there is no parameter at
            all; a lazy parameter has no shape yet; a name is used for two parameters.

    Warns:
        UserWarning: none of several names is one of a parameter: they may belong to another model.
    """
    decay = table.finite(weight_decay)
    if decay is None or decay < 0:
        raise ValueError(
            f"param_groups: weight_decay={table.shown(weight_decay)} is not allowed; "
            "must be a finite number >= 0"
        )
    table.integer("exclude_ndim", exclude_ndim, -1, "param_groups: ")
    table.check_flag("strict", strict, "param_groups: ")
    rules: list[Any]
    if isinstance(exclude, str) or callable(exclude):
        alone, rules = True, [exclude]
    elif isinstance(exclude, Iterable):
        alone, rules = False, list(exclude)
    else:
        raise _no_rule(exclude)
    named = _names_by_parameter(model)
    patterns = _patterns(rules, [name for names, _ in named for name in names], strict or alone)
    predicates = [rule for rule in rules if not isinstance(rule, str)]
    small = _of_norms(model) if exclude_ndim >= 1 else None
    found_in = weakref.ref(model) if isinstance(model, nn.Module) else None

    adapted: list[NamedParameter] = []
    left_out: list[NamedParameter] = []
    for names, parameter in named:
        out = (
            parameter.ndim <= exclude_ndim
            or (small is not None and (id(parameter) in small or any(map(is_bias, names))))
            or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
            or any(predicate(name, parameter) for name in names for predicate in predicates)
        )
        (left_out if out else adapted).append(NamedParameter(names[0], parameter, found_in))
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": decay, "adapt": True},
        {"params": left_out, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _of_norms(model: Any) -> set[int]:
    """The `id` of each parameter that a normalisation module owns itself."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    norms = [m for m in modules if isinstance(m, _NORMS) or _NORM_NAME.search(type(m).__name__)]
    return {id(p) for m in norms for p in m.parameters(recurse=False)}


def _names_by_parameter(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> list[tuple[list[str], Tensor]]:
    """Each parameter once, in order, with all its names."""
    pairs: Iterable[tuple[str, Tensor]] = (
        model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else model
    )
    if isinstance(pairs, Tensor) or not isinstance(pairs, Iterable):
        raise TypeError(
            f"param_groups: model is a {type(model).__name__}; "
            "must be a module or (name, parameter) pairs, such as model.named_parameters()"
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
                f"param_groups: parameter {name!r} has no shape yet; run the model once first"
            )
        if owner.setdefault(name, id(parameter)) != id(parameter):
            raise ValueError(f"param_groups: the name {name!r} is used for two parameters")
        names, _ = by_id.setdefault(id(parameter), ([], parameter))
        names.append(name)
    if not by_id:
        raise ValueError("param_groups: there are no parameters to group")
    return list(by_id.values())


def _no_rule(rule: object) -> TypeError:
    return TypeError(
        f"param_groups: exclude={rule!r} is not allowed; "
        "must be a name pattern or a function of (name, parameter), or several of them"
    )


def _patterns(rules: list[Any], names: list[str], strict: bool) -> list[str]:
    """The patterns among the rules. Those that must match do, or a misspelt one would go unseen."""
    patterns = [rule for rule in rules if isinstance(rule, str)]
    for rule in rules:
        if not isinstance(rule, str) and not callable(rule):
            raise _no_rule(rule)
    missing = [rule for rule in patterns if not any(fnmatchcase(name, rule) for name in names)]
    for rule in missing:
        if strict or any(sign in rule for sign in "*?["):
            raise ValueError(
                f"param_groups: exclude={rule!r} matches no parameter; "
                f"the names are like {names[0]!r}"
            )
    if missing and len(missing) == len(patterns):
        warnings.warn(
            f"param_groups: none of the names in exclude is a parameter's ({sorted(missing)[0]!r}, "
            f"...); the names are like {names[0]!r}",
            UserWarning,
            stacklevel=3,
        )
    return patterns
