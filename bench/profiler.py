"""What a step does to the GPU, counted: launches, copies, waits, and bytes of DRAM.

Counts come from torch.profiler, bytes from Nsight Compute (`ncu`) where it works. Bytes are summed
over several steps in a row, the caches left as the step before left them, so that what a step
leaves dirty in the L2 is paid by the next and the sum is that of a training loop.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.cases import model_case
from bench.harness import Recorder
from bench.peers import FLOOR, LADDER, ONE, TWO, Variant
from bench.timers import Budget

MODELS = ("ResNet-50", "ViT-B/16", "one 100M tensor")
ORDER = (ONE, TWO, FLOOR)
STEPS = 4
COUNTS = ("launches a step", "copies from the host a step", "waits of the host a step")
DRAM = "DRAM bytes a parameter"
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
_KERNELS = {"lars_step": ONE, "l2norm": TWO, "lars_update": TWO, "multi_tensor_apply": FLOOR}
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_RANGE = "lars_fused steps"


def _ready(model: str, name: str) -> Variant:
    variant = LADDER[name](model_case(model).inputs(torch.device("cuda")))
    for _ in range(3):
        variant.step()
    torch.cuda.synchronize()
    return variant


def count(variant: Variant) -> tuple[float, float, float]:
    """Launches, copies from the host and waits of one step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as profiled:
        with record_function(_RANGE):
            for _ in range(STEPS):
                variant.step()
        torch.cuda.synchronize()
    return counts(list(profiled.events()))


def counts(events: list[Any]) -> tuple[float, float, float]:
    """The same from the profiler's events of STEPS steps."""
    gpu = torch.autograd.DeviceType.CUDA
    # Ranges such as "Optimizer.step#LARS.step" are shown on the GPU's timeline too.
    marks = (_RANGE, "Optimizer.", "Memcpy", "Memset")
    kernels = [e for e in events if e.device_type == gpu and not e.name.startswith(marks)]
    copies = [e for e in events if e.device_type == gpu and "HtoD" in e.name]
    span = next(e.time_range for e in events if e.name == _RANGE and e.device_type != gpu)
    waits = [e for e in events if e.name in _WAITS and span.start <= e.time_range.start <= span.end]
    return len(kernels) / STEPS, len(copies) / STEPS, len(waits) / STEPS


def dram_bytes(lines: Iterable[str], plan: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Bytes of one step of each (model, variant) of `plan`, from the CSV that ncu prints.

    Kernels come in the order of the plan; where the kernels of another variant begin, so does the
    next entry.
    """
    lines = list(lines)
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[tuple[str, str], float] = defaultdict(float)
    at, now = -1, ""
    for row in csv.DictReader(lines[start:]):
        name = row["Kernel Name"]
        variant = next((v for k, v in _KERNELS.items() if k in name), "")
        if not variant or not row["Metric Name"].startswith("dram__bytes"):
            continue
        if variant != now:
            at, now = at + 1, variant
            if at >= len(plan) or plan[at][1] != variant:
                raise ValueError(f"ncu shows {name} where {plan[at : at + 1]} was expected")
        if row["Metric Unit"] not in ("byte", "bytes"):
            raise ValueError(f"ncu gave {row['Metric Unit']!r} where bytes were asked for")
        found[plan[at]] += float(row["Metric Value"].replace(",", "")) / STEPS
    return dict(found)


def _ncu() -> str | None:
    known = [*Path("/opt/nvidia/nsight-compute").glob("*/ncu"), Path("/usr/local/cuda/bin/ncu")]
    return shutil.which("ncu") or next((str(p) for p in known if p.exists()), None)


def _run_ncu(budget: Budget) -> dict[tuple[str, str], float]:
    ncu = _ncu()
    if ncu is None:
        raise RuntimeError("ncu is not installed")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [ncu, "--clock-control", "none", "--cache-control", "none"]
        command += ["--profile-from-start", "off", "--target-processes", "all"]
        command += ["--metrics", METRICS, "--print-units", "base", "--csv", "--log-file", str(log)]
        command += [sys.executable, "-m", "bench.profiler"]
        said = Path(folder) / "said.txt"
        with said.open("w") as output:
            # A group of its own: ncu's own child has to end with it.
            process = subprocess.Popen(
                command, cwd=environment.ROOT, stdout=output, stderr=output, start_new_session=True
            )
            try:
                process.wait(max(1.0, budget.left))
                whole = True
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                whole = False
        text = log.read_text() if log.exists() else ""
        errors = [s for s in [*text.splitlines(), *said.read_text().splitlines()] if "rror" in s]
    found = dram_bytes(text.splitlines(), [(model, name) for model in MODELS for name in ORDER])
    if not whole and found:
        found.popitem()  # it may not hold all of its steps
    if not found:
        raise RuntimeError(errors[0] if errors else f"ncu saw nothing; whole run: {whole}")
    return found


def main(folder: Path, seconds: float) -> int:
    budget, recorder = Budget(seconds), Recorder(folder)
    if "sha" not in environment.read(folder):
        environment.note(folder, **environment.facts("python -m bench profile"))
    for name in ORDER:
        case = model_case(MODELS[0])
        facts = {"n_tensors": len(case.shapes), "n_params": case.n_params}
        counted = count(_ready(MODELS[0], name))
        if counted[0] == 0:
            recorder.note(absent={f"{COUNTS[0]}, {name}": "the profiler saw no kernel"})
            print(f"{MODELS[0]}, {name}: not measured, the profiler saw no kernel")
            continue
        for unit, value in zip(COUNTS, counted, strict=True):
            recorder.add(MODELS[0], name, [value], **facts, unit=unit)
            print(f"{MODELS[0]}, {name}: {value:g} {unit}", flush=True)
    try:
        found = _run_ncu(budget)
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        recorder.note(absent={DRAM: reason})
        print(f"{DRAM}: not measured, {reason}")
        return 0
    for (model, name), total in found.items():
        case = model_case(model)
        per_parameter = total / case.n_params
        recorder.add(
            model, name, [per_parameter], n_tensors=len(case.shapes), n_params=case.n_params,
            bytes=round(total), unit=DRAM,
        )  # fmt: skip
        print(f"{model}, {name}: {per_parameter:.2f} {DRAM}")
    return 0


def under_ncu() -> None:
    """What ncu looks at: a few steps of each variant of each model."""
    for model in MODELS:
        for name in ORDER:
            variant = _ready(model, name)
            torch.cuda.profiler.start()
            for _ in range(STEPS):
                variant.step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    under_ncu()
