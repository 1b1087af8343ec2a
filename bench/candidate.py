"""A kernel that waits to be measured: ``python -m bench candidate FOLDER``.

Its row stands in `tuning.CANDIDATES`, so that no step depends on it, and no figure of the kernels
that are launched may depend on it either. So everything about it is here, in a part of its own: its
tests, its time beside SGD and the present kernel, its launches and DRAM bytes, compute-sanitizer.
Where it fails, that is noted under ``candidate`` in environment.json, and the part ends.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import environment, profiler, sanitizer
from bench.budget import Budget
from bench.cases import model_case
from bench.harness import Recorder, measure
from bench.peers import FLOOR, HELD, LADDER, ONE, held
from bench.profiler import limited
from bench.supervise import Pieces
from lars_fused._engine import launch
from lars_fused.kernels import tuning

MODELS = ("ResNet-50", "ViT-B/16")
TESTS = "candidate: tests"
PASSED = "passed"
BESIDE = {FLOOR: LADDER[FLOOR], ONE: LADDER[ONE], HELD: held}


def _status(command: list[str]) -> int:
    return subprocess.run(command, cwd=environment.ROOT).returncode


def _test(folder: Path) -> None:
    command = [sys.executable, "ci/test.py", "candidate"]
    environment.note(folder, candidate={"tests": "begun"})  # where they hang, that stays
    status = _status(limited(command, 70))
    found = PASSED if status == 0 else f"failed, exit status {status}"
    environment.note(folder, candidate={"tests": found})


def _time(model: str, device: torch.device, recorder: Recorder) -> None:
    measure(model_case(model), device, BESIDE, recorder, gate="candidate")


def _sanitize(tool: str, folder: Path, seconds: float) -> None:
    found = sanitizer.check(tool, folder, seconds, candidate=True)
    environment.note(folder, candidate={tool: found})
    print(f"compute-sanitizer {tool}: {found}", flush=True)


def passed(folder: Path) -> bool:
    """Whether its tests have passed on this GPU, the last time that they were begun."""
    return environment.read(folder).get("candidate", {}).get("tests") == PASSED


def main(folder: Path, budget: Budget, on: str = "cuda") -> int:
    device = torch.device(on)
    architecture = launch.architecture(device)[0]
    if tuning.candidate_for(architecture) is None:
        print(f"no row for {architecture} waits to be measured")
        return 0
    recorder, pieces = Recorder(folder), Pieces(folder)
    todo: dict[str, tuple[Callable[[], object], float]] = {TESTS: (partial(_test, folder), 80)}
    for model in MODELS:
        todo[f"candidate: {model}"] = partial(_time, model, device, recorder), 45
    todo["candidate: launches"] = partial(profiler.count_step, HELD, recorder), 25
    todo["candidate: by ncu"] = partial(profiler.weigh, (HELD,), recorder, folder, budget), math.inf
    for tool in sanitizer.TOOLS:
        todo[f"candidate: {tool}"] = partial(_sanitize, tool, folder, 25.0), 35
    for name, (do, seconds) in todo.items():
        if name in pieces.begun() or budget.left <= 0:
            continue
        if name != TESTS and not passed(folder):
            print("its tests have not passed: nothing else of it is run")
            return 1
        with pieces.piece(name, seconds, budget):
            try:
                do()
            except Exception as error:  # whatever it is: noted, and raised again
                environment.note(folder, candidate={name: f"{type(error).__name__}: {error}"[:300]})
                raise
    return 0
