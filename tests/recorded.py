"""Trajectories of every convention and dtype combination, as digests of their bits.

    TRITON_INTERPRET=1 python -m tests.recorded FILE

writes them; `test_recorded.py` holds the present code against the kept file. A digest covers
weights, momentum buffers and master weights after each step. Those under "triton" are each of an
optimizer of its own; they were written before the engine was rewritten, and are among the slow
tests. Those under "triton, small", "fused", "foreach" and "reference" are of small tensors, all
options as groups of one optimizer, for every combination of storage dtypes; the code of commit
2d9ca03, before the engine was rewritten, gives the same bits as those under "triton, small".
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
import triton

from lars_fused import LARS, conventions
from lars_fused._engine import torch_step, validate
from tests.cases import small_row

FILE = Path(__file__).with_name("recorded.json")
SHAPES = ((3, 5), (), (0,), (4097,), (9001,))
CONVENTIONS = ("PAPER", "APEX_LARC", "TORCHLARS", "TIMM", "MAE", "SIMCLR")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: dict(getattr(conventions, name)) for name in CONVENTIONS},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.4},
    "no momentum": {"momentum": 0.0},
    "not adapted": {"adapt": False},
    "maximize": {"maximize": True, "denominator": "gradient"},
}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, bfloat16 momentum": {"dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16},
    "bfloat16, master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "float16": {"dtype": torch.float16},
    "float16, float16 momentum": {"dtype": torch.float16, "momentum_dtype": torch.float16},
    "float16, master weights": {"dtype": torch.float16, "master_weights": True},
}


def digest(options: Mapping[str, Any], kinds: Mapping[str, Any], backend: str) -> str:
    """Three steps, the last at another learning rate, one parameter without a gradient once."""
    kinds = dict(kinds)
    dtype = kinds.pop("dtype", torch.float32)
    random = torch.Generator().manual_seed(1)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES
    ]
    base = {"momentum": 0.9, "weight_decay": 1e-2, "backend": backend}
    optimizer = LARS(params, 0.5, **base | dict(options) | kinds)
    total = hashlib.sha256()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.5 if step < 2 else 0.05
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=random).to(dtype)
            if (step, i) == (1, 1):
                p.grad = None
        optimizer.step()
        for p in params:
            held = optimizer.state.get(p, {})
            for t in (p.detach(), *(held[key] for key in sorted(held))):
                total.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


STORAGE = {str(t).removeprefix("torch."): t for t in validate.STORAGE_DTYPES}
WIDE = {**STORAGE, "float64": torch.float64}
TORCH_BACKENDS = ("fused", "foreach", torch_step.REFERENCE)
SMALL = ((3, 5), (19,))
SMALLEST = ((19,),)  # the interpreter takes 30 ms for each tensor and step


def combinations(dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[str, Any]]:
    """Parameter, momentum and master weights: whatever the optimizer takes."""
    return {
        f"{name}, {held} momentum{', master weights' * master}": {
            "dtype": dtype, "momentum_dtype": momentum, "master_weights": master,
        }
        for name, dtype in dtypes.items()
        for held, momentum in dtypes.items()
        for master in (False, True)
        if not master or dtype in (torch.float16, torch.bfloat16)
    }  # fmt: skip


def together(kinds: Mapping[str, Any], backend: str) -> dict[str, str]:
    """Some steps of an optimizer that has every options as a group: the digest of each group.

    The last one at another learning rate. With torch operations, of two tensors in each group, the
    second has no gradient once.
    """
    shapes, steps = (SMALLEST, 2) if backend == "triton" else (SMALL, 3)
    kinds = dict(kinds)
    dtype = kinds.pop("dtype")
    random = torch.Generator().manual_seed(1)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(s, generator=random).to(dtype)) for s in shapes]}
        for _ in OPTIONS
    ]
    rows = [{**o, **group} for o, group in zip(OPTIONS.values(), groups, strict=True)]
    base = {"momentum": 0.9, "weight_decay": 1e-2, "backend": backend}
    optimizer = LARS(rows, 0.5, **base | kinds)
    totals = {name: hashlib.sha256() for name in OPTIONS}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 if step < steps - 1 else 0.05
            for i, p in enumerate(group["params"]):
                p.grad = torch.randn(p.shape, generator=random).to(dtype)
                if (step, i) == (1, 1):
                    p.grad = None
        optimizer.step()
        for group, total in zip(optimizer.param_groups, totals.values(), strict=True):
            for p in group["params"]:
                held = optimizer.state.get(p, {})
                for t in (p.detach(), *(held[key] for key in sorted(held))):
                    total.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {name: total.hexdigest()[:16] for name, total in totals.items()}


@contextmanager
def torch_operations(name: str) -> Iterator[None]:
    """Within the block backend="torch" is this one of its implementations, where it can be."""
    real = torch_step.divide
    with patch.object(torch_step, "divide", lambda *lists: real(*lists[:5], name)):
        yield


def environment() -> dict[str, str]:
    """What the bits depend on beside this repository."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, options in OPTIONS.items():
        for kind, kinds in DTYPES.items():
            yield f"{name} | {kind}", options, kinds


def record() -> dict[str, Any]:
    found: dict[str, Any] = {"environment": environment()}
    found["triton"] = {name: digest(o, kinds, "triton") for name, o, kinds in cases()}
    with pytest.MonkeyPatch.context() as patched:
        small_row(patched, "cpu")
        found["triton, small"] = {
            name: together(kinds, "triton") for name, kinds in combinations(STORAGE).items()
        }
    for backend in TORCH_BACKENDS:
        with torch_operations(backend):
            found[backend] = {
                name: together(kinds, "torch") for name, kinds in combinations(WIDE).items()
            }
    return found


if __name__ == "__main__":
    from tests.interpreter import quicken

    torch.set_num_threads(1)
    quicken()
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1) + "\n")
