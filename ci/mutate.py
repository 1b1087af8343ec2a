"""Put small faults into the package, one at a time, and show that a test catches each.

    python ci/mutate.py [--only TEXT] [--table FILE]

Every fault is applied to a temporary copy of the repository, where a few quick tests run until
the first failure; without a fault they must pass. Prints a table; the exit status is 1 if a fault
survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 120  # a fault may also make the kernel wait for ever


class Fault(NamedTuple):
    """`old` stands in `path` exactly once and becomes `new`.

    `tests`: "FILE:NAMES", the tests to run for it: those in test_FILE.py that pytest -k selects.
    """

    what: str
    tier: str
    tests: str
    path: str
    old: str
    new: str


STEP, TILE, SUMS, L2, UPDATE = (
    f"kernels/{n}.py" for n in ("lars_step", "tile", "sums", "l2norm", "lars_update")
)
REF, PORTABLE, BATCH, STEPPER, OPT, CHK, PLAN, TABLES, CKPT = (
    f"lars_fused/{n}.py"
    for n in (
        "reference", "portable", "batch", "stepper", "optimizer", "checks", "plan", "tables",
        "checkpoint",
    )
)  # fmt: skip
FAULTS = [
    Fault("momentum is forgotten", "interpret", "options:row_06_every_option_changed", TILE,
          "v = momentum * v + keep * u", "v = keep * u"),
    Fault("nesterov ignored", "interpret", "options:row_06_every_option_changed", TILE,
          "tl.where(nesterov, u + momentum * v, v), v", "v, v"),
    Fault("decay left out of the update", "interpret", "options:row_06_every_option_changed", TILE,
          "u = (g * factor + decay * w) * gain_unit", "u = (g * factor) * gain_unit"),
    Fault("first step is dampened", "interpret", "options:row_06_every_option_changed", TILE,
          "tl.where(fresh | (momentum == 0), 1.0,", "tl.where(momentum == 0, 1.0,"),
    Fault("tail of a block dropped", "interpret", "tensors:row_10", SUMS,
          "while done < count:", "while done + 1 < count:"),
    Fault("small sums not rescued", "interpret", "magnitudes:row_24", SUMS,
          "SUM_FLOOR = tl.constexpr(2.0**-80)", "SUM_FLOOR = tl.constexpr(-1.0)"),
    Fault("large sums not rescued", "interpret", "magnitudes:row_24", SUMS,
          "(total > SUM_FLOOR) & (total < SUM_CEILING)", "total > SUM_FLOOR"),
    Fault("bf16 truncated", "interpret", "tensors:row_10 or row_21", TILE,
          "rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "rounded = bits >> 16"),
    Fault("zero weights not special", "interpret", "magnitudes:row_25", TILE,
          "adapted = adapt & (w_norm != 0) & (norm != 0)", "adapted = adapt & (norm != 0)"),
    Fault("zero gradients not special", "interpret", "magnitudes:row_25", TILE,
          "adapted = adapt & (w_norm != 0) & (norm != 0)", "adapted = adapt & (w_norm != 0)"),
    Fault("eps ignored", "interpret", "options:row_06_every_option_changed", TILE,
          "decay * w_norm + tl.load(options + EPS)", "decay * w_norm"),
    Fault("decayed norm not used", "interpret", "options:row_06_every_option_changed", TILE,
          "tl.where(mode == DECAYED, d2, g2)", "tl.where(mode == DECAYED, g2, g2)"),
    Fault("ratio never clipped", "interpret", "options:row_06_every_option_changed", TILE,
          "tl.where(tl.load(options + CLIP) != 0, clipped, q)", "q"),
    Fault("zero norms always decay", "interpret", "options:row_06_every_option_changed", TILE,
          "tl.where(adapted, q, tl.where(raw, -1.0, 1.0))", "tl.where(adapted, q, 1.0)"),
    Fault("offsets wrap at 32 bits", "interpret", "memory:row_12", TILE,
          "return index.to(tl.int64) * SIZE", "return (index.to(tl.int32) * SIZE).to(tl.int64)"),
    Fault("alignment assumed", "interpret", "tensors:row_13", TILE,
          "tl.where(aligned, count // BLOCK, 0)", "(count + BLOCK - 1) // BLOCK"),
    Fault("first chunk's partial sums missed", "interpret", "tensors:row_10", SUMS,
          "    done = chunks * 0\n", "    done = chunks * 0 + 1\n"),
    Fault("arrivals not reset", "interpret", "tensors:row_10",
          STEP, "tl.store(arrivals + tensor, 0)", "pass"),
    Fault("queue not reset", "interpret", "tensors:row_09", STEP,
          "tl.store(counter, (epoch + taken.to(tl.int64)) << 32)", "pass"),
    Fault("epoch not raised", "interpret", "tensors:row_07", STEP,
          "tl.store(counter, (epoch + taken.to(tl.int64)) << 32)",
          "tl.store(counter, epoch << 32)"),
    Fault("maximize ignored by the table", "interpret", "options:row_06_every_option_changed",
          TABLES, "-1.0 if options.maximize else 1.0", "1.0"),
    Fault("gradient addresses not refreshed", "interpret", "storage:row_36", TABLES,
          "if self._columns.get(at) != new", "if at not in self._columns"),
    Fault("rates not refreshed", "interpret", "options:row_04", TABLES,
          "if rows == self._group_rows and lr_addresses == self._lr_addresses:",
          "if self._group_rows:"),
    Fault("no fallback after a failed launch", "interpret", "environment:row_54_a_failing", STEPPER,
          "if not (self.auto and untouched) or split:", "if True:"),
    Fault("version counters not raised", "interpret", "training:row_32", STEPPER,
          "torch.autograd.graph.increment_version(self._written)", "pass"),
    Fault("gradient strides not compared", "interpret", "tensors:row_15", BATCH,
          "if t is not None and not checks.same_layout(t, w):", "if False:"),
    Fault("reference: dampening ignored", "cpu", "options:row_06",
          REF, "(1 - o.dampening) * u", "u"),
    Fault("reference: decay halved", "cpu", "options:row_06",
          REF, "+ decay * w\n", "+ 0.5 * decay * w\n"),
    Fault("reference: nesterov looks back", "cpu", "options:row_06", REF,
          "u + o.momentum * v if o.nesterov", "u + v if o.nesterov"),
    Fault("reference: lr both inside and outside", "cpu", "options:row_06", REF,
          "out = 1.0 if o.lr_in_momentum else lr", "out = lr"),
    Fault("reference: pieces leave out their last", "cpu", "tensors:row_10", PORTABLE,
          "for at in range(0, shape[dim], step):", "for at in range(0, shape[dim] - 1, step):"),
    Fault("portable: each step is the first", "cpu", "tensors:row_07", STEPPER,
          "for i in self.portable:\n            self.fresh[i] = False",
          "for i in []:\n            pass"),
    Fault("portable: found_inf ignored", "cpu", "amp:only_the_device", STEPPER,
          "if found_inf is not None and float(found_inf) != 0:", "if False:"),
    Fault("kernel: found_inf ignored", "interpret", "amp:only_the_device", STEP,
          "taken = tl.load(found_inf) == 0", "taken = tl.load(found_inf) == tl.load(found_inf)"),
    Fault("hyper-parameters not checked in step", "cpu", "options:row_03", OPT,
          'checks.check_options(group, f"LARS: param_groups[{g}]: ", read_device=False)', "pass"),
    Fault("freed memory not noticed", "cpu", "storage:row_33", CHK,
          "if t.numel() > 0 and t.untyped_storage().nbytes() == 0:", "if False:"),
    Fault("shared memory not noticed", "cpu", "refusals:row_16", CHK,
          "            if stride < reach:\n                return True",
          "            if stride < 0:\n                return True"),
    Fault("replaced state not compared", "cpu", "storage:row_35", STEPPER,
          "if places(batch) != self._places:", "if False:"),
    Fault("lr tensor of any size allowed", "cpu", "options:row_04",
          CHK, "if value.numel() != 1:", "if False:"),
    Fault("loaded state aliases the checkpoint", "cpu", "checkpoints:row_38", CKPT,
          "own = torch.empty_like(part, device=sharding.local(p).device).copy_(part)",
          "own = part"),
    Fault("checkpoint shapes not compared", "cpu", "checkpoints:row_38", CKPT,
          "if value.shape != p.shape:", "if False:"),
    Fault("interrupted launch kept", "interpret", "environment:row_59", OPT,
          "self._last, self._recent, self._steppers = None, [], {}", "pass"),
    Fault("falling back warns every time", "interpret", "environment:row_54_a_failing", STEPPER,
          "if reason not in _warned:", "if True:"),
    Fault("tables made in inference mode", "interpret", "training:row_57", OPT,
          "with torch.inference_mode(False), torch.no_grad():", "with torch.no_grad():"),
    Fault("tables made on the default device", "interpret", "environment:row_56", TABLES,
          'torch.tensor(values, dtype=torch.int64, device="cpu")',
          "torch.tensor(values, dtype=torch.int64)"),
    Fault("a copy keeps what a skipped step made", "interpret", "amp:only_the_device", OPT,
          "self._settle()\n        return super().__getstate__()", "return super().__getstate__()"),
    Fault("compiled: any address called aligned", "ptx", "kernel_accuracy:regime", TABLES,
          "tile.NUMEL.value] % 16) == 0", "tile.NUMEL.value] % 4) == 0"),
    Fault("compiled: every thread draws a ticket", "ptx", "compiled:regime", STEP,
          "mask=lane == 0, sem", "mask=lane >= 0, sem"),
    Fault("compiled: tails read past their tensor", "ptx", "compiled:regime", SUMS,
          "mask = done + thread < count", "mask = done + thread <= count"),
    Fault("compiled: a part of each block not summed", "ptx", "compiled:regime", SUMS,
          "THREADS, VECTOR])\n", "THREADS, VECTOR]) * (tl.arange(0, VECTOR) > 0)\n"),
    Fault("plan: no room for slots", "cpu", "plan:every_chunk or boundaries or slots", PLAN,
          "slots[i], n_slots = n_slots, n_slots + c", "slots[i], n_slots = n_slots, n_slots + 1"),
    Fault("plan: updates before norms", "cpu", "plan:every_chunk", PLAN,
          "for i in group:\n            tape.add(NORM, i)",
          "for i in group[1:]:\n            tape.add(NORM, i)"),
    Fault("two launches: first slot never summed", "interpret", "kernel_bitwise:one_launch", L2,
          "first_slot + chunk, w2, g2, d2)", "first_slot, w2, g2, d2)"),
    Fault("two launches: decay of the wrong half", "interpret", "kernel_bitwise:one_launch", UPDATE,
          "ratio = trust_ratio(w2, g2, d2, options, lr)",
          "ratio = trust_ratio(w2, d2, g2, options, lr)"),
]  # fmt: skip


def copy_of_repository(to: Path) -> None:
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".hypothesis", ".*_cache", "out", "results", "*.egg-info"
    )
    for name in ("lars_fused", "kernels", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        else:
            shutil.copy(source, to / name)


def tests_fail(where: Path, tier: str, tests: str) -> str | None:
    """The first quick test that fails in the copy, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    file, names = tests.split(":")
    command += [
        "-m",
        f"{tier} and not slow",
        "-k",
        names,
        str(next((where / "tests").rglob(f"test_{file}.py"))),
    ]
    interpret = "1" if tier == "interpret" else "0"
    env = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONDONTWRITEBYTECODE": "1"}
    # The copy, and not an installed package, is what is imported.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(where), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, cwd=where, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"(stopped after {TIME_LIMIT} s)"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)(?:::(\w+))?", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return "::".join(filter(None, found.groups()))
    if done.returncode < 0:
        return f"(ended by signal {-done.returncode})"
    raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose description holds this text")
    parser.add_argument("--table", type=Path, help="write the table here too")
    args = parser.parse_args(argv)
    chosen = [f for f in FAULTS if args.only in f.what]
    for fault in FAULTS:
        times = (ROOT / fault.path).read_text().count(fault.old)
        if times != 1:
            raise SystemExit(f"{fault.what}: its text stands {times} times in {fault.path}")
    lines = ["| fault | file | tier | caught by |", "|---|---|---|---|"]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_of_repository(where)
        for tier, tests in sorted({(f.tier, f.tests) for f in chosen}):
            if caught := tests_fail(where, tier, tests):
                raise SystemExit(f"without any fault the {tier} tests {tests} fail: {caught}")
        print(*lines, sep="\n", flush=True)
        for fault in chosen:
            file = where / fault.path
            whole = file.read_text()
            file.write_text(whole.replace(fault.old, fault.new))
            caught = tests_fail(where, fault.tier, fault.tests)
            file.write_text(whole)
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
