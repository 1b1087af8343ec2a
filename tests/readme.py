"""The tables of `tests/README.md`, made from what they are about.

    python -m tests.readme             writes them anew; test_readme.py holds them against the file
    python -m tests.readme --counts    counts the quick tests of each tier too, in half a minute

The contract's matrix comes from the markers `row`, the refusals from `refusals.txt`, the faults
from `ci/faults.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
FILE = HERE / "README.md"
ROWS = {
    1: "parameters of the wrong kind",
    2: "non-leaf, doubled, half-named parameters",
    3: "bad values: constructor, add_param_group, step",
    4: "tensor lr",
    5: "nesterov without its needs",
    6: "every option acts",
    7: "missing, frozen, late gradients",
    8: "empty tensors",
    9: "0-dim, one element",
    10: "sizes around powers of two, chunks, blocks",
    11: "many tensors, many groups",
    12: "more than 2^31 elements",
    13: "misaligned views, canaries",
    14: "strided parameters",
    15: "gradient strides",
    16: "overlapping parameters",
    17: "sparse",
    18: "complex",
    19: "integer parameters",
    20: "meta parameters",
    21: "gradient of another dtype",
    22: "devices; gradient elsewhere or of another shape",
    23: "mixed dtypes, momentum dtypes",
    24: "ends of the range",
    25: "zeros",
    26: "NaN, inf in a gradient",
    27: "NaN, inf in a weight or momentum",
    28: "GradScaler overflow",
    29: "unscale, clip, two optimizers, disabled",
    30: "closures",
    31: "gradients untouched",
    32: "version counters",
    33: "parameter memory replaced",
    34: "model moved",
    35: "state replaced",
    36: "gradient buffers",
    37: "lists edited",
    38: "loading: follows, no alias, misfit",
    39: "other checkpoints",
    40: "resuming in another dtype",
    41: "weights_only, DCP",
    42: "deepcopy, pickle, spawn",
    43: "hooks",
    44: "schedulers",
    45: "torch.compile",
    46: "threads",
    47: "streams",
    48: "graph capture",
    49: "tables in flight",
    50: "DDP, ZeRO-1",
    51: "DTensor, FSDP2",
    52: "FSDP1",
    53: "optimizer-in-backward, tied, accumulated",
    54: "Triton missing or failing",
    55: "TRITON_INTERPRET late or unset",
    56: "default dtype and device",
    57: "inference mode",
    58: "determinism",
    59: "interrupted step",
    60: "memory",
}


def marked_tests() -> Iterator[tuple[int, str, str]]:
    """Every row with a test that is marked with it: row, file, name; read from the source alone."""
    for path in sorted(HERE.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
                    for row in mark.args:
                        yield ast.literal_eval(row), path.relative_to(HERE).as_posix(), node.name


def rows() -> str:
    lines = ["| row | use or misuse | tests |", "|---|---|---|"]
    marked = list(marked_tests())
    for row, what in ROWS.items():
        files: dict[str, list[str]] = {}
        for number, file, name in marked:
            if number == row:
                files.setdefault(file, []).append(f"`{name.removeprefix('test_')}`")
        tests = "; ".join(
            f"{file.replace('test_', '').removesuffix('.py')}: {', '.join(names)}"
            for file, names in files.items()
        )
        lines.append(f"| {row} | {what} | {tests} |")
    return "\n".join(lines)


def refusals() -> str:
    from tests.refusals import read

    lines = ["| input | error | text |", "|---|---|---|"]
    for what, text in read().items():
        kind, _, message = text.partition(": ")
        lines.append(f"| {what} | `{kind}` | {message.replace(chr(10), '<br>')} |")
    return "\n".join(lines)


def faults_module() -> ModuleType:
    """`ci/faults.py`, which stands beside scripts and is no package's module."""
    spec = importlib.util.spec_from_file_location("faults", HERE.parent / "ci" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults() -> str:
    lines = ["| fault | file | tier | must be caught by |", "|---|---|---|---|"]
    for fault in faults_module().FAULTS:
        file, names = fault.tests.split(":")
        lines.append(f"| {fault.what} | `{fault.path}` | {fault.tier} | {file}: `{names}` |")
    return "\n".join(lines)


# Quick tests at commit 2d9ca03, and why there are now more or fewer.
COUNTED = {
    "cpu": (1611, "study, clients, documents, monitor, members and the engine's modules have tests "
            "of their own; refusals and recorded trajectories are new"),
    "interpret": (1088, "what also runs from PTX has left it (\"Which tier\"); tables, state, "
                  "members, loading, graphs and recorded trajectories are new"),
    "ptx": (717, "bad values and clipping launch nothing: `test_options` 267 to 75, `test_amp` 39 "
            "to 11"),
    "codegen": (1109, "54 of 107 builds, the rest in `make fuzz`; ticket and data in the kernels "
                "concerned, no longer in every build; the walk has tests of its own"),
    "floor": (17, "one case said once"),
}  # fmt: skip


def counts() -> str:
    lines = ["| tier | then | now | difference |", "|---|---|---|---|"]
    for tier, (then, why) in COUNTED.items():
        interpreted = tier in ("interpret", "floor")
        marks = "floor and interpret" if tier == "floor" else tier
        shown = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
             "-m", f"{marks} and not slow"],
            env={**os.environ, "TRITON_INTERPRET": str(int(interpreted))}, cwd=HERE.parent,
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
        now = int(re.findall(r"^(\d+)(?:/\d+)? tests collected", shown, re.MULTILINE)[-1])
        lines.append(f"| {tier} | {then:,} | {now:,} | {why} |")
    return "\n".join(lines)


TABLES = {"rows": rows, "refusals": refusals, "faults": faults}


def place(name: str) -> re.Pattern[str]:
    """Where a table stands in the file: between two comments."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def write() -> None:
    text = FILE.read_text(encoding="utf-8")
    chosen = {**TABLES, "counts": counts} if "--counts" in sys.argv else TABLES
    for name, table in chosen.items():
        text = place(name).sub(lambda _, table=table: table() + "\n", text, count=1)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
