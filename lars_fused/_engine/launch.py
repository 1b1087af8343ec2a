"""The kernels: whether they can run, their compile-time arguments, and one launch.

The only importer of `kernels`. `launch_tables` builds the tables that they read.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

# The interpreter keeps its state in module globals: one launch at a time in a process.
_INTERPRETER_LOCK = threading.RLock()
_COMPILED: dict[Any, Any] = {}


class Dtypes(NamedTuple):
    """One dtype combination. `copy`: the parameter's dtype when w is its fp32 master weight."""

    w: torch.dtype
    g: torch.dtype | None
    v: torch.dtype
    copy: torch.dtype | None = None


@functools.cache
def kernels() -> ModuleType:
    """The kernel modules; ImportError where triton is missing."""
    from .. import kernels
    from ..kernels import l2norm, lars_resident, lars_step, lars_update, tuning  # noqa: F401

    module: ModuleType = kernels
    return module


def interpreting() -> bool:
    """Whether the kernels run under Triton's interpreter (decided when they were imported)."""
    return hasattr(kernels().lars_step.lars_step, "rewrite")


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None where they can."""
    if device.type not in ("cuda", "cpu"):
        return f"there are no kernels for {device.type} devices"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    try:
        interpreted = interpreting()
    except Exception as error:  # a broken install fails in many ways; report any
        return f"triton cannot be used ({type(error).__name__}: {error})"
    if device.type == "cpu" and not interpreted:
        return "TRITON_INTERPRET=1 was set after the kernels were imported; set it earlier"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only; unset it"
    return None


def expected(device: torch.device) -> bool:
    """Whether users expect the kernels on `device`, so that a fallback deserves a warning."""
    return device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )


@functools.cache
def architecture(device: torch.device) -> tuple[str, int, int]:
    """Architecture name as in `tuning.ROWS`, number of multiprocessors, bytes of L2."""
    if device.type == "cpu":
        return "interpreter", 1, 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name, properties.multi_processor_count, properties.L2_cache_size


def alignments(dtypes: Dtypes) -> dict[str, int]:
    """Bytes of alignment promised to the compiler for each operand.

    128-bit accesses, but 64-bit ones for a 2-byte operand beside an fp32 one: both then hold four
    elements per thread and share one layout, with no conversion through shared memory. The choice
    is the same for every kernel, so that all of them sum the squares in the same order.
    """
    wide = torch.float32 in (dtypes[:1] if dtypes.g is None else dtypes)
    return {
        f"{name}_ALIGN": 8 if wide and dtype is not None and dtype.itemsize < 4 else 16
        for name, dtype in zip(("W", "G", "V", "COPY"), dtypes, strict=True)
    }


def is_mixed(dtypes: Dtypes) -> bool:
    """Whether not every tensor is fp32: such kernels get another cap of registers."""
    return any(dtype not in (None, torch.float32) for dtype in dtypes)


def slots(dtypes: Dtypes, row: Any) -> int:
    """Chunks of w and g that a program of `lars_resident` holds."""
    widths = dtypes.w.itemsize + (0 if dtypes.g is None else dtypes.g.itemsize)
    return int(row.ring // (row.chunk * widths))


def constants(dtypes: Dtypes, row: Any, kernel: str, emulate_bf16: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel, in the order of its signature."""
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    everything = {
        "CHUNK": row.chunk,
        "BLOCK": row.block,
        "THREADS": row.threads,
        "LANES": row.lanes,
        "SLOTS": slots(dtypes, row),
        "W_DT": names[dtypes.w],
        "G_DT": None if dtypes.g is None else names[dtypes.g],
        "V_DT": names[dtypes.v],
        "COPY_DT": None if dtypes.copy is None else names[dtypes.copy],
        **alignments(dtypes),
        "HOLD": row.hold,
        "EVICT": row.evict,
        "POLL_ATOMIC": row.poll_atomic,
        "BACKOFF": row.backoff,
        "EMULATE_BF16": emulate_bf16,
    }
    arguments = getattr(getattr(kernels(), kernel), kernel).arg_names
    return {name: everything[name] for name in arguments if name in everything}


def run(
    name: str, grid: int, args: Sequence[Any], dtypes: Dtypes, row: Any, device: torch.device
) -> None:
    """One launch. Calling the cached compiled kernel skips Triton's argument analysis."""
    kernel = getattr(getattr(kernels(), name), name)
    if device.type == "cpu":
        with _INTERPRETER_LOCK:
            kernel[(grid,)](*args, **constants(dtypes, row, name, True))
        return
    key = (name, device, dtypes, row)
    with torch.cuda.device(device):
        if key in _COMPILED:
            compiled, values = _COMPILED[key]
            compiled[(grid, 1, 1)](*args, *values)
        else:
            consts = constants(dtypes, row, name, False)
            options = kernels().tuning.compile_options(name, row, is_mixed(dtypes))
            compiled = kernel[(grid,)](*args, **consts, **options)
            _COMPILED[key] = compiled, tuple(consts.values())


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is recording a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):  # the query applies to the current device's stream
        return torch.cuda.is_current_stream_capturing()
