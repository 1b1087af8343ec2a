"""The compiler's output for every kernel: registers, spills, access widths, atomics, polls.

``python -m bench.codegen`` compiles each specialisation ahead of time for four targets, prints one
line for each and writes ``bench/results/codegen/<triton version>.csv``. No GPU is needed: Triton
carries ptxas, cuobjdump and an AMD assembler. Nothing here is a time; counts are predictions.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bench.assembly import atomics, poll_forms, resident, widths
from bench.environment import commit
from lars_fused._engine.launch import Dtypes, constants, is_mixed
from lars_fused.kernels.tuning import compile_options, resident_row_for, row_for

RESULTS = Path(__file__).parent / "results" / "codegen"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Spec:
    """One specialisation: a kernel, its argument types and its compile-time values."""

    kernel: str  # "module:function"
    case: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's function."""
        return self.kernel.split(":")[1]

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return dict(self.options)["num_warps"]


@dataclass(frozen=True)
class Build:
    """The compiler's output in text form; ``assembly`` is PTX or amdgcn, ``machine`` SASS or ""."""

    spec: Spec
    target: str
    ttir: str
    ttgir: str
    assembly: str
    machine: str
    resources: str  # cuobjdump's resource usage; "" on AMD, where amdgcn carries it
    shared: int


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``ld128`` to ``st16``: global accesses by bits a thread moves, LDGSTS counted as a load.
    ``spills``: to memory. ``scalar_spills``: AMD's, into lanes of a vector register.
    """

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    stack: int
    spills: int
    scalar_spills: int
    shared: int
    resident: int
    ld128: int
    ld64: int
    ld32: int
    ld16: int
    st128: int
    st64: int
    st32: int
    st16: int
    lds: int
    sts: int
    barriers: int
    converts: int
    poll: str
    atomics: str


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    Dtypes(FP32, FP32, FP32),
    Dtypes(FP32, BF16, FP32),
    Dtypes(FP32, FP16, FP32),
    Dtypes(BF16, BF16, FP32),
    Dtypes(FP16, FP16, FP32),
    Dtypes(BF16, BF16, BF16),
    Dtypes(FP16, FP16, FP16),
    Dtypes(FP32, BF16, FP32, BF16),
    Dtypes(FP32, FP16, FP32, FP16),
]
# One list of tensors alone, for the public norms.
LISTS = [Dtypes(dtype, None, FP32) for dtype in (FP32, BF16, FP16)]
# Types of the run-time arguments. None is specialised on its value or alignment.
SIGNATURE = (
    dict.fromkeys(("items", "tensors", "counter", "watch", "flags"), "*i64")
    | dict.fromkeys(("groups", "partials", "sums", "ratios"), "*fp64")
    | {"arrivals": "*i32", "grad_scale": "*fp32", "found_inf": "*fp32", "n_items": "i32"}
)


def launched(target: str, kernel: str = "lars_step") -> bool:
    """Whether a target's tuning row launches a kernel."""
    return kernel != "lars_step" or row_for(target).launches == 1


def specialisations(target: str) -> list[Spec]:
    """Every specialisation of a target, with both forms of the poll.

    The compile-time values are those that the launch layer and the target's tuning row give. Where
    the row names two launches, `lars_step` runs only if the environment asks for it: one case of it
    is compiled, so that its protocol can be checked.
    """
    row = row_for(target)
    specs = [_spec("lars_step", case, row) for case in CASES[: None if launched(target) else 1]]
    if not row.poll_atomic:
        specs.append(_spec("lars_step", CASES[0], row._replace(poll_atomic=True), " poll=atomic"))
    specs += [_spec("lars_update", case, row) for case in CASES]
    norms = [_spec("l2norm", case, row) for case in (*CASES, *LISTS)]
    return specs + list({spec.constexprs: spec for spec in reversed(norms)}.values())[::-1]


def resident_specialisations(target: str) -> list[Spec]:
    """Those of `lars_resident`; none where the target has no row for it."""
    row = resident_row_for(target)
    if row is None:
        return []
    return [_spec("lars_resident", case, row) for case in CASES]


def _spec(kernel: str, dtypes: Dtypes, row: Any, note: str = "") -> Spec:
    values = constants(dtypes, row, kernel, False)
    names = getattr(importlib.import_module(f"lars_fused.kernels.{kernel}"), kernel).arg_names
    used = [letter for letter in ("w", "g", "v", "copy") if f"{letter.upper()}_DT" in values]
    types = {letter: getattr(dtypes, letter) for letter in used}
    case = " ".join(f"{n}={str(t).removeprefix('torch.')}" for n, t in types.items() if t)
    if kernel == "l2norm" and dtypes.g and torch.float32 not in types.values():
        case += f" beside {str(max(dtypes, key=lambda t: t.itemsize if t else 0))[6:]}"
    return Spec(
        f"lars_fused.kernels.{kernel}:{kernel}",
        re.sub(r"float(?=\d)", "fp", case.replace("bfloat", "bf")) + note,
        tuple((name, SIGNATURE.get(name, "constexpr")) for name in names),
        tuple(values.items()),
        tuple(compile_options(kernel, row, is_mixed(dtypes)).items()),
    )


@functools.cache
def build(spec: Spec, target: str) -> Build:
    """Compile one specialisation; cached for the life of the process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to read its output")
    module, function = spec.kernel.split(":")
    fn = getattr(importlib.import_module(module), function)
    if fn.is_gluon():  # which wants places, not names
        places = {(fn.arg_names.index(name),): value for name, value in spec.constexprs}
        source = GluonASTSource(fn, dict(spec.signature), places)
    else:
        source = ASTSource(fn, dict(spec.signature), dict(spec.constexprs))
    options = dict(spec.options)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    nvidia = TARGETS[target].backend == "cuda"
    machine = resources = ""
    if nvidia:
        tool = triton.knobs.nvidia.cuobjdump.path
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            machine = _output(tool, "-sass", str(cubin))
            resources = _output(tool, "--dump-resource-usage", str(cubin))
    return Build(
        spec,
        target,
        compiled.asm.get("ttir", ""),  # Gluon begins with ttgir
        compiled.asm["ttgir"],
        compiled.asm["ptx" if nvidia else "amdgcn"],
        machine,
        resources,
        compiled.metadata.shared,
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"{pattern} not found in the compiler's output")
    return int(found[1])


@functools.cache
def measure(made: Build) -> Row:
    """Read the numbers of one line off the compiler's output."""
    if made.machine:
        code = made.machine
        registers = _number(r"REG:(\d+)", made.resources)
        stack = _number(r"STACK:(\d+)", made.resources) + _number(r"LOCAL:(\d+)", made.resources)
        spills, scalar_spills = len(re.findall(r"\b(?:STL|LDL)\b", code)), 0
        shared_ops = [len(re.findall(rf"\b{op}\b", code)) for op in ("LDS", "STS", "BAR")]
    else:
        code = made.assembly
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", code)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        scalar_spills = _number(r"\.sgpr_spill_count:\s+(\d+)", code)
        shared_ops = [len(re.findall(p, code)) for p in (r"\bds_read", r"\bds_write", "s_barrier")]
    seen = widths(code.splitlines())
    spec = made.spec
    return Row(
        spec.name,
        spec.case,
        made.target,
        spec.warps,
        registers,
        stack,
        spills,
        scalar_spills,
        made.shared,
        resident(made.target, spec.warps, registers, made.shared),
        *(seen[f"{kind}{bits}"] for kind in ("ld", "st") for bits in (128, 64, 32, 16)),
        *shared_ops,
        made.ttgir.count("ttg.convert_layout"),
        "+".join(poll_forms(made.assembly)) or "-",
        " ".join(f"{n}*{op.replace(' ', '.')}" for op, n in sorted(atomics(made.assembly).items()))
        or "-",
    )


def environment() -> str:
    """Versions and commit that a table was made with."""
    sha, dirty = commit()
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    return f"{versions}, python {platform.python_version()}, git {sha}{'-dirty' * dirty}"


def table(rows: Sequence[Row]) -> str:
    """Aligned text, one line per row."""
    names = [f.name for f in fields(Row)]
    cells = [names, *([str(getattr(row, name)) for name in names] for row in rows)]
    text = {n for n, f in enumerate(fields(Row)) if f.type == "str"}
    lines = []
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (
            c.ljust(w) if n in text else c.rjust(w)
            for n, (c, w) in enumerate(zip(line, sizes, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _row(task: tuple[Spec, str]) -> Row:
    return measure(build(*task))


def measure_all(targets: Sequence[str], jobs: int) -> list[Row]:
    """Every specialisation of the targets, compiled by ``jobs`` processes."""
    tasks = [
        (spec, target)
        for target in targets
        for spec in specialisations(target) + resident_specialisations(target)
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_row, tasks, chunksize=4))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Rows under a comment line that records the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {environment()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(astuple(row) for row in rows)


def main() -> None:
    """Print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args()
    rows = measure_all(args.target, args.jobs)
    print(f"# {environment()}")
    print(table(rows))
    if not args.no_csv and set(args.target) == set(TARGETS):
        path = RESULTS / f"{triton.__version__}.csv"
        write_csv(rows, path)
        print(f"kept in {path.relative_to(RESULTS.parent.parent.parent)}")


if __name__ == "__main__":
    main()
