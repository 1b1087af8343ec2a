"""Reading PTX, SASS and amdgcn: basic blocks, loops, polls, access widths, atomics, occupancy."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A basic block: its instructions and the indices of the blocks that may follow."""

    lines: tuple[str, ...]
    successors: tuple[int, ...]


@functools.cache
def control_flow(text: str) -> list[Block]:
    """Basic blocks of PTX, SASS or amdgcn; a branch ends a block, its target starts one.

    For sm_80 ptxas writes some ways out of a loop as calls under a predicate. They are successors
    too; the branch back that follows them ends the block.
    """
    code: list[tuple[str, str, str]] = []  # label, instruction, branch target
    label = ""
    same: dict[str, str] = {}  # a label that another one follows at once, and that one
    for raw in text.splitlines():
        line = re.sub(r"(?:/\*.*?\*/|//.*|\s;\s.*)", "", raw).strip().rstrip("; ")
        if found := re.match(
            r"\s*/\*([0-9a-f]{4,})\*/\s+\S", raw
        ):  # SASS: every line has an address
            label = f"0x{int(found[1], 16):x}"
        elif found := re.match(r"(\$L__BB\w+|\.LBB\w+):", line):
            if label:
                same[label] = found[1]
            label = found[1]
            continue
        if re.match(r"[@a-zA-Z]", line) and not line.endswith(":"):
            jump = re.search(
                r"\b(?:bra|BRA|s_c?branch)\S*\s(?:.*\s)?(\$L\w+|\.LBB\w+|0x\w+)$", line
            )
            code.append((label, line, jump[1] if jump else ""))
            label = ""
    for before, after_it in reversed(same.items()):
        same[before] = same.get(after_it, after_it)
    code = [(name, line, same.get(target, target)) for name, line, target in code]
    leaves = [re.match(r"@!?U?P\d CALL\S* (0x\w+)$", line) for _, line, _ in code]
    targets = {t for _, _, t in code if t} | {found[1] for found in leaves if found}
    starts = [i for i, c in enumerate(code) if i == 0 or c[0] in targets or code[i - 1][2]]
    bounds = list(zip(starts, [*starts[1:], len(code)], strict=True))
    block_of = {code[start][0]: n for n, start in enumerate(starts)}
    blocks = []
    for n, (start, end) in enumerate(bounds):
        _, last, target = code[end - 1]
        after = [block_of[target]] if target else []
        after += [block_of[found[1]] for found in leaves[start:end] if found]
        # Falls through unless it ends in a return or in a branch whose only operand is its target.
        if not re.match(r"(?:(?:bra|BRA|s_branch)\S*\s+\S+$|ret\b|EXIT\b|s_endpgm)", last):
            after += [n + 1] if n + 1 < len(bounds) else []
        blocks.append(Block(tuple(line for _, line, _ in code[start:end]), tuple(after)))
    return blocks


def in_loop(blocks: Sequence[Block], start: int, avoid: re.Pattern[str]) -> bool:
    """Whether ``start`` can be reached from itself without meeting an instruction of ``avoid``."""
    clear = [not any(avoid.search(line) for line in b.lines) for b in blocks]
    seen: set[int] = set()
    todo = list(blocks[start].successors)
    while todo:
        n = todo.pop()
        if n == start:
            return True
        if n not in seen and clear[n]:
            seen.add(n)
            todo += blocks[n].successors
    return False


def cycles(blocks: Sequence[Block]) -> list[tuple[str, ...]]:
    """Instructions of each outermost loop, however many basic blocks it was cut into.

    A loop is a strongly connected component: blocks that can all reach each other.
    """
    onward = [_reachable(blocks, n) for n in range(len(blocks))]
    found = []
    for n in range(len(blocks)):
        loop = [m for m in sorted(onward[n]) if n in onward[m]]
        if n in onward[n] and n == loop[0]:
            found.append(tuple(line for m in loop for line in blocks[m].lines))
    return found


def _reachable(blocks: Sequence[Block], start: int) -> set[int]:
    seen: set[int] = set()
    todo = list(blocks[start].successors)
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += blocks[n].successors
    return seen


POLLS = {
    "volatile": re.compile(r"\bld\.volatile\.global"),
    "relaxed": re.compile(r"\bld\.(?:global\.)?(?:gpu\.)?relaxed|\bld\.global\.gpu\.relaxed"),
    "acquire": re.compile(r"\bld\.(?:global\.)?(?:gpu\.)?acquire|\bld\.global\.gpu\.acquire"),
    "coherent": re.compile(r"\bglobal_load_\S+ .*\bsc1\b"),
}
# A poll loop contains only the poll. The loop over tickets encloses everything, so a cycle that
# passes a ticket draw, a publication or a tile access does not count.
NOT_A_POLL = re.compile(
    r"\batom\.|atomic_(?:add|swap)|\.v[24]\.|buffer_|dwordx4|st\.global|global_store"
)


def poll_forms(code: str) -> list[str]:
    """The kinds of flag read that have their own loop in the generated code."""
    blocks = control_flow(code)
    found = set()
    for n, block in enumerate(blocks):
        for form, pattern in POLLS.items():
            if any(pattern.search(line) for line in block.lines) and in_loop(blocks, n, NOT_A_POLL):
                found.add(form)
    return sorted(found)


def widths(lines: Iterable[str]) -> Counter[str]:
    """Global accesses by direction and width in bits, such as ``ld128``, in SASS or amdgcn."""
    count: Counter[str] = Counter()
    sizes = {"x4": 128, "x3": 96, "x2": 64, "": 32}
    for line in lines:
        if found := re.search(r"\b(LDG|LDGSTS|STG)(\.\S*)", line):
            width = re.search(r"\.[US]?(256|128|64|16|8)(?=\.|$)", found[2])
            kind = "st" if found[1] == "STG" else "ld"
            count[f"{kind}{width[1] if width else 32}"] += 1
        elif found := re.search(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", line):
            if found[2].startswith("dword"):
                bits = sizes[found[2][5:]]
            else:
                bits = 16 if "short" in found[2] else 8
            count[f"{found[1].replace('load', 'ld').replace('store', 'st')}{bits}"] += 1
    return count


def atomics(code: str) -> Counter[str]:
    """Atomic operations with their ordering, from the target's own instructions."""
    nvidia = r"\b(?:atom|red)\.global[\w.]*|\bld\.(?:volatile\.global|global\.gpu)[\w.]*"
    amd = r"\bglobal_atomic_\w+|\bbuffer_atomic_\w+|\bbuffer_wbl2 \w+|\bbuffer_inv \w+"
    return Counter(re.findall(f"{nvidia}|{amd}", code))


def resident(target: str, warps: int, registers: int, shared: int) -> int:
    """Programs resident on one multiprocessor, limited by registers, shared memory, warp slots.

    NVIDIA: cuda_occupancy.h (a warp's registers come in units of 256 from one of four 16K-register
    partitions; shared memory in units of 128 bytes) and the CUDA programming guide's table of
    compute capabilities (64 warps, 32 blocks, 164 or 228 KB shared, 1 KB of it reserved a block).
    gfx942: LLVM's AMDGPUBaseInfo.cpp for gfx90a and later (4 SIMDs of 512 vector registers a
    lane in units of 8, 8 waves a SIMD, 16 work groups and 64 KB of LDS a compute unit).
    """
    if target == "gfx942":
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, 16, 65536 // shared if shared else 16)
    per_warp = max(256, -(-registers * 32 // 256) * 256)
    by_shared = (164 if target == "sm_80" else 228) * 1024 // (-(-shared // 128) * 128 + 1024)
    return min(4 * (16384 // per_warp) // warps, 64 // warps, 32, by_shared)
