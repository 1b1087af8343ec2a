"""A run of named pieces that continues past one that hangs or dies.

No signal reaches Python while a CUDA call hangs, and after a fault the GPU is unusable in that
process. So the pieces run in a child process, which writes down each one as it begins and ends and
is ended by a watchdog thread when one takes too long. The parent notes what was lost and starts the
child again, which goes on behind it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import environment
from bench.budget import Budget

FILE = "pieces.txt"
RESTARTS = 3
_GRACE = 10.0  # seconds that a piece may overrun the budget


class Fault(RuntimeError):
    """The GPU is unusable in this process: another process has to continue."""


class Pieces:
    """What a run has begun and ended, in a file that outlives the process. No folder: no memory."""

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / FILE if folder else None

    def _lines(self) -> list[list[str]]:
        if self.path is None or not self.path.exists():
            return []
        return [line.split(" ", 1) for line in self.path.read_text().splitlines()]

    def begun(self) -> set[str]:
        return {name for word, name in self._lines() if word == "begin"}

    def unfinished(self) -> list[str]:
        ended = {name for word, name in self._lines() if word == "end"}
        return sorted(self.begun() - ended)

    def write(self, word: str, name: str) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{word} {name}\n")

    @contextlib.contextmanager
    def piece(self, name: str, seconds: float, budget: Budget) -> Iterator[None]:
        """Run one piece. When its time is up, print the stacks and exit the process.

        A piece that raises counts as ended, unless it raises `Fault`.
        """
        limit = min(seconds, max(budget.left, 0.0) + _GRACE)
        self.write("begin", name)
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
        try:
            yield
        except Fault:
            raise
        except Exception:
            self.write("end", name)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.write("end", name)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


def supervised(
    command: Sequence[str], folder: Path, budget: Budget, env: Mapping[str, str] | None = None
) -> int:
    """Run a command until every piece has started; returns 1 if a piece was lost."""
    pieces, lost = Pieces(folder), False
    (folder / FILE).unlink(missing_ok=True)
    known: set[str] = set()
    try:
        for _ in range(1 + RESTARTS):
            status = subprocess.run(command, cwd=environment.ROOT, env=env).returncode
            new = [name for name in pieces.unfinished() if name not in known]
            if not new:
                return status or int(lost)
            lost = True
            known.update(new)
            reason = f"the process ended during it, exit status {status}"
            told = environment.read(folder).get("lost", {})
            environment.note(folder, lost={**dict.fromkeys(new, reason), **told})
            print(f"LOST: {', '.join(new)}: {reason}", flush=True)
            if budget.left <= 0:
                break
        return 1
    finally:
        (folder / FILE).unlink(missing_ok=True)
