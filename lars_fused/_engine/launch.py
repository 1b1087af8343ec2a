"""The kernels: whether they can run, their arguments, and one launch.

The only importer of `kernels`, but for its `layout`. `launch_tables` builds the tables that they
read.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..kernels import tuning

# The interpreter keeps its state in module globals: one launch at a time in a process.
_INTERPRETER_LOCK = threading.RLock()

KernelName: TypeAlias = Literal["l2norm", "lars_resident", "lars_step", "lars_update"]


class Kernel(Protocol):
    """A function of jit code. Triton carries no types."""

    arg_names: list[str]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Compiled]:
        """Compile it for the arguments if it has not been, and launch it."""


class Compiled(Protocol):
    """A kernel compiled for one set of compile-time arguments."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """Launch it."""


class StepArguments(NamedTuple):
    """The run-time arguments of `kernels/lars_step.py`, which says what each is, in its order.

    Those of `kernels/lars_resident.py` are the same.
    """

    items: Tensor
    tensors: Tensor
    groups: Tensor
    counter: Tensor
    watch: Tensor
    arrivals: Tensor
    flags: Tensor
    partials: Tensor
    sums: Tensor
    ratios: Tensor
    grad_scale: Tensor
    found_inf: Tensor
    n_items: int


class NormArguments(NamedTuple):
    """Those of `kernels/l2norm.py`."""

    items: Tensor
    tensors: Tensor
    groups: Tensor
    arrivals: Tensor
    partials: Tensor
    sums: Tensor
    grad_scale: Tensor


class UpdateArguments(NamedTuple):
    """Those of `kernels/lars_update.py`."""

    items: Tensor
    tensors: Tensor
    groups: Tensor
    counter: Tensor
    watch: Tensor
    sums: Tensor
    ratios: Tensor
    grad_scale: Tensor
    found_inf: Tensor


Arguments: TypeAlias = StepArguments | NormArguments | UpdateArguments


class Dtypes(NamedTuple):
    """One dtype combination. `copy`: the parameter's dtype when w is its fp32 master weight."""

    w: torch.dtype
    g: torch.dtype | None
    v: torch.dtype
    copy: torch.dtype | None = None


_COMPILED: dict[
    tuple[KernelName, torch.device, Dtypes, tuning.Row], tuple[Compiled, tuple[object, ...]]
] = {}


@functools.cache
def functions() -> dict[KernelName, Kernel]:
    """The kernels that rows launch, by name; ImportError where triton is missing."""
    from ..kernels import l2norm, lars_step, lars_update

    return {
        "l2norm": l2norm.l2norm,
        "lars_step": lars_step.lars_step,
        "lars_update": lars_update.lars_update,
    }


def function(name: KernelName) -> Kernel:
    """A kernel. The one in Gluon, which is experimental, is imported only if it is asked for."""
    if name == "lars_resident":
        from ..kernels import lars_resident

        resident: Kernel = lars_resident.lars_resident
        return resident
    return functions()[name]


def kernels() -> ModuleType:
    """The package `kernels` with the modules that are launched, for benchmarks and tests."""
    functions()
    from .. import kernels

    return kernels


def interpreting() -> bool:
    """Whether the kernels run under Triton's interpreter (decided when they were imported)."""
    return hasattr(functions()["lars_step"], "rewrite")


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


class Target(NamedTuple):
    """A device as a plan sees it."""

    row: tuning.Row
    programs: int
    """How many programs run at the same time."""
    window: int
    """Bytes of w and g that a group of order "grouped" may span."""
    kernel: KernelName
    """Which one does a step in one launch."""

    @property
    def workers(self) -> int:
        """Programs that take items."""
        return self.programs - self.row.finishers


def target(device: torch.device) -> Target:
    """The launch constants of a device, and what follows from its size."""
    return _target(device, tuning.row_for(architecture(device)[0]))


def resident_target(device: torch.device) -> Target | None:
    """Those of `lars_resident`, where the device has a row for it."""
    row = tuning.resident_row_for(architecture(device)[0])
    return _target(device, row) if row is not None and _has_resident() else None


@functools.cache
def _has_resident() -> bool:
    """Whether `lars_resident` can be imported. Gluon is experimental: a release may change it."""
    try:
        function("lars_resident")
    except Exception as error:  # a changed interface fails in many ways
        warnings.warn(
            "LARS: the kernel for long lists cannot be imported "
            f"({type(error).__name__}: {error}); they take lars_step, which is slower; "
            "LARS_FUSED_KERNEL=lars_step selects it without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _target(device: torch.device, row: tuning.Row) -> Target:
    _, multiprocessors, l2_bytes = architecture(device)
    window = int(l2_bytes * tuning.WINDOW_SHARE) if row.window is None else row.window
    kernel: KernelName = "lars_resident" if row.order == "resident" else "lars_step"
    return Target(row, multiprocessors * row.programs, window, kernel)


def suits_rings(target: Target, dtypes: Dtypes, numels: Sequence[int]) -> bool:
    """Whether a list of tensors is faster with `lars_resident`, of which `target` is."""
    return tuning.suits_rings(numels, target.row, target.workers, bytes_per_element(dtypes))


def held_chunks(target: Target, dtypes: Dtypes) -> int:
    """Chunks of one tensor that all workers of `lars_resident` hold until its ratio is there."""
    return target.workers * tuning.held_steps(target.row, bytes_per_element(dtypes))


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


def bytes_per_element(dtypes: Dtypes) -> int:
    """Of w and g together."""
    return dtypes.w.itemsize + (0 if dtypes.g is None else dtypes.g.itemsize)


def is_mixed(dtypes: Dtypes) -> bool:
    """Whether not every tensor is fp32: such kernels get another cap of registers."""
    return any(dtype not in (None, torch.float32) for dtype in dtypes)


def constants(
    dtypes: Dtypes, row: tuning.Row, kernel: KernelName, emulate_bf16: bool
) -> dict[str, object]:
    """The compile-time arguments of a kernel, in the order of its signature."""
    import triton.language as tl

    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    everything: dict[str, object] = {
        "CHUNK": row.chunk,
        "BLOCK": row.block,
        "THREADS": row.threads,
        "LANES": row.lanes,
        "FINISHERS": row.finishers,
        "SLOTS": tuning.slots(row, bytes_per_element(dtypes)),
        "W_DT": types[dtypes.w],
        "G_DT": None if dtypes.g is None else types[dtypes.g],
        "V_DT": types[dtypes.v],
        "COPY_DT": None if dtypes.copy is None else types[dtypes.copy],
        **alignments(dtypes),
        "HOLD": row.hold,
        "EVICT": row.evict,
        "POLL_ATOMIC": row.poll_atomic,
        "BACKOFF": row.backoff,
        "EMULATE_BF16": emulate_bf16,
    }
    names = function(kernel).arg_names
    return {name: everything[name] for name in names if name in everything}


def run(
    name: KernelName, grid: int, args: Arguments, dtypes: Dtypes, row: tuning.Row,
    device: torch.device,
) -> None:  # fmt: skip
    """One launch. Calling the cached compiled kernel skips Triton's argument analysis."""
    kernel = function(name)
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
            options = tuning.compile_options(name, row, is_mixed(dtypes))
            try:
                compiled = kernel[(grid,)](*args, **consts, **options)
            except RuntimeError as error:
                if "cooperative" not in str(error):
                    raise
                raise RuntimeError(
                    f"{error}: {name} needs all of the GPU's multiprocessors for its {grid} "
                    "programs; where they are shared out (MPS), set LARS_FUSED_KERNEL=lars_step"
                ) from error
            _COMPILED[key] = compiled, tuple(consts.values())


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is recording a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):  # the query applies to the current device's stream
        return torch.cuda.is_current_stream_capturing()
