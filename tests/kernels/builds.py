"""Which builds the tests of the tier `codegen` take, and what a perfect compiler would emit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pytest
import triton

from bench import codegen, walk
from bench.assembly import control_flow, in_loop
from bench.codegen import TARGETS, Build, Spec
from bench.sass import DATA

NVIDIA = [target for target in TARGETS if target.startswith("sm")]
ALL = [(spec, target) for target in TARGETS for spec in codegen.specialisations(target)]
OLDEST = "3.6.0"  # constraints-floor.txt
FLOOR = pytest.mark.floor  # also with the oldest triton, which is what a GPU may come with

# A build takes up to four seconds. `make test` makes those of every case for sm_90, and for the
# other targets those of fp32 alone, of two sizes side by side, and of 16 bits alone; with the
# oldest triton, what an H200 launches for fp32. `--slow` makes the rest. What was compiled of the
# rest is in the kept table, whose every line is held to the budgets, and which must be written anew
# as soon as a build differs from its line.
EVERYWHERE = {
    "w=fp32 g=fp32 v=fp32", "w=fp32 g=bf16 v=fp32 copy=bf16",
    "w=fp16 g=fp16 v=fp16", "w=fp32 g=fp32", "w=bf16 g=bf16 beside fp32", "w=fp16",
}  # fmt: skip


def builds(pairs: Sequence[tuple[Spec, str]]) -> list:
    """Parameters of a test that takes builds, with the marks `floor` and `slow`."""
    return [
        pytest.param(pair, marks=[FLOOR] if is_quick(*pair) else [FLOOR, pytest.mark.slow])
        for pair in pairs
    ]


def is_quick(spec: Spec, target: str) -> bool:
    if triton.__version__ == OLDEST:
        return (spec, target) == (specialisation("sm_90"), "sm_90")
    return target == "sm_90" or spec.case in EVERYWHERE


def label(pair: tuple[Spec, str]) -> str:
    return f"{pair[1]}-{pair[0].name}-{pair[0].case}"


def values(spec: Spec) -> dict:
    return dict(spec.constexprs)


def dtypes(spec: Spec) -> dict:
    """Storage types that the kernel touches, by operand."""
    every = {name: values(spec).get(f"{name}_DT") for name in ("W", "G", "V", "COPY")}
    return {name: dtype for name, dtype in every.items() if dtype is not None}


def fast_blocks(spec: Spec, threads: int) -> list[Counter]:
    """Accesses of one thread in each whole-block loop: what a perfect compiler would emit.

    All tiles of a kernel share one layout, so that each thread holds equally many elements of every
    operand: 128 bits of the widest type, and 64 of a 2-byte type beside a 4-byte one.
    """
    types = dtypes(spec)
    widest = max(dtype.primitive_bitwidth for dtype in types.values())
    if spec.case.endswith("beside fp32"):  # norms for an update of fp32 momentum or master weights
        widest = 32

    def block(loaded: str, stored: str) -> Counter:
        count: Counter = Counter()
        for kind, names in (("ld", loaded), ("st", stored)):
            for bits in (types[n].primitive_bitwidth for n in names.split() if n in types):
                width = 128 * bits // widest
                accesses, rest = divmod(values(spec)["BLOCK"] * bits, threads * width)
                assert rest == 0, f"{threads} threads are too many for {width}-bit accesses"
                count[f"{kind}{width}"] += accesses
        return count

    norm, update = block("W G", ""), block("W G V", "W V COPY")
    # Norms stand twice: the first try, and the one in rescaled units.
    return {"lars_step": [norm, norm, update], "l2norm": [norm, norm], "lars_update": [update]}[
        spec.name
    ]


def positions(lines: Sequence[str], pattern: str) -> list[int]:
    return [n for n, line in enumerate(lines) if re.search(pattern, line)]


def specialisation(target: str) -> Spec:
    """The one-launch kernel in fp32."""
    return codegen.specialisations(target)[0]


def sleeps_in_the_poll(made: Build) -> list[int]:
    """Nanoseconds of every sleep in the loop of a poll; one elsewhere fails."""
    blocks, found = control_flow(made.machine), []
    work, poll = re.compile(rf"{DATA}|\bSTG\b|{walk.DRAW}"), walk.poll(made.spec)
    for n, block in enumerate(blocks):
        for asleep in positions(block.lines, "NANOSLEEP"):
            assert in_loop(blocks, n, work), "of a poll, that does nothing else"
            # An atomic is left to one thread, in a block that follows.
            assert any(positions(blocks[m].lines, poll) for m in (n, *block.successors))
            found.append(int(block.lines[asleep].split()[-1], 16))
    return found
