"""A warp's way through the machine code of NVIDIA: instructions in order, one a cycle.

Predictions from compiled code, not measurements. An instruction stalls where an operand is not
there yet. What a memory access takes is assumed (`LATENCY`); the rest are usual figures for Hopper.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.assembly import Block

# Cycles. Descriptors, flags and data that was prefetched: an L2 hit; other data: DRAM under load;
# atomics return from L2.
LATENCY = {
    "descriptor": 400, "prefetched": 400, "data": 1300, "atomic": 700, "fence": 500, "barrier": 20,
}  # fmt: skip
_UNITS = {"LDS": 29, "SHFL": 24, "F2F": 22, "MUFU": 22, "R2UR": 10, "S2R": 25, "S2UR": 25}
_FP64, _ALU = 14, 5

# Tensors: what carries an eviction policy, of any width, and momentum, whose loads are whole.
DATA = r"LDG\.E\.(?:EL\.|EF\.|128)"


@dataclass(frozen=True)
class Step:
    """An instruction of a walk: when it issued and how long it had waited for operands."""

    cycle: int
    stalled: int
    text: str


def route(blocks: Sequence[Block], waypoints: Sequence[str], avoid: str) -> list[int]:
    """The shortest way, as blocks, that meets the waypoints in order, without `avoid`.

    It begins at the first waypoint's block and ends with the last waypoint's.
    """
    at = max(n for n, block in enumerate(blocks) if _meets(block, waypoints[0]))
    way = [at]
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
        leg = [found]
        while came[leg[-1]] != at:
            leg.append(came[leg[-1]])
        way += leg[::-1]
        at = found
    return way


def _meets(block: Block, pattern: str) -> bool:
    return any(re.search(pattern, line) for line in block.lines)


def is_loop(blocks: Sequence[Block], n: int) -> bool:
    """Whether a block is a loop over a chunk's whole blocks."""
    return n in blocks[n].successors and _meets(blocks[n], DATA)


def instructions(blocks: Sequence[Block], way: Sequence[int], turns: int = 1) -> list[str]:
    """Those along a way, whose loops over whole blocks take `turns` turns.

    The loads of the last turn, of a block that there is none of, are issued but not made.
    """
    lines: list[str] = []
    for n in way:
        if is_loop(blocks, n):
            lines += (turns - 1) * blocks[n].lines
            lines += [re.sub(rf"{DATA}\S*.*", "NOP", line) for line in blocks[n].lines]
        else:
            lines += blocks[n].lines
    return lines


def walk(lines: Sequence[str], free: str = "$^", data: int = LATENCY["data"]) -> list[Step]:
    """Issue instructions in order. Loads whose text matches `free` take no time.

    `data`: what other loads of tensors take.
    """
    ready: dict[str, int] = {}
    now, steps = 0, []
    for text in lines:
        to, of = operands(text)
        at = max([now, *(ready.get(name, 0) for name in of)])
        steps.append(Step(at, at - now, text))
        latency = _ALU if re.search(free, text) else _latency(text, data)
        for name in to:
            ready[name] = at + latency
        now = at + 1
        op = _parse(text)[1]
        if op.startswith("MEMBAR"):
            now += LATENCY["fence"]
        elif op.startswith("BAR"):
            now += LATENCY["barrier"]
    return steps


@functools.cache
def _latency(text: str, data: int) -> int:
    base = _parse(text)[1].split(".")[0]
    if base == "LDG":
        return data if re.search(DATA, text) else LATENCY["descriptor"]
    if base == "ATOMG":
        return LATENCY["atomic"]
    if base in ("DADD", "DMUL", "DFMA", "DSETP"):
        return _FP64
    return _UNITS.get(base, _ALU)


@functools.cache
def _parse(text: str) -> tuple[str, str, list[str]]:
    found = re.match(r"(?:@!?(U?P[\dT]) )?\s*([\w.]+)\s*(.*)", text)
    assert found, text
    return found[1] or "", found[2], re.split(r",\s*(?![^\[]*\])", found[3]) if found[3] else []


_WRITES_NOTHING = (
    "STG", "STS", "LDGSTS", "BAR", "BRA", "MEMBAR", "CCTL", "EXIT", "ERRBAR", "CGAERRBAR", "CALL",
    "NOP", "UBLKPF",
)  # fmt: skip


@functools.cache
def operands(text: str) -> tuple[list[str], list[str]]:
    """Registers and predicates that an instruction writes, and those that it reads."""
    guard, op, parts = _parse(text)
    base, wide = op.split(".")[0], 1
    if ".128" in op:
        wide = 4
    elif re.search(r"\.64|\.WIDE|^F2F\.F64|^I2F\.F64|^D(ADD|MUL|FMA)|^CS2R", op):
        wide = 2
    if base in _WRITES_NOTHING:
        outputs = 0
    elif base == "ATOMG" or base == "SHFL":
        outputs = 2
    else:  # a register, and predicates that stand before it or after it
        outputs = 1 + next(
            (n for n, x in enumerate(parts[1:]) if not re.fullmatch(r"U?P[\dT]", x)), 0
        )
        outputs = min(outputs, 2)
    pair = base[0] == "D" or op.startswith("F2F.F32.F64")
    to = [name for x in parts[:outputs] for name in _names(x, wide)]
    of = [name for x in parts[outputs:] for name in _names(x, 2 if pair else 1)]
    if base in ("STG", "STS"):
        of += _names(parts[-1], wide)
    return to, [*of, *([guard] if guard else [])]


def _names(operand: str, wide: int) -> list[str]:
    names = []
    for kind, number, double in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", operand):
        count = max(wide if "R" in kind else 1, 2 if double else 1)
        names += [f"{kind}{int(number) + k}" for k in range(count)]
    return names
