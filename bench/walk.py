"""Walks a warp through the machine code of the one-launch kernels: ``python -m bench.walk``.

Predictions from compiled code, not measurements. A path through the basic blocks is chosen by
waypoints; along it instructions issue in order, one a cycle, and stall where an operand is not
there yet. What a memory access takes is assumed (`LATENCY`); the rest are usual figures for Hopper.

    first load    from the top of an item to its first data load
    arrival       from a norm's sums to the answer of its arrival atomic
    publication   from the arrival atomic of a tensor's last chunk to the exchange that publishes
    next item     cycles of an item that would be saved if the next item's word came at once

Of `lars_resident` a whole step is walked, from one asynchronous copy to the next, as if copies and
momentum were there when they are waited for.
"""

from __future__ import annotations

import argparse
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.assembly import Block, control_flow
from bench.codegen import Build, Spec, build, candidates, specialisations

# Cycles. Descriptors and flags: an L2 hit; data: DRAM under load; atomics return from L2.
LATENCY = {"descriptor": 400, "data": 1300, "atomic": 700, "fence": 500, "barrier": 20}
_UNITS = {"LDS": 29, "SHFL": 24, "F2F": 22, "MUFU": 22, "R2UR": 10, "S2R": 25, "S2UR": 25}
_FP64, _ALU = 14, 5

DRAW = r"ATOMG\.E\.ADD\.64"
ARRIVE = r"ATOMG\.E\.ADD\.STRONG"
PUBLISH = r"ATOMG\.E\.EXCH"
POLL = r"LDG\.E\.64\.STRONG\.SYS"
PARTIAL = r"LDG\.E\.64\.STRONG\.GPU"
NORM_LOAD, UPDATE_LOAD = r"LDG\.E\.EL\.", r"LDG\.E\.EF\."
UPDATE_STORE = r"STG\.E\.EF\."
SLOW = r"^CALL\.|NANOSLEEP"  # slow paths of fp64 functions, and a ratio that is not there yet
TAIL = r"@!?P\d LDG\.E R"
ITEM = r"LDG\.E\.64 R\d+, (?:desc\[UR\d+\])?\[R\d+\.64\]$"


@dataclass(frozen=True)
class Step:
    """An instruction of a walk: when it issued and how long it had waited for operands."""

    cycle: int
    stalled: int
    text: str


def path(blocks: Sequence[Block], waypoints: Sequence[str], avoid: str) -> list[str]:
    """Instructions on the shortest way that meets the waypoints in order, without `avoid`.

    It begins at the first waypoint's block and ends with the last waypoint's.
    """
    starts = [n for n, b in enumerate(blocks) if _meets(b, waypoints[0])]
    lines: list[str] = []
    at = starts[-1]
    for number, goal in enumerate(waypoints[1:], 1):
        came, todo = {at: at}, deque([at])
        found = None
        while todo and found is None:
            n = todo.popleft()
            for after in blocks[n].successors:
                if after in came or _meets(blocks[after], avoid):
                    continue
                came[after] = n
                if _meets(blocks[after], goal):
                    found = after
                    break
                todo.append(after)
        if found is None:
            raise ValueError(f"no way to {goal} (waypoint {number}) without {avoid}")
        way = [found]
        while way[-1] != at:
            way.append(came[way[-1]])
        for n in reversed(way[1:]):
            lines += blocks[n].lines
        at = found
    return [*lines, *blocks[at].lines]


def _meets(block: Block, pattern: str) -> bool:
    return any(re.search(pattern, line) for line in block.lines)


def walk(lines: Sequence[str], free: str = "$^") -> list[Step]:
    """Issue instructions in order. Loads whose text matches `free` take no time."""
    ready: dict[str, int] = {}
    now, steps = 0, []
    for text in lines:
        guard, op, operands = _parse(text)
        to, of = _registers(op, operands)
        if guard:
            of.append(guard)
        at = max([now, *(ready.get(name, 0) for name in of)])
        steps.append(Step(at, at - now, text))
        latency = _ALU if re.search(free, text) else _latency(op)
        for name in to:
            ready[name] = at + latency
        now = at + 1
        if op.startswith("MEMBAR"):
            now += LATENCY["fence"]
        elif op.startswith("BAR"):
            now += LATENCY["barrier"]
    return steps


def _latency(op: str) -> int:
    base = op.split(".")[0]
    if base == "LDG":
        return LATENCY["data" if ".128" in op else "descriptor"]
    if base == "ATOMG":
        return LATENCY["atomic"]
    if base in ("DADD", "DMUL", "DFMA", "DSETP"):
        return _FP64
    return _UNITS.get(base, _ALU)


def _parse(text: str) -> tuple[str, str, list[str]]:
    found = re.match(r"(?:@!?(U?P[\dT]) )?\s*([\w.]+)\s*(.*)", text)
    assert found, text
    return found[1] or "", found[2], re.split(r",\s*(?![^\[]*\])", found[3]) if found[3] else []


def _registers(op: str, operands: list[str]) -> tuple[list[str], list[str]]:
    """Registers and predicates that an instruction writes, and those that it reads."""
    base, wide = op.split(".")[0], 1
    if ".128" in op:
        wide = 4
    elif re.search(r"\.64|\.WIDE|^D(ADD|MUL|FMA)|^CS2R", op):
        wide = 2
    none = (
        "STG", "STS", "LDGSTS", "BAR", "BRA", "MEMBAR", "CCTL", "EXIT", "ERRBAR", "CGAERRBAR",
        "CALL",
    )  # fmt: skip
    if base in none:
        outputs = 0
    elif base == "ATOMG" or base == "SHFL":
        outputs = 2
    else:  # a register, and predicates that stand before it or after it
        outputs = 1 + next(
            (n for n, x in enumerate(operands[1:]) if not re.fullmatch(r"U?P[\dT]", x)), 0
        )
        outputs = min(outputs, 2)
    to = [name for x in operands[:outputs] for name in _names(x, wide)]
    of = [name for x in operands[outputs:] for name in _names(x, 2 if base[0] == "D" else 1)]
    if base in ("STG", "STS"):
        of += _names(operands[-1], wide)
    return to, of


def _names(operand: str, wide: int) -> list[str]:
    names = []
    for kind, number, double in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", operand):
        count = max(wide if kind == "R" else 1, 2 if double else 1)
        names += [f"{kind}{int(number) + k}" for k in range(count)]
    return names


def poll(spec: Spec) -> str:
    """What a poll looks like: a volatile load, or an atomic read."""
    atomic = dict(spec.constexprs)["POLL_ATOMIC"]
    return r"LDG\.E\.64\.STRONG\.GPU" if atomic else POLL


def update_path(made: Build) -> list[str]:
    """From the top of an update whose ratio is there to the top of the next item."""
    waypoints = [DRAW, UPDATE_LOAD, poll(made.spec), ITEM, UPDATE_STORE, DRAW]
    return path(control_flow(made.machine), waypoints, f"{SLOW}|{TAIL}|{NORM_LOAD}")


@dataclass(frozen=True)
class Figures:
    """Cycles of one build; see the module's text."""

    norm_first_load: int
    update_first_load: int
    ratio_wanted: int
    sums: int
    arrival: int
    publication: int
    next_item_exposed: int
    update: int


def figures(made: Build) -> Figures:
    """Walk the paths of a build of `lars_step` for an NVIDIA target."""
    blocks = control_flow(made.machine)
    whole = f"{SLOW}|{TAIL}"
    update = update_path(made)
    # To the top of the next item: there its word is taken apart.
    norm = path(
        blocks, [DRAW, NORM_LOAD, NORM_LOAD, ARRIVE, DRAW], f"{whole}|{UPDATE_LOAD}|{PARTIAL}"
    )
    last = path(blocks, [ARRIVE, PARTIAL, PUBLISH], whole)
    norms, updates, publication = walk(norm), walk(update), walk(last)
    consumed = _last_data_use(norms)
    return Figures(
        norm_first_load=norms[_find(norms, NORM_LOAD)].cycle,
        update_first_load=updates[_find(updates, UPDATE_LOAD)].cycle,
        ratio_wanted=updates[_find(updates, POLL)].cycle,
        sums=norms[_find(norms, ARRIVE)].cycle - norms[consumed].cycle,
        arrival=LATENCY["fence"] + LATENCY["atomic"],
        publication=publication[_find(publication, PUBLISH)].cycle
        - publication[_find(publication, ARRIVE)].cycle,
        next_item_exposed=max(_exposed(update), _exposed(norm)),
        update=updates[-1].cycle,
    )


@dataclass(frozen=True)
class Held:
    """Of a step of `lars_resident`: cycles, and instructions of a warp ."""

    step: int
    exposed: int
    """Cycles before the wait for this step's copy that are spent waiting for the rows to come."""
    norm_issued: int
    sums: int
    """From the wait for the copy to the arrival, beyond the instructions in between."""
    update_issued: int
    end_issued: int
    publication: int
    """From the answer of a tensor's last arrival to the published ratio, without loads."""
    after: int
    """From there to the next step."""


COPIES, WAIT = r"LDGDEPBAR", r"DEPBAR\.LE"  # copies are sent for; those of this step are there


def held_path(made: Build) -> list[str]:
    """A step of `lars_resident` that sums a chunk and updates one, from copies to copies."""
    waypoints = [COPIES, WAIT, ARRIVE, UPDATE_STORE, COPIES]
    return path(control_flow(made.machine), waypoints, f"{SLOW}|{TAIL}|{PARTIAL}")


def held(made: Build) -> Held:
    """Walk a step of `lars_resident` for sm_90, and one that finishes a tensor."""
    steps = walk(held_path(made))
    waits, arrives, first_copy = (_find(steps, x) for x in (WAIT, ARRIVE, COPIES))
    copies = [n for n, step in enumerate(steps) if re.search(COPIES, step.text)]
    stores = [n for n, step in enumerate(steps) if re.search(UPDATE_STORE, step.text)]
    fence = _find(steps, "MEMBAR")
    finishing = [COPIES, PARTIAL, PUBLISH, WAIT]
    last = walk(path(control_flow(made.machine), finishing, f"{SLOW}|{TAIL}"))
    published, answer = _find(last, PUBLISH), _find(last, r"SHFL")
    before = waits - first_copy
    return Held(
        step=steps[copies[-1]].cycle - steps[first_copy].cycle,
        exposed=steps[waits].cycle - steps[first_copy].cycle - before,
        norm_issued=arrives - waits,
        sums=steps[fence].cycle - steps[waits].cycle - (fence - waits),
        update_issued=stores[-1] - arrives,
        end_issued=copies[-1] - stores[-1] + before,
        publication=last[published].cycle - last[answer].cycle - LATENCY["descriptor"],
        after=last[_find(last, WAIT)].cycle - last[published].cycle,
    )


def _find(steps: Sequence[Step], pattern: str) -> int:
    return next(n for n, step in enumerate(steps) if re.search(pattern, step.text))


def _last_data_use(steps: Sequence[Step]) -> int:
    """The step that waits for data last."""
    data = max(n for n, step in enumerate(steps) if re.search(r"LDG\S*128", step.text))
    waits = [n for n, step in enumerate(steps) if n > data and step.stalled > LATENCY["data"] / 4]
    return waits[0] if waits else data


def _exposed(lines: Sequence[str]) -> int:
    """Cycles that the item would be shorter if the next item's word came at once.

    That word is the last 64-bit descriptor load that a ticket's receipt (LDS) comes before.
    """
    received = next(n for n, x in enumerate(lines) if re.search(r"\bLDS\b", x))
    item = next(x for x in lines[received:] if re.search(ITEM, x))
    return walk(lines)[-1].cycle - walk(lines, free=f"^{re.escape(item)}$")[-1].cycle


def main() -> None:
    """Print the figures of the fp32 kernel for each NVIDIA target."""
    parser = argparse.ArgumentParser(prog="python -m bench.walk", description=__doc__)
    parser.add_argument("--target", nargs="+", default=["sm_90"])
    parser.add_argument("--show", choices=("norm", "update", "publication"), help="the steps")
    args = parser.parse_args()
    for target in args.target:
        spec = specialisations(target)[0]
        made = build(spec, target)
        print(f"{target} {spec.name} {spec.case}: {figures(made)}")
        for spec in candidates(target)[:1]:
            print(f"{target} {spec.name} {spec.case}: {held(build(spec, target))}")


if __name__ == "__main__":
    main()
