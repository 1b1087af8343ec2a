"""Take the recorded first steps of a run again with another backend, and measure the difference.

`python -m lars_fused.study.replay FILE BACKEND` prints it as JSON. It is a program of its own
because triton decides at its first import whether kernels are compiled or interpreted: the parent
sets `TRITON_INTERPRET=1` for this process alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lars_fused import LARS
from lars_fused.study import loop


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@dataclass
class Recorder(loop.Recorder):
    """Keeps the first steps of a run: enough to take them again with another backend.

    Tensors are in the order of the optimizer's groups; `members` says which belong to which group.
    """

    steps: int
    layer_stats: dict[str, Any] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    start: list[Tensor] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """When gradients are ready and the step is not yet taken."""
        if len(self.lrs) == self.steps:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.lrs:
            self.start = snapshot(params)
            index = {id(p): i for i, p in enumerate(params)}
            for group in optimizer.param_groups:
                self.members.append([index[id(p)] for p in group["params"]])
                hidden = ("params", "param_names", "lr", "initial_lr")
                self.options.append({k: v for k, v in group.items() if k not in hidden})
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        self.gradients.append(snapshot([p.grad for p in params if p.grad is not None]))

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """When the step is taken."""
        if len(self.weights) == self.steps:
            return
        if not self.weights and isinstance(optimizer, LARS):
            self.layer_stats = {str(name): stats for name, stats in optimizer.layer_stats().items()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights.append(snapshot(params))


@dataclass
class Difference:
    """Largest difference between two backends' weights, over all recorded steps.

    `relative` is taken to the largest weight of the same tensor at the same step.
    """

    backend: str
    steps: int
    values: int
    absolute: float
    relative: float


def replay(recorded: Recorder, backend: str) -> Difference:
    """Repeats the recorded steps: same start, gradients and learning rates, another backend."""
    if not recorded.weights:
        raise ValueError("nothing was recorded: the run had no step")
    params = [torch.nn.Parameter(weight.clone()) for weight in recorded.start]
    groups = [
        {"params": [params[i] for i in members], **options}
        for members, options in zip(recorded.members, recorded.options, strict=True)
    ]
    optimizer = LARS(groups, backend=backend)
    absolute = relative = 0.0
    steps = zip(recorded.lrs, recorded.gradients, recorded.weights, strict=True)
    for lrs, gradients, weights in steps:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        for param, weight in zip(params, weights, strict=True):
            gap = (param.detach() - weight).abs().max().item()
            absolute = max(absolute, gap)
            relative = max(relative, gap / max(weight.abs().max().item(), sys.float_info.min))
    values = sum(weight.numel() for weight in recorded.start)
    return Difference(str(optimizer.backend), len(recorded.weights), values, absolute, relative)


def replay_interpreted(recorded: Recorder) -> Difference:
    """`replay` through the real kernels, interpreted on the CPU in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.pt"
        torch.save(asdict(recorded) | {"layer_stats": {}}, file)
        done = subprocess.run(
            [sys.executable, "-m", "lars_fused.study.replay", str(file), "triton"],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"the replay under triton's interpreter failed:\n{done.stderr}")
    return Difference(**json.loads(done.stdout.splitlines()[-1]))


def main(file: str, backend: str) -> None:
    """Prints the difference as one line of JSON."""
    recorded = Recorder(**torch.load(file, weights_only=True))
    print(json.dumps(asdict(replay(recorded, backend))))


if __name__ == "__main__":
    main(*sys.argv[1:])
