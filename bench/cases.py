"""What is measured: a model's shapes (or a number of parameters) in one combination of dtypes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch

from bench.models import MODELS, Shapes, adapted
from bench.variants import Inputs

# Weights, gradients, momentum.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16, fp32 momentum": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32, bf16 gradients": (torch.float32, torch.bfloat16, torch.float32),
}
SWEEP = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
SWEEP_CASE = "sweep"
_LARGEST = 2048 * 2048


def slug(name: str) -> str:
    """A name for a part of a run: resnet50 for ResNet-50."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    shapes: Shapes

    @property
    def n_params(self) -> int:
        return sum(prod(shape) for _, shape in self.shapes)

    @property
    def exact(self) -> bool:
        """Whether everything is fp32, so that peers can agree to rounding."""
        return self.dtype == "fp32"

    @property
    def least_bytes(self) -> int:
        """Read w, g, v, write w, v, each once: 20 per parameter in fp32."""
        w, g, v = (dtype.itemsize for dtype in DTYPES[self.dtype])
        return self.n_params * (2 * w + g + 2 * v)

    @property
    def two_pass_bytes(self) -> int:
        """The same with w and g of adapted tensors read twice: 28 per parameter in fp32."""
        w, g, _ = (dtype.itemsize for dtype in DTYPES[self.dtype])
        again = sum(prod(shape) for name, shape in self.shapes if adapted(name, shape))
        return self.least_bytes + again * (w + g)

    def inputs(self, device: torch.device) -> Inputs:
        """Random tensors; never zeros, on which hardware can be faster."""
        generator = torch.Generator(device).manual_seed(0)
        columns = []
        for dtype, scale in zip(DTYPES[self.dtype], (0.05, 0.01, 0.001), strict=True):
            columns.append([
                torch.randn(shape, device=device, generator=generator).mul_(scale).to(dtype)
                for _, shape in self.shapes
            ])  # fmt: skip
        return Inputs(*columns, [adapted(name, shape) for name, shape in self.shapes])

    def copy_elements(self, device: torch.device) -> int:
        """fp32 elements of the copy that measures bandwidth: well beyond every cache."""
        return (1 << 28) if device.type == "cuda" else (1 << 24)


def model_case(name: str, dtype: str = "fp32") -> Case:
    return Case(name, dtype, MODELS[name]())


def sweep_case(n_params: int, dtype: str = "fp32") -> Case:
    """Equal matrices, 32 of them until one would exceed 4M elements."""
    count = max(32, round(n_params / _LARGEST))
    columns = max(1, round((n_params / count) ** 0.5))
    rows = max(1, round(n_params / count / columns))
    return Case(SWEEP_CASE, dtype, [(f"layer{i}", (rows, columns)) for i in range(count)])
