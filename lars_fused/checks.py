"""Every validation and its error text. Nothing here changes anything.

Texts name the parameter, its value, what is allowed and, where it helps, the remedy. Messages about
a tensor begin with `LARS: param_groups[g]['params'][i] (name, shape, dtype, device)`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
DENOMINATORS = ("sum", "decayed", "gradient")
STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARAMETER_DTYPES = (*STORAGE_DTYPES, torch.float64)
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Largest value, None for any finite one. The smallest is 0.
_NUMBERS: dict[str, float | None] = {
    "lr": None,
    "momentum": 1.0,
    "weight_decay": None,
    "trust_coefficient": None,
    "eps": None,
    "dampening": 1.0,
}
_FLAGS = ("nesterov", "lr_in_momentum", "trust_clip", "decay_zero_norm", "adapt", "maximize")
OPTION_NAMES = (*_NUMBERS, *_FLAGS, "denominator")


def _number(name: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        extra = " or a 1-element tensor" if name == "lr" else ""
        raise TypeError(
            f"{where}{name}={value!r} is a {type(value).__name__}; must be a number{extra}"
        )
    top = _NUMBERS[name]
    allowed = "a finite number >= 0" if top is None else f"in [0, {top:g}]"
    number = float(value)
    if not math.isfinite(number) or number < 0 or (top is not None and number > top):
        raise ValueError(f"{where}{name}={value!r} is not allowed; must be {allowed}")


def _learning_rate(value: Any, where: str, read_device: bool) -> None:
    if not isinstance(value, Tensor):
        _number("lr", value, where)
        return
    if value.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not value.is_floating_point():
        raise TypeError(f"{where}lr is a tensor of {value.dtype}; must be a floating-point tensor")
    # Reading a device tensor waits for the device: done at construction, never in a step.
    if value.device.type == "cpu" or read_device:
        _number("lr", float(value), where)


def check_options(
    options: Mapping[str, Any], where: str = "LARS: ", read_device: bool = True
) -> None:
    """Raise unless every hyper-parameter of one group is allowed."""
    for name in _NUMBERS:
        if name == "lr":
            _learning_rate(options[name], where, read_device)
        else:
            _number(name, options[name], where)
    for name in _FLAGS:
        if not isinstance(options[name], bool):
            raise TypeError(
                f"{where}{name}={options[name]!r} is not allowed; must be True or False"
            )
    check_choice("denominator", options["denominator"], DENOMINATORS, where)
    if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        raise ValueError(
            f"{where}nesterov=True requires a momentum and zero dampening; "
            f"got momentum={options['momentum']!r}, dampening={options['dampening']!r}"
        )


def check_choice(name: str, value: Any, allowed: Sequence[Any], where: str = "LARS: ") -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{where}{name}={value!r} is not allowed; must be one of {list(allowed)}")


def check_engine(backend: Any, momentum_dtype: Any, master_weights: Any, capturable: Any) -> None:
    """Raise unless the options that hold for the whole optimizer are allowed."""
    check_choice("backend", backend, BACKENDS)
    check_choice("momentum_dtype", momentum_dtype, MOMENTUM_DTYPES)
    for name, value in (("master_weights", master_weights), ("capturable", capturable)):
        if not isinstance(value, bool):
            raise TypeError(f"LARS: {name}={value!r} is not allowed; must be True or False")


def describe(where: str, t: Tensor, name: str | None = None) -> str:
    """`where (name, shape, dtype, device)`, the beginning of a message about one tensor."""
    facts = [
        *([repr(name)] if name else []),
        f"shape {tuple(t.shape)}",
        str(t.dtype),
        str(t.device),
    ]
    return f"LARS: {where} ({', '.join(facts)})"


def overlaps(t: Tensor) -> bool:
    """Whether two indices may share memory (an expanded tensor): it cannot be updated in place."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def dense(t: Tensor) -> bool:
    """Whether the elements fill one gapless stretch of memory, in whatever order of dimensions."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != reach:
                return False
            reach *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices lie at equal offsets (strides of dimensions of size 1 do not count)."""
    if a.shape != b.shape:
        return False
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.numel() == 0 or all(x == y for x, y, size in pairs if size > 1)


def check_members(group: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless every parameter of a new group is a leaf that stands nowhere else."""
    if isinstance(group.get("params"), Iterator):
        group["params"] = list(group["params"])  # torch does it too; an iterator is read once
    params = group.get("params", ())
    if isinstance(params, (Tensor, set)):
        params = [params] if isinstance(params, Tensor) else []  # torch refuses a set
    where = f"param_groups[{len(groups)}]['params']"
    held = {
        id(p): f"param_groups[{g}]['params'][{i}]"
        for g, earlier in enumerate(groups)
        for i, p in enumerate(earlier["params"])
    }
    for i, item in enumerate(params):
        name, p = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(p, Tensor):
            continue  # torch says what it wants
        label = describe(f"{where}[{i}]", p, name)
        if not p.is_leaf:
            raise ValueError(
                f"{label}: is a non-leaf tensor, the result of an operation; "
                "pass the parameter that it comes from, or detach() it"
            )
        # Twice in one group: torch warns here, and step() refuses it.
        if id(p) in held:
            raise ValueError(
                f"{label}: is a duplicate of {held[id(p)]}; "
                "some parameters appear in more than one parameter group"
            )


def check_parameter(p: Tensor, label: Callable[[], str]) -> None:
    """Raise unless `p` is something LARS can update; `label()` begins the message."""
    if p.layout != torch.strided:
        raise RuntimeError(
            f"{label()}: sparse parameters ({p.layout}) are not supported; use dense ones"
        )
    if p.is_complex():
        raise RuntimeError(
            f"{label()}: complex parameters are not supported; use torch.view_as_real(p)"
        )
    if p.dtype not in PARAMETER_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in PARAMETER_DTYPES)
        raise RuntimeError(f"{label()}: dtype {p.dtype} is not supported; supported: {names}")
    if p.is_meta:
        raise RuntimeError(
            f"{label()}: is on the meta device; materialise it with to_empty() first"
        )
    if not p.is_leaf:
        raise ValueError(
            f"{label()}: is a non-leaf tensor, the result of an operation; "
            "pass the parameter that it comes from, or detach() it"
        )
    if overlaps(p):
        raise RuntimeError(
            f"{label()}: elements share memory (an expanded tensor); use p.contiguous()"
        )
    _check_storage(p, "its", label)


def check_writable(p: Tensor, label: Callable[[], str]) -> None:
    """Raise, as torch would, for an inference tensor outside of inference mode."""
    if p.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{label()}: was created in inference mode; use p.clone(), made outside of it"
        )


def _check_storage(t: Tensor, whose: str, label: Callable[[], str]) -> None:
    if t.numel() > 0 and t.untyped_storage().nbytes() == 0:
        raise RuntimeError(f"{label()}: {whose} storage was freed; restore it before the step")


def check_readable(t: Tensor, where: str) -> None:
    """Raise unless norms of `t` can be taken."""
    if t.layout != torch.strided or t.is_complex() or t.dtype not in PARAMETER_DTYPES:
        raise RuntimeError(
            f"{describe(where, t)}: layout {t.layout}; must be dense, of floating-point dtype"
        )


def check_gradient(p: Tensor, g: Tensor, label: Callable[[], str]) -> None:
    """Raise unless `g` is a gradient that LARS can use for `p`."""
    if g.layout != torch.strided:
        raise RuntimeError(
            f"{label()}: its gradient is sparse ({g.layout}); LARS needs dense gradients, "
            "e.g. Embedding(sparse=False)"
        )
    if g.is_complex() or g.dtype not in PARAMETER_DTYPES:
        raise RuntimeError(
            f"{label()}: its gradient has dtype {g.dtype}; must be a floating-point dtype"
        )
    if g.device != p.device:
        raise RuntimeError(
            f"{label()}: its gradient is on {g.device}; must be on {p.device} as the parameter"
        )
    if g.shape != p.shape:
        raise RuntimeError(
            f"{label()}: its gradient has shape {tuple(g.shape)}; must be {tuple(p.shape)}"
        )
    _check_storage(g, "its gradient's", label)


def check_state(p: Tensor, key: str, value: Any, label: Callable[[], str]) -> None:
    """Raise unless a state tensor fits its parameter."""
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"{label()}: state {key!r} is a {type(value).__name__}; must be a tensor"
        )
    if value.shape != p.shape:
        raise RuntimeError(
            f"{label()}: state {key!r} has shape {tuple(value.shape)}; must be {tuple(p.shape)}; "
            "delete it to start afresh"
        )
    if value.dtype not in MOMENTUM_DTYPES:
        raise RuntimeError(
            f"{label()}: state {key!r} has dtype {value.dtype}; must be floating point"
        )
    _check_storage(value, f"state {key!r}'s", label)
