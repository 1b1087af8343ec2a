"""The hyper-parameters of LARS, one line each: name, type, default, range, meaning, kernel code.

Every list of them is either generated from this table (validation, the kernel's group row, defaults
for old checkpoints, `docs/options.md`) or checked against it by tests/test_options_table.py (the
signatures of `LARS` and `lars_step`, their docstrings, the use of each in the equations).

    python -c "from lars_fused import options; print(options.documentation_table())"

prints the table of docs/options.md.
"""

# Annotations are read at run time, so no `from __future__ import annotations` here.
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .kernels import layout


def finite(value: object) -> float | None:
    """A finite real number as a float; None of everything else, flags too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        return None
    return number if math.isfinite(number) else None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong = 400


def shown(value: object) -> str:
    """A value as a message shows it, shortened; of an integer beyond the floats, its length."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"(an integer of {value.bit_length()} bits)"
    try:
        return _SHORT.repr(value)
    except ValueError:  # it holds an integer of more digits than Python prints
        return f"(a {type(value).__name__})"


def _check_number(name: str, value: object, largest: float | None, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        extra = " or a 1-element tensor" if name == "lr" else ""
        raise TypeError(
            f"{where}{name}={shown(value)} is a {type(value).__name__}; must be a number{extra}"
        )
    allowed = "a finite number >= 0" if largest is None else f"in [0, {largest:g}]"
    number = finite(value)
    if number is None or number < 0 or (largest is not None and number > largest):
        raise ValueError(f"{where}{name}={shown(value)} is not allowed; must be {allowed}")


def check_choice(name: str, value: object, allowed: Sequence[Any], where: str) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(
            f"{where}{name}={shown(value)} is not allowed; must be one of {list(allowed)}"
        )


def check_flag(name: str, value: object, where: str) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}{name}={shown(value)} is not allowed; must be True or False")


def truth(name: str, value: object, where: str) -> bool:
    """A flag of a function as a bool: True, False, or a number in its place (numpy's bool, 0).

    Raises:
        TypeError: for anything else; a string is likely to be another argument.
    """
    scalar: Any = value if getattr(value, "shape", None) == () else None  # numpy's or torch's
    number = value if scalar is None else scalar.item()
    if not isinstance(number, numbers.Integral):
        check_flag(name, value, where)
    return bool(number)


def integer(name: str, value: object, at_least: int, where: str) -> int:
    """An integer of a function or a setting, numpy's too, as an int.

    Raises:
        ValueError: it is no integer (a flag is none), or below `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(
            f"{where}{name}={shown(value)} is not allowed; must be an int >= {at_least}"
        )
    return int(value)


def _check_lr(name: str, value: object, where: str, read_device: bool) -> None:
    if not isinstance(value, Tensor):
        _check_number(name, value, None, where)
        return
    if value.numel() != 1:
        raise ValueError(
            f"{where}lr is a tensor of shape {tuple(value.shape)}. Tensor lr must be 1-element; "
            "for several learning rates, give each parameter group its own"
        )
    if not value.is_floating_point():
        raise TypeError(f"{where}lr is a tensor of {value.dtype}; must be a floating-point tensor")
    if value.is_meta:
        raise ValueError(f"{where}lr is on the meta device; must be a tensor that has a value")
    # Reading a device tensor synchronises: done at construction, never in a step.
    if value.device.type == "cpu" or read_device:
        _check_number(name, float(value), None, where)


class Kind(NamedTuple):
    """What one hyper-parameter may be, and how the kernels get it."""

    symbol: str
    meaning: str
    word: int
    """Its index in the kernels' row of a parameter group (`kernels/layout.py`)."""
    allowed: str
    """The range, for people."""
    check: Callable[[str, object, str, bool], None]
    """Raises unless a value is in range; takes name, value, prefix of the message, read_device."""
    encode: Callable[[Any], float]
    """A value as stored in the row; for SWITCHES, the bits that it sets there."""


def learning_rate(symbol: str, meaning: str, word: int) -> Kind:
    """A number, or a 1-element tensor that the kernels read from the device."""
    return Kind(symbol, meaning, word, ">= 0, or a 1-element tensor", _check_lr, float)


def number(
    symbol: str,
    meaning: str,
    word: int,
    encode: Callable[[Any], float] = float,
    largest: float | None = None,
) -> Kind:
    """A real number, 0 or above."""

    def check(name: str, value: object, where: str, _: bool) -> None:
        _check_number(name, value, largest, where)

    allowed = ">= 0" if largest is None else f"0 to {largest:g}"
    return Kind(symbol, meaning, word, allowed, check, encode)


def flag(symbol: str, meaning: str, bit: int) -> Kind:
    """True or False: a bit among the kernels' switches."""

    def check(name: str, value: object, where: str, _: bool) -> None:
        check_flag(name, value, where)

    return Kind(symbol, meaning, layout.SWITCHES, "True, False", check, lambda on: bit if on else 0)


def choice(symbol: str, meaning: str, codes: Mapping[str, int]) -> Kind:
    """One of a few names, each with its bits among the kernels' switches."""

    def check(name: str, value: object, where: str, _: bool) -> None:
        check_choice(name, value, list(codes), where)

    allowed = ", ".join(f'"{name}"' for name in codes)
    return Kind(symbol, meaning, layout.SWITCHES, allowed, check, codes.__getitem__)


class Options(NamedTuple):
    """The hyper-parameters of one parameter group."""

    # fmt: off
    lr: Annotated[float | Tensor, learning_rate("γ", "learning rate", layout.LR)] = 1.0
    momentum: Annotated[float, number("μ", "momentum", layout.MOMENTUM, largest=1.0)] = 0.9
    weight_decay: Annotated[float, number("β", "weight decay", layout.DECAY)] = 0.0
    trust_coefficient: Annotated[
        float, number("η", "factor of the trust ratio", layout.TRUST)] = 0.001
    eps: Annotated[
        float, number("ε", "added to the denominator of the trust ratio", layout.EPS)] = 1e-8
    dampening: Annotated[
        float, number("τ", "dampening of the momentum", layout.KEEP, lambda t: 1.0 - t, 1.0)] = 0.0
    nesterov: Annotated[bool, flag("", "Nesterov momentum", layout.NESTEROV)] = False
    denominator: Annotated[str, choice(
        "D", "norms in the denominator of the trust ratio", layout.DENOMINATORS)] = "sum"
    lr_in_momentum: Annotated[
        bool, flag("", "whether γ is inside the momentum buffer", layout.LR_IN_MOMENTUM)] = True
    trust_clip: Annotated[
        bool, flag("", "clip the trust ratio: q = min(q/γ, 1)", layout.CLIP)] = False
    decay_zero_norm: Annotated[
        bool, flag("", "whether a tensor with a zero norm decays", layout.DECAY_ZERO_NORM)] = True
    adapt: Annotated[bool, flag("", "whether the trust ratio is used", layout.ADAPT)] = True
    maximize: Annotated[bool, flag("", "maximize the objective", layout.MAXIMIZE)] = False
    # fmt: on


TABLE: dict[str, Kind] = {
    name: hint.__metadata__[0] for name, hint in Options.__annotations__.items()
}


def group_row(options: Options, device: torch.device) -> tuple[list[float], dict[int, int]]:
    """A group's row of `kernels/layout.py`: its numbers, and its integers by word."""
    row, address, switches = [0.0] * layout.GROUP_WORDS, 0, 0
    for kind, value in zip(TABLE.values(), options, strict=True):
        if kind.word == layout.SWITCHES:
            switches |= int(kind.encode(value))
            continue
        if isinstance(value, Tensor):
            there = value.device == device and device.type != "cpu"
            # A wrapper of other tensors has no address.
            if there and value.dtype in _DEVICE_LR and (address := value.data_ptr()):
                switches |= layout.LR_IS_FP64 if value.dtype == torch.float64 else 0
                continue
            value = float(value)
        row[kind.word] = kind.encode(value)
    return row, {layout.LR_AT: address, layout.SWITCHES: switches}


_DEVICE_LR = (torch.float32, torch.float64)


class Settings(NamedTuple):
    """Options of the whole optimizer rather than of a group: storage, and how a step runs."""

    momentum_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    capturable: bool = False
    exclude_ndim: int = -1
    backend: str = "auto"


BACKENDS = ("auto", "torch", "triton")
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with floats in the place of other numbers (numpy's), which checkpoints can hold."""

    def foreign(name: str, value: Any) -> bool:
        number = name in (*TABLE, "initial_lr") and isinstance(value, numbers.Real)
        return number and type(value) not in (int, float, bool)

    return {n: float(value) if foreign(n, value) else value for n, value in values.items()}


def pick(values: Mapping[str, Any]) -> Options:
    """Pick the options out of `values`: a group, or the arguments of a call."""
    return Options(**{name: values[name] for name in Options._fields})


def check(values: Mapping[str, Any], where: str, read_device: bool = True) -> None:
    """Raise unless every hyper-parameter of one group is allowed.

    Args:
        values: has every option by name.
        where: prefix of the message, such as "LARS: param_groups[0]: ".
        read_device: whether to read a learning rate in device memory, which synchronises.

    Raises:
        ValueError, TypeError: naming the option, its value and what is allowed.
    """
    for name, kind in TABLE.items():
        if name not in values:
            raise ValueError(
                f"{where}{name} is missing; every group needs every option: set it, or let "
                "add_param_group add the group with the optimizer's defaults"
            )
        kind.check(name, values[name], where, read_device)
    if values["nesterov"] and (values["momentum"] == 0 or values["dampening"] != 0):
        raise ValueError(
            f"{where}nesterov=True requires momentum > 0 and dampening=0; "
            f"got momentum={values['momentum']!r}, dampening={values['dampening']!r}"
        )


def check_settings(settings: Settings, where: str) -> None:
    """Raise unless the options of the whole optimizer are allowed."""
    check_choice("backend", settings.backend, BACKENDS, where)
    check_choice("momentum_dtype", settings.momentum_dtype, MOMENTUM_DTYPES, where)
    check_flag("master_weights", settings.master_weights, where)
    check_flag("capturable", settings.capturable, where)
    integer("exclude_ndim", settings.exclude_ndim, -1, where)


def documentation_table() -> str:
    """The hyper-parameters as a Markdown table."""
    lines = ["| option | symbol | allowed | default | meaning |", "|---|---|---|---|---|"]
    for name, kind in TABLE.items():
        default = Options._field_defaults[name]
        shown = f'"{default}"' if isinstance(default, str) else f"{default}"
        lines.append(f"| `{name}` | {kind.symbol} | {kind.allowed} | `{shown}` | {kind.meaning} |")
    return "\n".join(lines)
