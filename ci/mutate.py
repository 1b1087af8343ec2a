"""Put small faults into the package, one at a time, and show that a test catches each.

    python ci/mutate.py [--only TEXT ...] [--part I/N] [--table FILE]

Every fault is applied to a temporary copy of the repository, where a few quick tests run until
the first failure; without a fault they must pass. Prints a table; the exit status is 1 if a fault
survives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import FAULTS, Fault, path_of

ROOT = Path(__file__).resolve().parent.parent
# A fault may also make the kernel hang. The first limit is processor time, so that a busy machine
# does not look like a hang; the second is real time, for a process that waits without using any.
CPU_SECONDS, SECONDS = 100, 900


def copy_of_repository(to: Path) -> None:
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".hypothesis", ".*_cache", "out", "20??-*", "*.egg-info"
    )
    for name in ("lars_fused", "kernels", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        else:
            shutil.copy(source, to / name)


class Runner:
    """Runs pytest in the copy, in forks of two processes: triton reads TRITON_INTERPRET once."""

    def __init__(self, where: Path) -> None:
        self.where, self._output = where, where / "output"
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def _server(self, interpret: str) -> subprocess.Popen[str]:
        if interpret not in self._servers:
            # Import the copy, not an installed package.
            path = os.pathsep.join(filter(None, [str(self.where), os.environ.get("PYTHONPATH")]))
            env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret}
            self._servers[interpret] = subprocess.Popen(
                [sys.executable, str(ROOT / "ci" / "forked_pytest.py")],
                env={**env, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        return self._servers[interpret]

    def tests_fail(self, tier: str, file: Path, names: str) -> str | None:
        """The first quick test that fails in the copy, or None."""
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        arguments += ["-m", f"{tier} and not slow", "-k", names, str(self.where / file)]
        server = self._server("1" if tier == "interpret" else "0")
        order = [str(self.where), arguments, str(self._output), CPU_SECONDS, SECONDS]
        print(json.dumps(order), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        if status == 0:
            return None
        output = self._output.read_text(errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)(?:::(\w+))?", output, re.MULTILINE)
        if status == 1 and found:
            return "::".join(filter(None, found.groups()))
        if status < 0:
            return f"(ended by signal {-status})"
        raise RuntimeError(f"the tests did not run:\n{output[-4000:]}")


def part_of(faults: list[Fault], part: str) -> list[Fault]:
    """Part i of n, written i/n: whole files of tests, so that few tests run without a fault."""
    number, parts = map(int, part.split("/"))
    groups: dict[tuple[str, Path], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.tier, path_of(fault)), []).append(fault)
    return [fault for group in list(groups.values())[number - 1 :: parts] for fault in group]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of descriptions, any of them"
    )
    parser.add_argument("--part", default="1/1", help="part i of n, as i/n, for several processes")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    chosen = part_of([f for f in FAULTS if any(text in f.what for text in args.only)], args.part)
    for fault in FAULTS:
        times = (ROOT / fault.path).read_text().count(fault.old)
        if times != 1:
            raise SystemExit(f"{fault.what}: its text occurs {times} times in {fault.path}")
    lines = ["| fault | file | tier | caught by |", "|---|---|---|---|"]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_of_repository(where)
        runner = Runner(where)
        names: dict[tuple[str, Path], set[str]] = {}
        for fault in chosen:
            names.setdefault((fault.tier, path_of(fault)), set()).add(fault.tests.split(":")[1])
        for (tier, file), selections in names.items():
            either = " or ".join(f"({selection})" for selection in sorted(selections))
            if caught := runner.tests_fail(tier, file, either):
                raise SystemExit(f"without any fault {file} fails ({tier}, {either}): {caught}")
        print(*lines, sep="\n", flush=True)
        for fault in chosen:
            source = where / fault.path
            whole = source.read_text()
            source.write_text(whole.replace(fault.old, fault.new))
            caught = runner.tests_fail(fault.tier, path_of(fault), fault.tests.split(":")[1])
            source.write_text(whole)
            survivors += caught is None
            by = f"`{caught}`" if caught else "**nothing**"
            lines.append(f"| {fault.what} | `{fault.path}` | {fault.tier} | {by} |")
            print(lines[-1], flush=True)
    summary = f"{len(chosen)} faults, {survivors} survivors"
    print(summary)
    if args.table:
        args.table.write_text("\n".join([*lines, "", summary, ""]))
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
