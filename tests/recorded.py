"""Trajectories of every convention and dtype combination, as digests of their bits.

    TRITON_INTERPRET=1 python -m tests.recorded FILE

writes them; `test_recorded.py` holds the present code against the file that was written before the
engine was rewritten. A digest covers weights, momentum buffers and master weights after each step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

from lars_fused import LARS, conventions

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


def record(backend: str = "triton") -> dict[str, str]:
    return {name: digest(options, kinds, backend) for name, options, kinds in cases()}


if __name__ == "__main__":
    from tests.interpreter import quicken

    torch.set_num_threads(1)
    quicken()
    found = {"environment": environment(), "triton": record()}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
