"""Every check of a tensor and its error text. No side effects.

A message names the tensor, what is wrong, what is allowed and, where it helps, the remedy. It
begins with `LARS: param_groups[g]['params'][i] (name, shape, dtype, device)`, or with
`lars_step: params[i] (...)`. Hyper-parameters are checked by `options`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import MOMENTUM_DTYPES, shown

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the kernels support."""
STORAGE_TEXT = "float32, float16 and bfloat16"
PARAMETER_DTYPES = (*STORAGE_DTYPES, torch.float64)
LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Dtypes that can have fp32 master weights."""


def describe(where: str, t: Tensor, name: str | None = None, what: str = "LARS") -> str:
    """`what: where (name, shape, dtype, device)`, the prefix of a message about one tensor."""
    facts = [
        *([repr(name)] if name else []),
        f"shape {tuple(t.shape)}",
        str(t.dtype),
        str(t.device),
    ]
    return f"{what}: {where} ({', '.join(facts)})"


def not_a_tensor(where: str, value: object, also: str = "") -> TypeError:
    """The error for what is no tensor; `also`: what else is allowed, and the remedy."""
    return TypeError(f"{where}={shown(value)} is a {type(value).__name__}; must be a tensor{also}")


def overlaps(t: Tensor) -> bool:
    """Whether elements may share memory (an expanded tensor), which rules out in-place updates."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def dense(t: Tensor) -> bool:
    """Whether the elements fill one gapless stretch of memory, in any order of dimensions."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != reach:
                return False
            reach *= size
    return True


def in_memory(t: Tensor) -> bool:
    """Whether the elements lie at the tensor's address.

    Those of a wrapper subclass (`_make_wrapper_subclass`: torchao's float8 and int8 weights) lie in
    other tensors; it has ordinary dtype, strides and storage size, and no memory.
    """
    if t.numel() == 0:
        return True
    try:
        return t.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # fake and functional tensors
        return False


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices have equal offsets (strides of size-1 dimensions do not matter)."""
    if a.shape != b.shape:
        return False
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.numel() == 0 or all(x == y for x, y, size in pairs if size > 1)


def check_members(group: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless every parameter of a new group is a leaf and in no other group."""
    if isinstance(group.get("params"), Iterator):
        group["params"] = list(group["params"])  # as torch does; an iterator can be read only once
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
            continue  # torch's own message explains it
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
    """Raise unless LARS can update `p`; `label()` is the prefix of the message."""
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
            f"{label()}: was created in inference mode; clone it outside of inference mode"
        )


def _check_storage(t: Tensor, whose: str, label: Callable[[], str]) -> None:
    if t.numel() > 0 and t.untyped_storage().nbytes() == 0:
        raise RuntimeError(f"{label()}: {whose} storage was freed; restore it before the step")


def check_readable(t: Tensor, label: Callable[[], str]) -> None:
    """Raise unless the norm of `t` can be computed."""
    if t.layout != torch.strided or t.is_complex() or t.dtype not in PARAMETER_DTYPES:
        raise RuntimeError(
            f"{label()}: must be a dense floating-point tensor (layout: {t.layout}; float32, "
            "float16, bfloat16 or float64); convert it or leave it out"
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
            f"{label()}: its gradient is on {g.device}; must be on {p.device} like the parameter"
        )
    if g.shape != p.shape:
        raise RuntimeError(
            f"{label()}: its gradient has shape {tuple(g.shape)}; must be {tuple(p.shape)}"
        )
    _check_storage(g, "its gradient's", label)


def check_state(p: Tensor, key: str, value: object, label: Callable[[], str], remedy: str) -> None:
    """Raise unless a state tensor fits its parameter."""
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"{label()}: state {key!r} is a {type(value).__name__}; must be a tensor; {remedy}"
        )
    if value.shape != p.shape:
        raise RuntimeError(
            f"{label()}: state {key!r} has shape {tuple(value.shape)}; must be {tuple(p.shape)}; "
            f"{remedy}"
        )
    if value.dtype not in MOMENTUM_DTYPES:
        raise RuntimeError(
            f"{label()}: state {key!r} has dtype {value.dtype}; must be a floating-point dtype; "
            f"{remedy}"
        )
    _check_storage(value, f"state {key!r}'s", label)
