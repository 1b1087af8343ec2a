"""Sweep the launch constants of this GPU, one at a time around the best so far.

Each candidate is timed beside the row that `kernels/tuning.py` holds, interleaved, the L2 cold, on
three models; what counts is the geometric mean of its times over the row's. The order of the work
list is tried too. Constants that do not compile are passed over.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch

from bench import environment
from bench.cases import Case, model_case
from bench.harness import GateError, Truth, disagreement
from bench.peers import Inputs, Variant, ours
from bench.timers import Budget, CudaTimer, interleave
from lars_fused import launch, plan, tables

MODELS = ("ResNet-50", "ViT-B/16", "one 100M tensor")


class Candidate(NamedTuple):
    """The constants that are swept; `window` is a share of the L2."""

    chunk: int
    block: int
    num_warps: int
    registers: int | None
    programs: int
    window: float
    evict: str
    order: str


VALUES: dict[str, tuple[Any, ...]] = {  # what promises most comes first
    "order": ("grouped", "sliding"),
    "programs": (4, 5, 6, 3, 8, 2),
    "block": (2048, 4096, 1024),
    "window": (0.47, 0.55, 0.65, 0.8, 0.4, 0.3),
    "chunk": (4096, 8192, 2048, 16384, 32768),
    "evict": ("evict_first", ""),
    "registers": (96, 80, 72, 128, None),
    "num_warps": (4, 8, 2),
}
Times = dict[str, float]


def neighbours(best: Candidate) -> Iterator[Candidate]:
    """Every candidate that differs from the best in one constant, or in two that go together."""
    # A block of a whole chunk is one round trip an item, and takes registers.
    yield best._replace(block=4096, registers=128, programs=min(best.programs, 4))
    for name, values in VALUES.items():
        for value in values:
            yield best._replace(**{name: value})
    for factor in (0.5, 2):
        yield best._replace(
            chunk=int(best.chunk * factor), programs=max(1, round(best.programs / factor))
        )


def possible(candidate: Candidate) -> bool:
    return candidate.chunk % candidate.block == 0 and candidate.block >= 32 * candidate.num_warps


def row_of(candidate: Candidate, row: Any, l2_bytes: int) -> Any:
    """The row of `kernels/tuning.py` with a candidate's constants."""
    return row._replace(
        chunk=candidate.chunk, block=candidate.block, num_warps=candidate.num_warps,
        threads=candidate.num_warps * row.threads // row.num_warps,
        step_registers=candidate.registers, programs=candidate.programs,
        window=int(candidate.window * l2_bytes), evict=candidate.evict,
    )  # fmt: skip


@contextlib.contextmanager
def used(candidate: Candidate, architecture: str, l2_bytes: int) -> Iterator[None]:
    """New work within the block is made and launched with these constants."""
    rows = launch.kernels().tuning.ROWS
    before, make = dict(rows), tables.make_plan
    row = launch.kernels().tuning.row_for(architecture)
    rows[architecture] = row_of(candidate, row, l2_bytes)
    tables.make_plan = functools.partial(plan.make_plan, order=candidate.order)
    tables._cached_plan.cache_clear()  # it does not know of the order
    try:
        yield
    finally:
        rows.clear()
        rows.update(before)
        tables.make_plan = make
        tables._cached_plan.cache_clear()


class Tuner:
    """Times of candidates over those of the present row, on every model."""

    def __init__(self, device: torch.device, cases: list[Case], timer: Any) -> None:
        self.device, self.cases, self.timer = device, cases, timer
        self.architecture = launch.architecture(device)[0]
        self.l2 = getattr(
            torch.cuda.get_device_properties(device), "L2_cache_size", 0
        ) if device.type == "cuda" else 1 << 24  # fmt: skip
        tuning = launch.kernels().tuning
        row = tuning.row_for(self.architecture)
        self.present = Candidate(
            row.chunk, row.block, row.num_warps, row.step_registers, row.programs,
            tuning.WINDOW_SHARE if row.window is None else round(row.window / self.l2, 3),
            row.evict, "grouped",
        )  # fmt: skip
        self.inputs = [case.inputs(device) for case in cases]
        self.truths = [Truth(inputs) for inputs in self.inputs]
        self.baselines = [self._variant(self.present, i) for i in range(len(cases))]

    def _variant(self, candidate: Candidate, i: int) -> Variant:
        with used(candidate, self.architecture, self.l2):
            inputs: Inputs = self.inputs[i]
            variant = ours(inputs)
            error = disagreement(variant, self.truths[i])
            if not error <= 1:
                raise GateError(f"{candidate}: error {error:.3g} times its bound")
            for _ in range(2):
                variant.step()
        return variant

    def times(self, candidate: Candidate, rounds: int = 15) -> tuple[float, Times]:
        """Geometric mean of time over the present row's, and the microseconds by model."""
        ratios, found = [], {}
        for i, case in enumerate(self.cases):
            variants = {"now": self.baselines[i], "new": self._variant(candidate, i)}
            samplers = {name: self.timer.ready(v) for name, v in variants.items()}
            taken = interleave(samplers, rounds, math.inf)
            new, now = median(taken["new"]), median(taken["now"])
            found[case.name], found[f"{case.name}, present row"] = round(new, 1), round(now, 1)
            ratios.append(new / now)
        return geometric_mean(ratios), found


def search(tuner: Tuner, budget: Budget) -> list[tuple[float, Candidate, Times]]:
    """Go to the best neighbour until none is better or the time is up."""
    tried: dict[Candidate, tuple[float, Candidate, Times]] = {}
    best = tuner.present
    improved = True
    while improved and budget.left > 0:
        improved = False
        start = best
        for candidate in neighbours(start):
            if candidate in tried or not possible(candidate) or budget.left <= 0:
                continue
            try:
                tried[candidate] = (*_first(tuner.times(candidate), candidate),)
            except GateError:
                raise  # a wrong result is a defect, and no matter of speed
            except Exception as error:  # whatever keeps constants from compiling
                print(f"{candidate}: {type(error).__name__}: {str(error).splitlines()[:1]}")
                tried[candidate] = (math.inf, candidate, {})
                continue
            print(f"{tried[candidate][0]:.3f}  {candidate}", flush=True)
            if best not in tried or tried[candidate][0] < tried[best][0]:
                improved = improved or candidate != best
                best = candidate
    return sorted(tried.values(), key=lambda result: result[0])


def _first(result: tuple[float, Times], candidate: Candidate) -> tuple[float, Candidate, Times]:
    return result[0], candidate, result[1]


def write(path: Path, results: list[tuple[float, Candidate, Times]]) -> None:
    rows = [
        {"time over present row": round(ratio, 4), **candidate._asdict(), **times}
        for ratio, candidate, times in results
        if times
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["none"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main(folder: Path, seconds: float) -> int:
    budget = Budget(seconds)
    device = torch.device("cuda")
    if "sha" not in environment.read(folder):
        environment.note(folder, **environment.facts("python -m bench tune"))
    tuner = Tuner(device, [model_case(name) for name in MODELS], CudaTimer(device))
    print(f"present row: {tuner.present}", flush=True)
    results = search(tuner, budget)
    write(folder / "tune.csv", results)
    print("\nsorted by time over the present row's, geometric mean of the models:")
    for ratio, candidate, times in results[:25]:
        figures = "  ".join(f"{times[m]:8.1f}" for m in MODELS if m in times)
        print(f"{ratio:.3f}  {figures}  {tuple(candidate)}")
    print(f"written: {folder / 'tune.csv'}")
    return 0
