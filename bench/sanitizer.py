"""A small step under compute-sanitizer: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bench import environment
from bench.budget import Budget
from bench.profiler import limited, tool
from bench.supervise import Pieces

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit status requested from compute-sanitizer for findings
# "ERROR SUMMARY: 0 errors"; "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
_SUMMARY = re.compile(r"^.*SUMMARY: (\d+) (?:error|hazard).*$", re.MULTILINE)


def verdict(status: int, output: str) -> str:
    """clean, errors: ..., or not run: ...; clean only if the tool itself reports it."""
    summary = _SUMMARY.search(output)
    if summary and (status == FOUND or int(summary[1]) > 0):
        return f"errors: {summary[1]}"
    if summary and status == 0:
        return "clean"
    if status in (124, 137):
        return "not run: its time was up"
    told = [s.strip("= ") for s in _SUMMARY.sub("", output).splitlines() if "error" in s.lower()]
    return f"not run: {told[0] if told else f'exit status {status}'}"


def check(name: str, folder: Path, seconds: float) -> str:
    """Run one tool on `bench.small_step`; its output stays in the folder."""
    program = tool("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not installed"
    command = [program, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", "bench.small_step"]
    log = folder / f"{name}.txt"
    with log.open("w") as output:
        done = subprocess.run(
            limited(command, seconds), cwd=environment.ROOT, stdout=output,
            stderr=subprocess.STDOUT,
            # Each tensor is its own allocation, so that its end is checked.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
    return verdict(done.returncode, log.read_text(errors="replace"))


def main(folder: Path, budget: Budget) -> int:
    pieces, failed = Pieces(folder), False
    for i, name in enumerate(TOOLS):
        label = f"compute-sanitizer {name}"
        if label in pieces.begun() or budget.left <= 5:
            continue
        share = (budget.left - 5) / (len(TOOLS) - i)
        with pieces.piece(label, share + 10, budget):
            found = check(name, folder, share)
        environment.note(folder, sanitizer={name: found})
        print(f"{label}: {found}", flush=True)
        failed = failed or found.startswith("errors")
    return int(failed)
