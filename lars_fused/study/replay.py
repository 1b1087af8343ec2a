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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lars_fused import LARS
from lars_fused.study.training import Recorder


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
