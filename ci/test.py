"""Run lint, types and the test tiers side by side: what `make test` calls.

Each job is a separate process (a tier sets environment variables that triton reads at import), and
as many run at once as there are cores. One line is printed as each job ends, then the full output
of every failed job, then `N passed, N failed` in total; a lint or type check counts as one. The
exit status is 0 only if nothing failed and every requested tier ran at least one test. The gpu
tier's output is shown live and its counts are kept test by test, so that nothing is lost when a
limit is reached.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The longest first, so that it does not start last.
TIERS = ("interpret", "ptx", "codegen", "floor", "cpu")
CHOICES = ("all", "lint", "gpu", *TIERS)
# The tier floor is two processes, since triton reads at import whether it is to interpret.
FLOOR = ("floor", "floor-codegen")
MARKS = {
    "floor": "floor and interpret",
    "floor-codegen": "codegen and floor",
}
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
TIME_LIMIT = 1200  # seconds; a kernel that hangs must end as a failure


@dataclass(frozen=True)
class Job:
    """One process. `report` is where pytest writes its counts; a lint job has none."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    report: Path | None = None
    streamed: bool = False  # its output is shown live


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    job: Job
    seconds: float
    output: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def line(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.passed} passed, {self.failed} failed{skipped}"
        return f"{verdict:6}  {self.job.name:13} {self.seconds:6.1f} s   {counts}"


def lint_jobs() -> list[Job]:
    python = sys.executable
    return [
        Job("mypy", [python, "-m", "mypy"]),
        Job("ruff check", [python, "-m", "ruff", "check", "."]),
        Job("ruff format", [python, "-m", "ruff", "format", "--check", "--diff", "."]),
    ]


def tier_job(tier: str, reports: Path, args: argparse.Namespace, workers: int) -> Job:
    marks = MARKS.get(tier, tier)
    on_a_gpu = tier == "gpu"
    marks += " and (slow or fuzz)" if args.slow else " and not slow"
    # The tiers run concurrently: no shared cache folder, one thread each.
    env = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    if tier in ("interpret", "floor"):
        env["TRITON_INTERPRET"] = "1"
    if tier in FLOOR:
        env["PYTHONPATH"] = os.pathsep.join(
            [str(args.floor.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    report = reports / f"{tier}.xml"
    command = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={report}"]
    command += ["--durations=5", "-p", "no:cacheprovider"]
    if on_a_gpu:
        # A borrowed GPU goes back after minutes, and a context error fails every later test.
        command += ["-v", "--maxfail=10", "-o", "faulthandler_timeout=40"]
        env["PYTHONUNBUFFERED"] = "1"
    else:
        command.append("-q")
    if workers > 1 and find_spec("xdist"):
        # One GPU: a few processes, with the tests that fill its memory in just one of them.
        some = ["-n", str(min(workers, 4)), "--dist", "loadfile"]
        command += some if on_a_gpu else ["-n", str(workers)]
    return Job(tier, [*command, *args.pytest], env, report, streamed=on_a_gpu)


def counts(report: Path, output: str) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of one tier; from `-v` lines if it did not finish."""
    if not report.exists():
        line = r"\b{0}\b[^\n]*? \[ *\d+%\]|\[ *\d+%\] {0}\b"  # the second is a worker's of xdist
        found = [len(re.findall(line.format(word), output)) for word in OUTCOMES]
        return found[0], found[1] + found[2], found[3]
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return max(total - failed - skipped, 0), failed, skipped


def run(job: Job, needs_tests: bool) -> Outcome:
    start = time.monotonic()
    process = subprocess.Popen(
        job.command,
        cwd=ROOT,
        env={**os.environ, **job.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    limit = threading.Timer(TIME_LIMIT, process.kill)
    limit.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if job.streamed:
            print(line, end="", flush=True)
    code = process.wait()
    limit.cancel()
    output, seconds = "".join(lines), time.monotonic() - start
    if seconds >= TIME_LIMIT:
        output += f"\nended after {TIME_LIMIT} s\n"
    if job.report is None:
        return Outcome(job, seconds, output, passed=int(code == 0), failed=int(code != 0))
    passed, failed, skipped = counts(job.report, output)
    if passed + failed == 0 and needs_tests:
        output += f"\nthe tier {job.name} ran no test\n"
        failed = 1
    no_test_selected = code == 5  # pytest's exit status for it
    if code != 0 and not no_test_selected:
        failed = max(failed, 1)
    return Outcome(job, seconds, output, passed, failed, skipped)


def parse(argv: list[str]) -> argparse.Namespace:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="What follows `--` is passed on to pytest."
    )
    parser.add_argument("tiers", nargs="*", default="all", choices=CHOICES)
    parser.add_argument("--floor", type=Path, help="folder that holds the oldest supported triton")
    parser.add_argument("--slow", action="store_true", help="the slow and property-based tests")
    args = parser.parse_args(argv[:cut])
    args.pytest = argv[cut + 1 :]
    args.tiers = [args.tiers] if isinstance(args.tiers, str) else args.tiers
    if "floor" in args.tiers and args.floor is None:
        parser.error("the tier floor needs --floor FOLDER")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    # An interrupt reaches the jobs too: they end, and their results so far are counted.
    signal.signal(signal.SIGINT, lambda *_: None)
    whole = "all" in args.tiers
    tiers = [
        tier for tier in (*TIERS, "gpu")
        if tier in args.tiers or (whole and tier in TIERS)
    ]  # fmt: skip
    if args.floor is None and whole:
        tiers.remove("floor")
        print("floor: not run, no folder with the oldest supported triton was given", flush=True)
    if "floor" in tiers:
        tiers.insert(tiers.index("floor"), "floor-codegen")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = (cores or 1) // max(len(tiers), 1)
    outcomes = []
    with tempfile.TemporaryDirectory() as reports, ThreadPoolExecutor(cores) as pool:
        jobs = [tier_job(tier, Path(reports), args, workers) for tier in tiers]
        if whole or "lint" in args.tiers:
            jobs += lint_jobs()
        for future in as_completed([pool.submit(run, job, not args.slow) for job in jobs]):
            outcomes.append(future.result())
            print(outcomes[-1].line(), flush=True)
    for outcome in outcomes:
        if outcome.failed and not outcome.job.streamed:
            print(f"\n{outcome.job.name}: {' '.join(outcome.job.command)}\n{outcome.output}")
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    print(f"{passed} passed, {failed} failed", flush=True)
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
