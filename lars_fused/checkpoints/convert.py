"""Converts checkpoints of other optimizers into ones that `LARS.load_state_dict` accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import conventions
from .. import options as table
from ..options import Options

_Group = Mapping[str, Any]


def _sgd(group: _Group, p: Tensor | None) -> dict[str, Any]:
    return {"adapt": False}


def _timm(group: _Group, p: Tensor | None) -> dict[str, Any]:
    return {
        "adapt": bool(group["weight_decay"] != 0 or group.get("always_adapt")),
        "trust_coefficient": group["trust_coeff"],
        "eps": group["eps"],
        "trust_clip": group["trust_clip"],
    }


def _wrapper(group: _Group, p: Tensor | None) -> dict[str, Any]:
    return {}


def _mae(group: _Group, p: Tensor | None) -> dict[str, Any]:
    if "eta" in group:  # a related optimizer with the same state key but other rules
        return _barlow(group, p)
    left_out = {"adapt": False, "weight_decay": 0.0} if p is not None and p.ndim <= 1 else {}
    return {"trust_coefficient": group["trust_coefficient"], **left_out}


def _barlow(group: _Group, p: Tensor | None) -> dict[str, Any]:
    decayed, adapted = (
        p is None or not _excludes(group[f"{name}_filter"], p)
        for name in ("weight_decay", "lars_adaptation")
    )
    left_out = {} if decayed else {"weight_decay": 0.0}
    return {"trust_coefficient": group["eta"], "adapt": adapted, **left_out}


def _excludes(rule: Any, p: Tensor) -> bool:
    """Barlow Twins' filter is a flag; VICReg's is a function of the parameter, or None."""
    return bool(rule(p)) if callable(rule) else bool(rule) and p.ndim == 1


def _dino(group: _Group, p: Tensor | None) -> dict[str, Any]:
    left_out = {"adapt": False, "weight_decay": 0.0} if p is not None and p.ndim == 1 else {}
    return {"trust_coefficient": group["eta"], **left_out}


def _rocm(group: _Group, p: Tensor | None) -> dict[str, Any]:
    # FusedLARS accepts a dampening but ignores it; groups marked is_skipped are still decayed.
    return {
        "trust_coefficient": group["trust_coefficient"],
        "eps": group["eps"],
        "adapt": not group.get("is_skipped", False),
        "dampening": 0.0,
    }


class _Source(NamedTuple):
    convention: Mapping[str, Any]
    rule: Callable[[_Group, Tensor | None], dict[str, Any]]
    """What a group, or one of its parameters, sets beyond the convention."""
    key: str = "momentum_buffer"
    sign: float = 1.0


_SOURCES = {
    # Without adaptation, all that remains of a convention is where the learning rate enters.
    "sgd": _Source(conventions.TORCHLARS, _sgd),
    "timm": _Source(conventions.TIMM, _timm),
    "apex_larc": _Source(conventions.APEX_LARC, _wrapper),
    "torchlars": _Source(conventions.TORCHLARS, _wrapper),
    "mae": _Source(conventions.MAE, _mae, "mu"),
    "barlow": _Source(conventions.MAE, _barlow, "mu"),
    "dino": _Source(conventions.MAE, _dino, "mu"),
    "rocm_fused_lars": _Source(conventions.PAPER, _rocm, sign=-1.0),
}
# Options that have the same name and meaning in a source's groups.
_SHARED = ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")
_DROPPED = {
    "params", "param_names", "trust_coeff", "always_adapt", "eta", "weight_decay_filter",
    "lars_adaptation_filter", "is_skipped", "foreach", "fused", "differentiable", "capturable",
}  # fmt: skip
# Options that no source sets: set here so that nothing depends on how LARS was constructed.
_DEFAULTS = {
    name: Options._field_defaults[name]
    for name in ("weight_decay", "dampening", "nesterov", "maximize", "adapt")
}


def convert_state_dict(
    state: Mapping[str, Any],
    source: str,
    lr: float | None = None,
    *,
    params: Iterable[Tensor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert another optimizer's `state_dict()` into one that `LARS.load_state_dict` accepts.

    LARS then continues as the source would have: the groups carry the source's convention and
    hyper-parameters, however LARS was constructed.

        optimizer = LARS(param_groups(model, 1e-4))
        optimizer.load_state_dict(convert_state_dict(torch.load(path)["optimizer"], "mae"))

    v is the source's buffer and γ its learning rate. The buffer of every source but ROCm's is free
    of the learning rate (v ← μv + qd); ROCm's holds −γqd. So the converted groups keep
    their source's `lr_in_momentum`, which is exact whatever γ does next. To continue with the other
    placement pass `lr_in_momentum` in `options`: the buffer becomes γv, or v/γ.

    Args:
        state: what the source's `state_dict()` returned. Not modified; tensors that need no
            conversion are shared with the result.
        source: "sgd" (`torch.optim.SGD`; no layer is adapted), "timm" (`Lars`), "apex_larc" and
            "torchlars" (the state of the wrapped SGD), "mae" (also MoCo v3), "barlow" (Barlow Twins
            and VICReg), "dino", or "rocm_fused_lars".
        lr: the current learning rate, for all groups; None: each group's own.
        params: the parameters in the source's order; only their shapes are read. "mae", "barlow"
            and "dino" exclude tensors by their number of dimensions, which is read from a
            parameter's state; one without state stays with its group unless params are given.
        options: options of `LARS` to set in every group, overriding the source; use it for what a
            wrapper does not save, such as `trust_coefficient` and `trust_clip` of apex.

    Returns:
        A state dict. Groups whose tensors "mae", "barlow" or "dino" treat differently are split in
        two, the decayed and adapted tensors first, as `param_groups` does.

    Raises:
        ValueError: an unknown source, a state that is not the source's, an option or a learning
            rate that is not allowed, or a number of dimensions that is needed but not known.
    """
    if source not in _SOURCES:
        raise ValueError(
            f"convert_state_dict: source={source!r} is not known; must be one of {list(_SOURCES)}"
        )
    unknown = sorted(set(options) - set(Options._fields))
    if unknown:
        raise ValueError(
            f"convert_state_dict: {unknown} are not options of LARS; "
            f"must be among {[name for name in Options._fields if name != 'lr']}"
        )
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(
            "convert_state_dict: state must be what state_dict() returned, "
            "with 'state' and 'param_groups'"
        )
    buffers = _buffers(state, source)
    shapes = _shapes(state, buffers, params)
    groups: list[dict[str, Any]] = []
    converted: dict[Any, dict[str, Tensor]] = {}
    for g, old in enumerate(state["param_groups"]):
        where = f"convert_state_dict: the source's param_groups[{g}]: "
        given = options if lr is None else {**options, "lr": lr}
        for new in _divide(old, source, shapes, given, where):
            table.check(new, where)
            gain = _gain(new, source, where)
            groups.append(new)
            for key in new["params"]:
                if key in buffers and new["momentum"] != 0:
                    v = buffers[key]
                    converted[key] = {"momentum_buffer": v if gain == 1 else v * gain}
    return {"state": converted, "param_groups": groups}


def _buffers(state: Mapping[str, Any], source: str) -> dict[Any, Tensor]:
    name = _SOURCES[source].key
    found = {}
    for key, held in state["state"].items():
        if held and name not in held:
            raise ValueError(
                f"convert_state_dict: the state of parameter {key} is {sorted(held)}; "
                f"a checkpoint of {source!r} has {name!r}"
            )
        if isinstance(held.get(name), Tensor):  # torch.optim.SGD once wrote None without momentum
            found[key] = held[name]
    return found


def _shapes(
    state: Mapping[str, Any], buffers: Mapping[Any, Tensor], params: Iterable[Tensor] | None
) -> Mapping[Any, Tensor]:
    """For each parameter key, a tensor of the parameter's shape."""
    if params is None:
        return buffers
    keys = [key for group in state["param_groups"] for key in group["params"]]
    given = list(params)
    if len(given) != len(keys):
        raise ValueError(
            f"convert_state_dict: {len(given)} params for a checkpoint of {len(keys)} parameters; "
            "must have the same length"
        )
    return dict(zip(keys, given, strict=True))


def _divide(
    old: _Group, source: str, shapes: Mapping[Any, Tensor], given: dict[str, Any], where: str
) -> list[dict[str, Any]]:
    """The groups that one group of the source becomes, one for each way it treats tensors."""
    parts: list[tuple[dict[str, Any], list[int]]] = []
    strays = []
    for i, key in enumerate(old["params"]):
        if key not in shapes:
            strays.append(i)
            continue
        options = _options(old, source, shapes[key], where)
        same = next((index for part, index in parts if part == options), None)
        if same is None:
            parts.append((options, [i]))
        else:
            same.append(i)
    if strays and len(parts) > 1:
        raise ValueError(
            f"{where}parameter {old['params'][strays[0]]!r} has no state, so its number of "
            "dimensions is not known; pass params"
        )
    if not parts:
        parts = [(_options(old, source, None, where), [])]
    parts[0][1].extend(strays)
    parts.sort(key=lambda part: not part[0]["adapt"])
    names = old.get("param_names")
    kept = {name: value for name, value in old.items() if name not in _DROPPED}
    result = []
    for options, index in parts:
        index.sort()
        new = {**kept, **options, **given, "params": [old["params"][i] for i in index]}
        if names is not None:
            new["param_names"] = [names[i] for i in index]
        result.append(new)
    return result


def _options(old: _Group, source: str, p: Tensor | None, where: str) -> dict[str, Any]:
    try:
        own = _SOURCES[source].rule(old, p)
        shared = {name: old[name] for name in _SHARED if name in old}
        return {**_DEFAULTS, **_SOURCES[source].convention, "lr": old["lr"], **shared, **own}
    except KeyError as error:
        raise ValueError(f"{where}has no {error}; checkpoints of {source!r} have one") from None


def _gain(new: _Group, source: str, where: str) -> float:
    """The factor for the source's buffer."""
    sign, inside = _SOURCES[source].sign, _SOURCES[source].convention["lr_in_momentum"]
    if new["lr_in_momentum"] == inside:
        return sign
    rate = float(new["lr"])
    if inside and rate == 0:
        raise ValueError(f"{where}lr=0: a buffer cannot be divided by a learning rate of 0")
    return sign / rate if inside else sign * rate
