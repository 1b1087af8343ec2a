"""Named options and layouts, and guarded memory to put them in: what the kernel tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.internals import launch

_MARGIN = 64  # bytes of sentinel before and after a tensor
# 3.4e38 in fp32 and bf16, NaN in fp16: one that is read shows in every norm.
SENTINEL = 0x7F

# Every term is large: with |w| and |g| about 1, dropping any one moves w by far more than the bound
# (kernels/test_accuracy.test_every_term_moves_the_result).
TERMS: dict[str, Any] = {
    "lr": 1.5,
    "momentum": 0.8,
    "weight_decay": 0.3,
    "trust_coefficient": 0.2,
    "eps": 2.0,
}

# Every variant of the equations; each is a parameter group of one optimizer, so one launch.
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {},
    "decayed": {"denominator": "decayed"},
    "gradient": {"denominator": "gradient"},
    "lr outside": {"lr_in_momentum": False},
    "nesterov": {"nesterov": True},
    "nesterov, lr outside": {"nesterov": True, "lr_in_momentum": False},
    "dampening": {"dampening": 0.4},
    "maximize": {"maximize": True},
    "clip": {"trust_clip": True, "trust_coefficient": 0.9},
    "clip, lr outside": {"trust_clip": True, "lr": 0.05, "lr_in_momentum": False},
    "no decay": {"weight_decay": 0.0},
    "decay_zero_norm off": {"decay_zero_norm": False},
    "not adapted": {"adapt": False, "lr": 0.1},
    "not adapted, nesterov": {"adapt": False, "nesterov": True, "lr": 0.1},
    "no momentum": {"momentum": 0.0},
    "no momentum, dampening": {"momentum": 0.0, "dampening": 0.5},
    "lr zero": {"lr": 0.0},
}


# Weights, gradients, momentum, and whether the weights are fp32 masters.
COMBINATIONS = [
    (torch.float16, torch.float16, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, torch.float32, False),
    (torch.float32, torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.float32, torch.float32, False),
    (torch.float32, torch.float16, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    (torch.float16, torch.float16, torch.float16, False),
    (torch.bfloat16, torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float32, torch.bfloat16, True),
]


def leave_to_the_interpreter(tier: str, w: torch.dtype, g: torch.dtype, v: torch.dtype) -> None:
    """In the tier `ptx`, skip dtypes that would be three seconds of compiling for one test alone.

    The operands are widened and narrowed one by one: `COMBINATIONS` has each of them in each dtype.
    """
    narrow = {torch.float16, torch.bfloat16}
    mixed = {w, g, v} & narrow and {w, g, v} <= {torch.float32, *narrow}
    if tier == "ptx" and mixed and (w, g, v, False) not in COMBINATIONS:
        pytest.skip("for time: a build of its own; the interpreter has this combination")


@dataclass(frozen=True)
class Spec:
    """One tensor. Offsets: elements past a 64-byte boundary. `order`: dimensions from the slowest
    in memory to the fastest. `gap`: elements between neighbours, 1 for a dense tensor.
    """

    name: str
    shape: tuple[int, ...]
    w_offset: int = 0
    g_offset: int = 0
    order: tuple[int, ...] | None = None
    g_order: tuple[int, ...] | None = None
    gap: int = 1


def small_row(monkeypatch: pytest.MonkeyPatch, device: str, **changes: Any) -> Any:
    """The launch constants of `device`; under the interpreter small, so that cases are small."""
    if launch.why_not(torch.device(device)) is None:
        tuning = launch.kernels().tuning
        architecture = launch.architecture(torch.device(device))[0]
        if device == "cpu" and architecture != "interpreter":  # the PTX machine
            small = {"chunk": 2048, "block": 1024, "window": 1 << 16} | changes
            row = tuning.row_for(architecture)._replace(**small)
            monkeypatch.setitem(tuning.ROWS, architecture, row)
            return row
        small = {"chunk": 64, "block": 32, "threads": 16, "lanes": 4, "window": 1024} | changes
        row = tuning.ROWS["interpreter"]._replace(**small)
        monkeypatch.setitem(tuning.ROWS, "interpreter", row)
        return tuning.row_for(launch.architecture(torch.device(device))[0])
    return Sizes(**{"chunk": 64, "block": 32, "threads": 16} | changes)


@dataclass
class Sizes:
    """Stands in for a tuning row where there are no kernels."""

    chunk: int
    block: int
    threads: int
    programs: int = 3
    lanes: int = 4
    window: int = 1024


def regimes(row: Any) -> list[Spec]:
    """Every layout that the kernels take, around every size where their loops change."""
    chunk, block, threads = row.chunk, row.block, row.threads
    edges = {s + d for s in (threads, block, chunk) for d in (-1, 0, 1)} | {
        2 * chunk,
        3 * chunk + 1,
    }
    return [
        Spec("empty", (0,)),
        Spec("empty 2-d", (3, 0)),
        Spec("one element", (1,)),
        Spec("0-dim", ()),
        *(Spec(f"{n} elements", (n,)) for n in sorted(edges)),
        Spec("misaligned by 1 and 0", (chunk + block + 3,), 1, 0),
        Spec("misaligned by 0 and 2", (chunk + block + 3,), 0, 2),
        Spec("misaligned by 3 and 3", (block + 5,), 3, 3),
        Spec("misaligned by 5 and 1", (2 * chunk,), 5, 1),
        Spec("transposed", (7, block), order=(1, 0), g_order=(1, 0)),
        Spec("channels_last", (4, 3, 5, 7), order=(0, 2, 3, 1), g_order=(0, 2, 3, 1)),
    ]


def odd_layouts(row: Any) -> list[Spec]:
    """Layouts that only the portable path takes."""
    return [
        Spec("every other element", (row.block + 3,), gap=2),
        Spec("gradient transposed", (9, row.block), g_order=(1, 0)),
        Spec("channels_last beside a contiguous gradient", (4, 3, 5, 2), order=(0, 2, 3, 1)),
        Spec("contiguous beside a channels_last gradient", (4, 3, 5, 2), g_order=(0, 2, 3, 1)),
    ]


class Memory:
    """Tensors in buffers of their own, with sentinels around them and in their gaps."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self._kept: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def place(
        self, values: Tensor, dtype: torch.dtype, name: str, offset: int = 0,
        order: tuple[int, ...] | None = None, gap: int = 1,
    ) -> Tensor:  # fmt: skip
        strides, reach = [0] * values.ndim, gap
        for dim in reversed(order or range(values.ndim)):
            strides[dim], reach = reach, reach * max(values.shape[dim], 1)
        margin = _MARGIN // dtype.itemsize
        size = reach + 2 * margin + offset
        base = torch.full((size * dtype.itemsize,), SENTINEL, dtype=torch.uint8, device=self.device)
        flat = base.view(dtype)
        t = flat.as_strided(values.shape, strides, margin + offset)
        t.copy_(values)
        self._kept.append((name, base, base.clone(), t))
        return t

    def check(self) -> None:
        """Fail if a byte outside of the tensors has changed."""
        for name, base, before, t in self._kept:
            expected = before.clone()
            where = (t.shape, t.stride(), t.storage_offset())
            expected.view(t.dtype).as_strided(*where).copy_(t)
            changed = (expected != base).nonzero().flatten().tolist()
            assert not changed, f"{name}: bytes {changed[:8]} around the tensor were written"


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    """Contents, byte by byte: also tells -0 from 0, and equates NaNs."""
    return [
        t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors
    ]


def marked(*marks):
    """Several markers as one decorator."""

    def decorate(test):
        for mark in marks:
            test = mark(test)
        return test

    return decorate


def some(count=3, n=5, dtype=torch.float32, device="cpu"):
    params = [torch.nn.Parameter(torch.randn(n, device=device).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params
