"""Walks a warp through the machine code of the one-launch kernels: ``python -m bench.walk``.

Predictions from compiled code, not measurements; `bench/sass.py` says how a walk goes. Every case
for every NVIDIA target is compiled with the Triton that is installed, and its figures are kept in
``bench/results/codegen/walk-<version>.csv``; those of `lars_resident`, of which a whole step is
walked from one asynchronous copy to the next, in ``walk-resident-<version>.csv``.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from bench.assembly import control_flow
from bench.cache_model import GPUS
from bench.codegen import (
    RESULTS,
    TARGETS,
    Build,
    Spec,
    build,
    environment,
    resident_specialisations,
    specialisations,
)
from bench.launch_model import NOW
from bench.sass import DATA, LATENCY, Step, instructions, is_loop, route, walk

DRAW = r"ATOMG\.E\.ADD\.64"
ARRIVE = r"ATOMG\.E\.ADD\.STRONG"
PUBLISH = r"ATOMG\.E\.EXCH"
POLL = r"LDG\.E\.(?:64\.)?STRONG\.SYS"  # half of a word, where only that is used
PARTIAL = r"LDG\.E\.64\.STRONG\.GPU"
NORM_LOAD, UPDATE_LOAD = r"LDG\.E\.EL\.", r"LDG\.E\.EF\."
UPDATE_STORE = r"STG\.E\.EF\."
ROOT = r"MUFU\.RSQ64H"  # of a tensor's sums, in float64
SLOW = r"^CALL\.|NANOSLEEP"  # slow paths of fp64 functions, and a ratio that is not there yet
TAIL = r"@!?P\d LDG\.E R"
ITEM = r"LDG\.E\.64 R\d+, (?:desc\[UR\d+\])?\[R\d+\.64\]$"

# Cycles that issue and plan count on: of the next item's word a quarter of an L2 latency.
LIMITS = {
    "norm_first": 1300, "update_first": 1300, "publish": 2300,
    "next_item": LATENCY["descriptor"] // 4, "update_next_item": LATENCY["descriptor"] // 4,
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Of whole chunks in `lars_step`: cycles, under the names of `launch_model.Timing`."""

    norm_first: int
    """From the top of an item to the first data load of a norm."""
    norm_block: int
    """Instructions of a warp for 2,048 elements."""
    reduce: int
    """From a norm's last block to its arrival atomic, without fence and the next item's word."""
    publish: int
    """From the arrival atomic of a tensor's last chunk to the exchange that publishes."""
    both: int
    """From where a chunk that waits for nobody would arrive to the first load of its update."""
    update_first: int
    """From the top of an item to the first data load of an update."""
    ratio_wanted: int
    """From there to its first poll."""
    poll: int
    """From there to its first block, as if data were there."""
    update_block: int
    """Instructions of a warp for 2,048 elements."""
    update_end: int
    """From an update's last block to the top of the next item."""
    next_item: int
    """Cycles that a norm would be shorter if the next item's word came at once."""
    update_next_item: int
    """Likewise an update."""

    @property
    def missed(self) -> str:
        """What takes longer than `LIMITS`."""
        return " ".join(name for name, most in LIMITS.items() if getattr(self, name) > most)


def poll(spec: Spec) -> str:
    """What a poll looks like: a volatile load, or an atomic read."""
    atomic = dict(spec.constexprs)["POLL_ATOMIC"]
    return PARTIAL if atomic else POLL


@dataclass(frozen=True)
class Item:
    """An item's instructions, from its top to the top of the next, and its loop over blocks."""

    lines: list[str]
    first: int
    """Of the loop, the place of its first instruction."""
    after: int
    """Of its last turn, the place behind its last instruction."""
    block: int
    """Instructions of a turn."""


def _item(made: Build, waypoints: Sequence[str], avoid: str) -> Item:
    blocks, values = control_flow(made.machine), dict(made.spec.constexprs)
    turns = values["CHUNK"] // values["BLOCK"]
    way = route(blocks, [DRAW, *waypoints], f"{SLOW}|{TAIL}|{avoid}")
    (at,) = [place for place, n in enumerate(way) if is_loop(blocks, n)]
    size = len(blocks[way[at]].lines)
    first = len(instructions(blocks, way[:at]))
    lines = instructions(blocks, way[:-1] if waypoints[-1] == DRAW else way, turns)
    return Item(lines, first, first + turns * size, size)


def norm_path(made: Build) -> Item:
    """A norm of a whole chunk that is not its tensor's last."""
    return _item(made, [NORM_LOAD, NORM_LOAD, ARRIVE, DRAW], f"{UPDATE_LOAD}|{PARTIAL}")


def update_path(made: Build) -> Item:
    """An update of a whole chunk, whose ratio is there."""
    waypoints = [UPDATE_LOAD, poll(made.spec), ITEM, UPDATE_STORE, DRAW]
    return _item(made, waypoints, NORM_LOAD)


@functools.cache
def figures(made: Build) -> Figures:
    """Walk the paths of a build of `lars_step` for an NVIDIA target."""
    norm, update = norm_path(made), update_path(made)
    alone = _item(
        made, [NORM_LOAD, NORM_LOAD, ROOT, UPDATE_LOAD], f"{ARRIVE}|{PARTIAL}|{PUBLISH}|EXIT"
    )
    blocks = control_flow(made.machine)
    last = walk(instructions(blocks, route(blocks, [ARRIVE, PARTIAL, PUBLISH], f"{SLOW}|{TAIL}")))
    norms, updates = walk(norm.lines), walk(update.lines)
    # The next item's word is a figure of its own.
    summed, whole = walk(norm.lines, _next_item(norm)), walk(alone.lines, _next_item(alone))
    there = walk(update.lines, DATA)
    first_load, polled = (find(updates, x) for x in (UPDATE_LOAD, poll(made.spec)))
    reduce = summed[find(summed, ARRIVE)].cycle - summed[norm.after].cycle - LATENCY["fence"]
    share = 2048 / dict(made.spec.constexprs)["BLOCK"]
    return Figures(
        norm_first=norms[find(norms, NORM_LOAD)].cycle,
        norm_block=round(norm.block * share),
        reduce=reduce,
        publish=last[find(last, PUBLISH)].cycle - last[find(last, ARRIVE)].cycle,
        both=whole[find(whole, UPDATE_LOAD)].cycle - whole[alone.after].cycle - reduce,
        update_first=updates[first_load].cycle,
        ratio_wanted=updates[polled].cycle - updates[first_load].cycle,
        poll=there[update.first].cycle - there[polled].cycle,
        update_block=round(update.block * share),
        update_end=updates[-1].cycle + 1 - updates[update.after].cycle,
        next_item=norms[-1].cycle - summed[-1].cycle,
        update_next_item=updates[-1].cycle - walk(update.lines, _next_item(update))[-1].cycle,
    )


def _next_item(item: Item) -> str:
    """The load of the next item's word: the first of 64 bits behind the ticket's receipt (LDS)."""
    received = next(n for n, x in enumerate(item.lines) if re.search(r"\bLDS\b", x))
    return f"^{re.escape(next(x for x in item.lines[received:] if re.search(ITEM, x)))}$"


@dataclass(frozen=True)
class Held:
    """Of a step of `lars_resident`: instructions of a warp, and cycles that it waits beside them.

    A step is `norm`, from the wait for a copy to the tagged store of its sums; `update`, from there
    to the last store; `end`, from there to the next wait for a copy. As if a copy were there.
    """

    step: int
    norm_issued: int
    norm_waits: int
    update_issued: int
    update_waits: int
    end_issued: int
    end_waits: int
    """For words and rows of the steps to come; with 16 bits for momentum too, an L2 hit."""
    publication: int
    """From when a finisher has the last slots of a tensor to its published ratio."""
    turn: int
    """From when it has slots that are not the last to its sending for the next ones."""
    dram: int
    """Cycles that the DRAM of an H200 takes for a step's bytes of a multiprocessor's programs."""

    @property
    def pace(self) -> str:
        """What sets it."""
        return "dram" if self.step <= self.dram else "latency"


COPIES, WAIT = r"LDGDEPBAR", r"DEPBAR\.LE"  # copies are sent for; those of this step are there
SLOT = rf"@!P\d {POLL}"  # of a tensor's sums: a finisher's lanes have one each, or none


def held_path(made: Build) -> list[str]:
    """A step of `lars_resident` that sums a chunk and updates one, from copies to copies."""
    waypoints = [COPIES, WAIT, PUBLISH, UPDATE_STORE, COPIES]  # PUBLISH: of its sums, tagged
    return _along(made, waypoints, f"{SLOW}|{TAIL}|{ROOT}")


def finish_path(made: Build) -> list[str]:
    """What a finisher does with the last two turns of a tensor's slots, which are there."""
    return _along(made, [SLOT, r"^DADD", SLOT, PUBLISH], f"{SLOW}|{TAIL}")


def _along(made: Build, waypoints: Sequence[str], avoid: str) -> list[str]:
    blocks = control_flow(made.machine)
    return instructions(blocks, route(blocks, waypoints, avoid))


def held(made: Build) -> Held:
    """Walk a step of `lars_resident` for sm_90, and the end of a finisher's tensor."""
    steps = walk(held_path(made), data=LATENCY["prefetched"])
    last = walk(finish_path(made), SLOT)
    begin, copied, stored = (find(steps, x) for x in (COPIES, WAIT, PUBLISH))
    updated, end = (last_of(steps, x) for x in (UPDATE_STORE, COPIES))
    added = find(last, "DADD")
    turn, next_turn = last_of(last[:added], SLOT), added + find(last[added:], SLOT)

    def waits(first: int, behind: int) -> int:
        return steps[behind].cycle - steps[first].cycle - (behind - first)

    return Held(
        step=steps[end].cycle - steps[begin].cycle,
        norm_issued=stored - copied,
        norm_waits=waits(copied, stored),
        update_issued=updated - stored,
        update_waits=waits(stored, updated),
        # From copies to copies: its end is in two parts.
        end_issued=end - updated + copied - begin,
        end_waits=waits(updated, end) + waits(begin, copied),
        publication=last[find(last, PUBLISH)].cycle - last[last_of(last, SLOT)].cycle,
        turn=last[next_turn].cycle - last[turn].cycle,
        dram=dram_cycles(made.spec),
    )


def dram_cycles(spec: Spec) -> int:
    """Cycles in which the DRAM of an H200 moves what two programs move in a step.

    Two fill a multiprocessor. w, g and v are read; w, v and a copy are written.
    """
    values, gpu = dict(spec.constexprs), GPUS["H200"]
    moved = ("W", "G", "V", "W", "V", "COPY")
    bits = sum(values[f"{x}_DT"].primitive_bitwidth for x in moved if values.get(f"{x}_DT"))
    cycle_bytes = gpu.held_tbps * 1e3 / NOW.ghz / gpu.multiprocessors
    return round(2 * values["CHUNK"] * bits / 8 / cycle_bytes)


def find(steps: Sequence[Step], pattern: str) -> int:
    """The place of the first instruction that matches."""
    return next(n for n, step in enumerate(steps) if re.search(pattern, step.text))


def last_of(steps: Sequence[Step], pattern: str) -> int:
    """The place of the last instruction that matches."""
    return max(n for n, step in enumerate(steps) if re.search(pattern, step.text))


KEY = ("kernel", "case", "target")
NVIDIA = [target for target in TARGETS if target.startswith("sm")]
# Name of the table, what is in it, and what is said of each line.
TABLES = {
    "lars_step": ("walk", Figures, "missed"),
    "lars_resident": ("walk-resident", Held, "pace"),
}


def line(spec: Spec, target: str) -> dict[str, str]:
    """A case's line of its table."""
    made = build(spec, target)
    found = figures(made) if spec.name == "lars_step" else held(made)
    said = TABLES[spec.name][2]
    key = dict(zip(KEY, (spec.name, spec.case, target), strict=True))
    return key | {n: str(x) for n, x in asdict(found).items()} | {said: getattr(found, said)}


def cases(kernel: str) -> list[tuple[Spec, str]]:
    """What is walked of a kernel."""
    listed = resident_specialisations if kernel == "lars_resident" else specialisations
    return [(s, target) for target in NVIDIA for s in listed(target) if s.name == kernel]


def table_path(kernel: str) -> Path:
    """Where the figures of a kernel are kept for the Triton that is installed."""
    return RESULTS / f"{TABLES[kernel][0]}-{triton.__version__}.csv"


def kept(kernel: str) -> list[dict[str, str]]:
    """The kept lines of a kernel."""
    with table_path(kernel).open(newline="") as file:
        return list(csv.DictReader(text for text in file if not text.startswith("#")))


def main() -> None:
    """Walk every case, print the figures and keep them."""
    parser = argparse.ArgumentParser(prog="python -m bench.walk", description=__doc__)
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args()
    for kernel in TABLES:
        lines = [line(*case) for case in cases(kernel)]
        for row in [lines[0].keys(), *(x.values() for x in lines)]:
            print(*row, sep="  ")
        if not args.no_csv:
            with table_path(kernel).open("w", newline="") as file:
                file.write(f"# PREDICTIONS of a walk of compiled code; {environment()}\n")
                writer = csv.DictWriter(file, lines[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)


if __name__ == "__main__":
    main()
