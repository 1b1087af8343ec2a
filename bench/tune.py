"""Sweep the launch constants of this GPU.

Each row is timed against the current row of `lars_step` (`kernels/tuning.py`), interleaved, the L2
cold, on three models, and ranked by the geometric mean of its times over the current row's.

0. The row of `lars_resident` and its neighbours, where the architecture has one; on every model,
   whether or not it suits that kernel.
1. The grid: every combination of the constants that interact (order, eviction, block, programs,
   polling), in few rounds, those nearest to the current row first.
2. The best of the grid again, in more rounds; then, from the best of these, each constant in turn.
3. The best few again, in many rounds: the minimum of many noisy figures is too low.

Each result is written to tune.csv immediately and not timed again: a second call resumes where the
first one ended. Constants that do not compile are skipped. A wrong result ends the sweep: it is a
defect, not a matter of speed.
"""

from __future__ import annotations

import ast
import csv
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch

from bench import environment
from bench.budget import Budget
from bench.cases import Case, model_case
from bench.harness import GateError, Truth, disagreement, reason
from bench.peers import ours, used
from bench.supervise import Pieces
from bench.timers import CudaTimer, interleave
from bench.variants import Inputs, Variant
from lars_fused._engine import launch
from lars_fused.kernels import tuning

MODELS = ("ResNet-50", "ViT-B/16", "one 100M tensor")
QUICK, USUAL, MANY = 5, 15, 40  # rounds
FINALISTS = 6
REGISTERS = 65536  # of a multiprocessor, every NVIDIA architecture since sm_70
RATIO = "time over present row"

# By the row's own names, so that the sweep follows the row: a name that it lacks is passed over,
# and a bool that is not listed is tried both ways. What promises most comes first.
VALUES: dict[str, tuple[Any, ...]] = {
    "order": ("ahead", "grouped"),
    "hold": ("evict_last", ""),
    "evict": ("evict_first", ""),
    "block": (2048, 4096, 1024),
    "programs": (4, 5, 6, 3, 8, 2),
    "lag": (1.0, 1.5, 0.7),
    "backoff": (200, 0, 50, 500),  # nanoseconds between two polls
    "window": (0.47, 0.55, 0.65, 0.8, 0.4, 0.3),  # shares of the L2
    "chunk": (4096, 8192, 2048, 16384, 32768),
    "step_registers": (104, 96, 80, 72, 128, None),  # an H200 was measured with 104
    "num_warps": (4, 8, 2),
    "lanes": (128, 64, 256),
}
TOGETHER = ("order", "hold", "evict", "block", "programs", "backoff")  # and how a program polls


def swept(row: Any, l2_bytes: int) -> dict[str, tuple[Any, ...]]:
    """The values of each constant of a row that are tried."""
    found = {}
    for name in (*VALUES, *row._fields):
        if name not in row._fields or name in found:
            continue
        if name == "window":
            found[name] = tuple(int(share * l2_bytes) for share in VALUES[name])
        elif name in VALUES:
            found[name] = VALUES[name]
        elif isinstance(getattr(row, name), bool):
            found[name] = (False, True)
    return found


def changed(present: Any, **constants: Any) -> Any:
    """The present row with other constants, and those that follow from them."""
    row = present._replace(**constants)
    if "num_warps" in constants:
        row = row._replace(threads=row.num_warps * present.threads // present.num_warps)
    if "step_registers" not in constants and present.step_registers is not None:
        # As many as leave room for all programs; more than the present ones for a larger block.
        room = min(248, REGISTERS // (row.programs * row.threads) // 8 * 8)
        least = room if row.block > present.block else present.step_registers
        row = row._replace(step_registers=min(room, least))
    return row


def possible(row: Any) -> bool:
    """Whether the kernels take the row: each size divides the next.

    `lars_resident` takes a chunk as one block, of which the ring has room for at least three.
    """
    fits = row.chunk % row.block == 0 and row.block % row.threads == 0
    if row.order == "resident":
        fits = fits and row.chunk == row.block and tuning.slots(row, 8) >= 3
    return fits and row.programs >= 1 and row.step_registers != 0


def grid(present: Any, l2_bytes: int) -> list[Any]:
    """All combinations of the constants that decide together, those nearest to the row first."""
    values = swept(present, l2_bytes)
    names = [n for n in values if n in TOGETHER or n.startswith("poll")]
    rows = [
        changed(present, **dict(zip(names, combination, strict=True)))
        for combination in itertools.product(*(values[name] for name in names))
    ]
    rows = [row for row in dict.fromkeys(rows) if possible(row)]
    return sorted(rows, key=lambda row: sum(a != b for a, b in zip(row, present, strict=True)))


def resident_rows(architecture: str, present: Any) -> list[Any]:
    """The row of `lars_resident`; its neighbours; the same with one program a multiprocessor."""
    row = tuning.resident_row_for(architecture)
    if row is None:
        return []
    row = row._replace(window=present.window, record=present.record)
    values = {"finishers": (2, 4, 8), "backoff": (0, 200), "evict": ("",)}
    near = [row._replace(**{name: value}) for name in values for value in values[name]]
    alone = row._replace(
        chunk=2 * row.chunk, block=2 * row.block, ring=2 * row.ring, threads=2 * row.threads,
        num_warps=2 * row.num_warps, programs=1,
    )  # fmt: skip
    return list(dict.fromkeys([row, *near, alone]))


def neighbours(best: Any, l2_bytes: int) -> Iterator[Any]:
    """Every row that differs from the best in one constant, or in two that go together."""
    for name, values in swept(best, l2_bytes).items():
        for value in values:
            yield changed(best, **{name: value})
    for factor in (0.5, 2):
        chunk, programs = int(best.chunk * factor), max(1, round(best.programs / factor))
        yield changed(best, chunk=chunk, programs=programs)


def label(row: Any, present: Any) -> str:
    """What a row changes of the present one."""
    pairs = zip(row._fields, row, present, strict=True)
    return " ".join(f"{n}={a!r}" for n, a, b in pairs if a != b) or "the present row"


class Tuner:
    """Times of rows over those of the present one, on every model."""

    def __init__(self, device: torch.device, cases: list[Case], timer: Any) -> None:
        self.device, self.cases, self.timer = device, cases, timer
        self.architecture = launch.architecture(device)[0]
        self.l2 = launch.architecture(device)[2] or 1 << 24
        tuning = launch.kernels().tuning
        row = tuning.row_for(self.architecture)
        window = int(self.l2 * tuning.WINDOW_SHARE) if row.window is None else row.window
        self.present = row._replace(window=window)
        self.inputs = [case.inputs(device) for case in cases]
        self.truths = [Truth(inputs) for inputs in self.inputs]
        self.baselines = [self._variant(self.present, i) for i in range(len(cases))]

    def _variant(self, row: Any, i: int) -> Variant:
        with used(row, self.architecture):
            inputs: Inputs = self.inputs[i]
            variant = ours(inputs)
            error = disagreement(variant, self.truths[i])
            if not error <= 1:
                raise GateError(f"{label(row, self.present)}: error {error:.3g} times its bound")
            for _ in range(2):
                variant.step()
        return variant

    def times(self, row: Any, rounds: int) -> tuple[float, dict[str, float]]:
        """Geometric mean of time over the present row's, and the microseconds by model."""
        ratios, found = [], {}
        for i, case in enumerate(self.cases):
            variants = {"now": self.baselines[i], "new": self._variant(row, i)}
            samplers = {name: self.timer.ready(v) for name, v in variants.items()}
            taken = interleave(samplers, rounds, math.inf)
            new, now = median(taken["new"]), median(taken["now"])
            found[case.name], found[f"{case.name}, present row"] = round(new, 1), round(now, 1)
            ratios.append(new / now)
        return geometric_mean(ratios), found


class Result(NamedTuple):
    ratio: float
    row: Any
    rounds: int
    times: dict[str, float]


def _value(text: str) -> Any:
    """A constant as it stands in the file: a number, None, True, False, or a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


class Results:
    """What was timed: of each row the result of most rounds; tune.csv holds all of them."""

    def __init__(self, path: Path, present: Any) -> None:
        self.path, self.present = path, present
        self.held: dict[Any, Result] = {}
        if path.exists():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    self._keep(self._read(line))

    def _read(self, line: dict[str, str]) -> Result:
        fields = {n: _value(text) for n, text in line.items() if n in self.present._fields}
        row = self.present._replace(**fields)
        times = {n: float(t) for n, t in line.items() if n.startswith(MODELS) and t}
        return Result(float(line[RATIO]), row, int(line["rounds"]), times)

    def _keep(self, result: Result) -> None:
        if result.row not in self.held or self.held[result.row].rounds <= result.rounds:
            self.held[result.row] = result

    def add(self, result: Result) -> None:
        self._keep(result)
        fields = {n: v for n, v in result.row._asdict().items() if n != "record"}
        texts = {name: str(value) for name, value in fields.items()}
        line = {"utc": environment.now(), "rounds": result.rounds, RATIO: result.ratio}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            table = csv.DictWriter(file, [*line, *texts, *result.times], lineterminator="\n")
            if new:
                table.writeheader()
            table.writerow({**line, **texts, **result.times})

    def best(self, count: int, rounds: int = QUICK, resident: bool = False) -> list[Result]:
        """The fastest of one kernel, of those that were timed in so many rounds."""
        known = [
            result for result in self.held.values()
            if result.rounds >= rounds and (result.row.order == "resident") == resident
        ]  # fmt: skip
        return sorted(known, key=lambda result: result.ratio)[:count]


def search(tuner: Any, budget: Budget, results: Results, pieces: Pieces, lost: set[str]) -> None:
    """`lars_resident`; the grid in the first half of the time; one constant at a time; the best."""
    present, whole = tuner.present, budget.left
    failed: set[Any] = set()

    def time(row: Any, rounds: int) -> None:
        held = results.held.get(row)
        name = f"{label(row, present)}, {rounds} rounds"
        if (held and held.rounds >= rounds) or row in failed or not possible(row):
            return
        if name in lost or name in pieces.begun() or budget.left <= 0:
            return
        with pieces.piece(name, 60.0, budget):
            try:
                ratio, times = tuner.times(row, rounds)
            except GateError:
                raise
            except Exception as error:  # whatever keeps constants from compiling
                failed.add(row)
                print(f"  passed over: {reason(error)}", flush=True)
                return
        results.add(Result(round(ratio, 4), row, rounds, times))
        print(f"  {ratio:.3f}", flush=True)

    time(present, USUAL)
    for row in resident_rows(tuner.architecture, present):
        time(row, USUAL)
    for row in grid(present, tuner.l2):
        if budget.left > whole / 2:
            time(row, QUICK)
    for result in results.best(FINALISTS):
        time(result.row, USUAL)
    before: list[Result] = []
    while (best := results.best(1, USUAL)) != before:
        for row in neighbours(best[0].row, tuner.l2):
            if budget.left > whole / 10:
                time(row, USUAL)
        before = best
    for result in [*results.best(3, USUAL), *results.best(1, USUAL, resident=True)]:
        time(result.row, MANY)


def main(folder: Path, budget: Budget, make: Callable[..., Any] = CudaTimer) -> int:
    device = torch.device("cuda")
    tuner = Tuner(device, [model_case(name) for name in MODELS], make(device))
    results = Results(folder / "tune.csv", tuner.present)
    left_out = [n for n in tuner.present._fields if n not in swept(tuner.present, tuner.l2)]
    print(f"present row: {tuner.present}\nnot swept: {', '.join(left_out)}", flush=True)
    lost = set(environment.read(folder).get("lost", {}))
    try:
        search(tuner, budget, results, Pieces(folder), lost)
    except GateError as error:
        environment.note(folder, gate={f"tune, {torch.cuda.get_device_name()}": str(error)})
        raise
    finally:
        show(results)
    return 0


def show(results: Results) -> None:
    print(f"\nby {RATIO}, geometric mean of {', '.join(MODELS)}:")
    for result in [*results.best(9, resident=True), *results.best(20)]:
        figures = "  ".join(f"{result.times[m]:8.1f}" for m in MODELS if m in result.times)
        what = label(result.row, results.present)
        print(f"{result.ratio:.3f}  {result.rounds:2} rounds  {figures}  {what}")
    print(f"written: {results.path}", flush=True)
