"""What a step does to the GPU, counted: launches, copies, waits, and bytes of DRAM.

Counts come from torch.profiler, bytes from Nsight Compute (`ncu`) if it works. Bytes are summed
over several consecutive steps without flushing caches, so that each step pays for the dirty L2
lines of the one before and the sum is that of a training loop.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.budget import Budget
from bench.cases import model_case
from bench.harness import Recorder
from bench.peers import CACHED, FLOOR, LADDER, ONE, TWO
from bench.supervise import Pieces
from bench.variants import Variant

MODELS = ("ResNet-50", "ViT-B/16", "one 100M tensor")
ORDER = (ONE, CACHED, TWO, FLOOR)
STEPS = 4
COUNTS = ("launches a step", "copies from the host a step", "waits of the host a step")
DRAM = "DRAM bytes a parameter"
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
# Of a step of each variant: parts of its kernels' names, and how many launches it is, if that is
# known. Another variant begins where the kernels of one are complete, or with a name of its own.
_KERNELS = {
    ONE: (("lars_step", "lars_resident"), 1),
    CACHED: (("lars_step",), 1),
    TWO: (("l2norm", "lars_update"), 2),
    FLOOR: (("multi_tensor_apply",), None),
}  # fmt: skip
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

    Kernels come in the order of the plan, STEPS steps of each entry.
    """
    from_header = itertools.dropwhile(lambda line: not line.startswith('"ID"'), lines)
    # ncu's own remarks may stand between the rows and after them.
    table = csv.DictReader(line for line in from_header if line.startswith('"'))
    found: dict[tuple[str, str], float] = defaultdict(float)
    known = {name for names, _ in _KERNELS.values() for name in names}
    at, names, launches = -1, (), {}  # of the entry: its kernels; the ids of those seen
    left: float = 0
    for row in table:
        if None in row.values():  # cut off in the middle
            continue
        name, number = row["Kernel Name"], row["ID"]
        if not any(k in name for k in known) or not row["Metric Name"].startswith("dram__bytes"):
            continue
        if number not in launches:
            if left == 0 or not any(k in name for k in names):
                at += 1
                names, each = _KERNELS[plan[at][1]] if at < len(plan) else ((), None)
                if not any(k in name for k in names):
                    raise ValueError(f"ncu shows {name} where {plan[at : at + 1]} was expected")
                left = math.inf if each is None else each * STEPS
            launches[number] = plan[at]
            left -= 1
        if row["Metric Unit"] not in ("byte", "bytes"):
            raise ValueError(f"ncu gave {row['Metric Unit']!r} where bytes were asked for")
        found[launches[number]] += float(row["Metric Value"].replace(",", "")) / STEPS
    return dict(found)


def tool(name: str) -> str | None:
    """The path of an installed NVIDIA tool."""
    cuda, nsight = Path("/usr/local/cuda"), Path("/opt/nvidia/nsight-compute")
    known = [*nsight.glob(f"*/{name}"), cuda / "bin" / name, cuda / "compute-sanitizer" / name]
    return shutil.which(name) or next((str(p) for p in known if p.exists()), None)


def limited(command: list[str], seconds: float) -> list[str]:
    """The command with its own time limit, which holds even if this process is killed."""
    return ["timeout", "--signal=INT", "--kill-after=3", f"{max(1.0, seconds):.0f}", *command]


def run_ncu(names: Sequence[str], folder: Path, budget: Budget) -> dict[tuple[str, str], float]:
    """DRAM bytes of a step of each variant; what ncu printed stays in the folder."""
    ncu, log = tool("ncu"), folder / "ncu.csv"
    if ncu is None:
        raise RuntimeError("ncu is not installed")
    log.unlink(missing_ok=True)
    command = [ncu, "--clock-control", "none", "--cache-control", "none"]
    command += ["--profile-from-start", "off", "--target-processes", "all"]
    command += ["--metrics", METRICS, "--print-units", "base", "--csv", "--log-file", str(log)]
    command += [sys.executable, "-m", "bench.profiler", *names]
    done = subprocess.run(
        limited(command, budget.left - 5), cwd=environment.ROOT, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    text = log.read_text(errors="replace") if log.exists() else ""
    found = dram_bytes(text.splitlines(), [(model, name) for model in MODELS for name in names])
    if done.returncode != 0 and found:
        found.popitem()  # it may not contain all of its steps
    if not found:
        errors = [
            s for s in [*text.splitlines(), *done.stdout.splitlines()] if "error" in s.lower()
        ]
        raise RuntimeError(errors[0] if errors else f"ncu saw nothing, status {done.returncode}")
    return found


def count_step(name: str, recorder: Recorder) -> None:
    """Launches, copies and waits of one step of a variant of ResNet-50."""
    case = model_case(MODELS[0])
    counted = count(_ready(MODELS[0], name))
    if counted[0] == 0:
        recorder.note(absent={f"{COUNTS[0]}, {name}": "the profiler saw no kernel"})
        print(f"{MODELS[0]}, {name}: not measured, the profiler saw no kernel")
        return
    for unit, value in zip(COUNTS, counted, strict=True):
        recorder.add(
            MODELS[0], name, [value], n_tensors=len(case.shapes), n_params=case.n_params, unit=unit
        )
        print(f"{MODELS[0]}, {name}: {value:g} {unit}", flush=True)


def weigh(names: Sequence[str], recorder: Recorder, folder: Path, budget: Budget) -> None:
    """DRAM bytes a parameter of some variants, or why there are none."""
    try:
        found = run_ncu(names, folder, budget)
    except (RuntimeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        recorder.note(absent={DRAM: reason})
        print(f"{DRAM}: not measured, {reason}")
        return
    for (model, name), total in found.items():
        case = model_case(model)
        per_parameter = total / case.n_params
        recorder.add(
            model, name, [per_parameter], n_tensors=len(case.shapes), n_params=case.n_params,
            bytes=round(total), unit=DRAM,
        )  # fmt: skip
        print(f"{model}, {name}: {per_parameter:.2f} {DRAM}")


def main(folder: Path, budget: Budget) -> int:
    recorder, pieces = Recorder(folder), Pieces(folder)
    todo: dict[str, tuple[Callable[[], None], float]] = {
        f"profile {name}": (functools.partial(count_step, name, recorder), 25.0) for name in ORDER
    }
    ncu = functools.partial(weigh, ORDER, recorder, folder, budget)
    todo["profile by ncu"] = ncu, math.inf  # which has a limit of its own
    for name, (do, seconds) in todo.items():
        if name not in pieces.begun() and budget.left > 0:
            with pieces.piece(name, seconds, budget):
                do()
    return 0


def under_ncu(names: Sequence[str]) -> None:
    """The process that ncu profiles: a few steps of each variant of each model."""
    for model in MODELS:
        for name in names:
            variant = _ready(model, name)
            torch.cuda.profiler.start()
            for _ in range(STEPS):
                variant.step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    under_ncu(sys.argv[1:])
