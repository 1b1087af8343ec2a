"""A machine for PTX: memory with bounds, threads that diverge and meet, programs in turns.

    program    a CTA; some are resident at a time, and which one goes on is drawn at random
    group      threads that share an instruction pointer's turn: a warp, or the whole program
    thread     stands at a basic block; of a group those at the earliest block go on together

Memory is sequentially consistent: an order that real hardware could take, not the weakest.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.instructions import TYPES, Effect, compile_instruction

WARP = 32
_WIDTHS = {name: TYPES[name] for name in ("pred", "b16", "b32", "b64")}


class Fault(RuntimeError):
    """What hardware or its memory checker would report."""


class Memory:
    """Bytes of this process in bounds; an access outside of them, or misaligned, is a fault."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """`ranges`: first address and size of each buffer."""
        merged: list[list[int]] = []
        for first, size in sorted((a, n) for a, n in ranges if n):
            if merged and first < merged[-1][1]:  # views of one storage; neighbours stay apart
                merged[-1][1] = max(merged[-1][1], first + size)
            else:
                merged.append([first, first + size])
        self.starts, self.ends = (np.array([r[i] for r in merged], "i8") for i in (0, 1))
        self._views = [
            np.frombuffer((ctypes.c_ubyte * (end - start)).from_address(start), np.uint8)
            for start, end in merged
        ]

    def _places(self, addresses: Any, size: int) -> Iterator[tuple[Any, Any, Any]]:
        """For each buffer that is met: its bytes, which of the addresses, and their offsets."""
        at = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (at < 0) | (addresses + size > self.ends[at])
        if outside.any():
            raise Fault(f"{size} bytes at {addresses[outside][0]:#x} are in no buffer")
        if (addresses % size).any():
            first = addresses[addresses % size != 0][0]
            raise Fault(f"an access of {size} bytes at {first:#x} is misaligned")
        if len(at) and (at == at[0]).all():  # nearly always
            first = at[0]
            offsets = (addresses - self.starts[first])[:, None] + np.arange(size)
            yield self._views[first], slice(None), offsets
            return
        for buffer in np.unique(at):
            which = at == buffer
            offsets = (addresses[which] - self.starts[buffer])[:, None] + np.arange(size)
            yield self._views[buffer], which, offsets

    def read(self, addresses: Any, dtype: Any, count: int) -> Any:
        """`count` adjacent elements at each address: [threads, count]."""
        found = np.empty((len(addresses), dtype.itemsize * count), np.uint8)
        for view, which, offsets in self._places(addresses, found.shape[1]):
            found[which] = view[offsets]
        return found.view(dtype)

    def write(self, addresses: Any, values: Any) -> None:
        """A row of `values` at each address; of equal addresses the last thread's stays."""
        values = np.ascontiguousarray(values)
        raw = values.view(np.uint8).reshape(len(values), -1)
        for view, which, offsets in self._places(addresses, raw.shape[1]):
            view[offsets] = raw[which]


@dataclass
class Block:
    """A basic block: instructions with their predicates, then how it ends."""

    code: list[tuple[str, bool, Effect]] = field(default_factory=list)
    branch: tuple[str, bool, str] | None = None  # predicate ("" for always), negated, label
    barrier: bool = False
    end: bool = False


def _without_own_predicates(text: str) -> str:
    """Predicates that inline assembly declares by name, as further ones of the kernel's own."""
    for name in dict.fromkeys(re.findall(r"\.reg \.pred (\w+);", text)):
        count = int(re.search(r"\.reg \.pred\s+%p<(\d+)>", text)[1])
        text = re.sub(r"(\.reg \.pred\s+%p)<\d+>", rf"\1<{count + 1}>", text)
        text = re.sub(rf"(?<![\w%]){name}\b", f"%p{count}", text)
    return text


class Kernel:
    """A parsed entry of a PTX module."""

    def __init__(self, text: str) -> None:
        text = _without_own_predicates(text)
        self.name = re.search(r"\.entry (\w+)", text)[1]
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        types = re.findall(r"\.param \.(\w+).*_param_\d+", text)
        self.parameters = [np.dtype(f"u{int(t[1:]) // 8}") for t in types]
        self.registers = {
            prefix: (_WIDTHS[width], int(count))
            for width, prefix, count in re.findall(r"\.reg \.(\w+)\s+%([a-z]+)<(\d+)>", text)
        }
        self.blocks, self.labels = [Block()], dict[str, int]()
        for line in text[text.index("{") :].splitlines():
            self._add(line.split("//")[0].strip())

    def _add(self, line: str) -> None:
        if label := re.match(r"(\$L__BB\w+):", line):
            if self.blocks[-1].code:
                self.blocks.append(Block())
            self.labels[label[1]] = len(self.blocks) - 1
            return
        found = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)(?:\s+(.*?))?;$", line)
        if not found:
            if line and line[0] not in ".{}()$":
                raise Fault(f"cannot parse: {line}")
            return
        negated, predicate, opcode, text = found[1] == "!", found[2] or "", found[3], found[4] or ""
        block = self.blocks[-1]
        if opcode.split(".")[0] in ("bra", "bar", "ret"):
            if opcode.startswith("bra"):
                block.branch = (predicate, negated, text.strip())
            elif predicate:
                raise Fault(f"a predicated {opcode}")
            block.barrier, block.end = opcode.startswith("bar"), opcode == "ret"
            self.blocks.append(Block())
        elif (effect := compile_instruction(opcode, text)) is not None:
            block.code.append((predicate, negated, effect))


class Copies:
    """Asynchronous copies of one group of threads: begun, committed, done when waited for.

    `early`: done when begun. Hardware may do them at any time between the two.
    """

    def __init__(self, early: bool) -> None:
        self._early = early
        self._begun: list[Callable[[], None]] = []
        self._committed: list[list[Callable[[], None]]] = []

    def begin(self, copy: Callable[[], None]) -> None:
        if self._early:
            copy()
        else:
            self._begun.append(copy)

    def commit(self) -> None:
        self._committed.append(self._begun)
        self._begun = []

    def wait(self, left: int) -> None:
        """Until at most `left` of the commits are not done: the oldest are done first."""
        while len(self._committed) > left:
            for copy in self._committed.pop(0):
                copy()


class Program:
    """One CTA: registers, shared memory and where each thread stands."""

    def __init__(
        self, kernel: Kernel, number: int, grid: int, parameters: Sequence[Any], memory: Memory,
        shared: int, early_copies: bool,
    ) -> None:  # fmt: skip
        self.kernel, self.number, self.grid = kernel, number, grid
        self.parameters, self._global = parameters, memory
        self._registers: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        self._bytes = np.full(shared + 32, 0xFF, np.uint8)  # NaN where nothing was written
        start = self._bytes.ctypes.data
        self._shared = Memory([(start + -start % 16, max(shared, 1))])
        self._shared.ends -= self._shared.starts  # shared addresses begin at zero
        self._shared.starts[:] = 0
        self._copies: dict[int, Copies] = defaultdict(lambda: Copies(early_copies))
        self.at = np.zeros(kernel.threads, int)
        self.waiting = np.zeros(kernel.threads, bool)
        self.done = np.zeros(kernel.threads, bool)

    # What instructions ask for.

    def register(self, name: str) -> Any:
        found = self._registers.get(name)
        if found is None:
            prefix, number = re.match(r"%([a-z]+)(\d+)", name).groups()
            if prefix not in self._files:
                dtype, count = self.kernel.registers[prefix]
                # Not zero: a value that nothing wrote shows.
                self._files[prefix] = np.full((count, self.kernel.threads), 0xA5).astype(dtype)
            found = self._registers[name] = self._files[prefix][int(number)]
        return found

    def special(self, name: str, group: slice) -> Any:
        if name == "%tid.x":
            return np.arange(group.start, group.stop, dtype="u4")
        return np.full(
            self.lanes(group), {"%ctaid.x": self.number, "%nctaid.x": self.grid}[name], "u4"
        )

    def memory(self, space: str) -> Memory:
        return self._global if space == "global" else self._shared

    def copies(self, group: slice) -> Copies:
        return self._copies[group.start]

    @staticmethod
    def lanes(group: slice) -> int:
        return int(group.stop - group.start)

    def taking(self, group: slice, mask: Any) -> Any:
        return np.ones(self.lanes(group), bool) if mask is None else mask

    # How it goes on.

    def turn(self, group: slice) -> None:
        """The threads of a group at its earliest block do that block."""
        ready = ~(self.waiting[group] | self.done[group])
        here = int(self.at[group][ready].min())
        active = ready & (self.at[group] == here)
        block = self.kernel.blocks[here]
        whole = None if active.all() else active
        for predicate, negated, effect in block.code:
            mask = whole
            if predicate:
                chosen = self.register(predicate)[group] ^ negated
                mask = chosen if whole is None else chosen & whole
                if not mask.any():
                    continue
            effect(self, group, mask)
        goes = np.where(active, here + 1, self.at[group])
        if block.branch:
            predicate, negated, label = block.branch
            jumps = active & (self.register(predicate)[group] ^ negated) if predicate else active
            goes = np.where(jumps, self.kernel.labels[label], goes)
        self.at[group] = goes
        if block.barrier:
            self.waiting[group] |= active
        if block.end:
            self.done[group] |= active
        if (self.waiting | self.done).all():
            self.waiting[:] = False

    def run(self, random_: random.Random, by_warp: bool) -> Iterator[None]:
        """Go on by one block at a time."""
        size = WARP if by_warp else self.kernel.threads
        groups = [slice(i, i + size) for i in range(0, self.kernel.threads, size)]
        while not self.done.all():
            ready = [g for g in groups if not (self.waiting[g] | self.done[g]).all()]
            self.turn(random_.choice(ready))
            yield


def launch(
    kernel: Kernel, grid: int, parameters: Sequence[int], memory: Memory, shared: int, *,
    resident: int = 3, seed: int = 0, by_warp: bool = False, early_copies: bool = False,
    most_turns: int = 2_000_000,
) -> None:  # fmt: skip
    """Run all programs of a launch, at most `resident` at the same time, in random turns."""
    draw = random.Random(f"schedule {seed}")  # small seeds alone begin alike
    values = [dtype.type(p) for dtype, p in zip(kernel.parameters, parameters, strict=True)]
    to_come = iter(range(grid))
    running: list[Iterator[None]] = []
    turns = 0
    with np.errstate(all="ignore"):
        while True:
            while len(running) < resident and (number := next(to_come, None)) is not None:
                program = Program(kernel, number, grid, values, memory, shared, early_copies)
                running.append(program.run(draw, by_warp))
            if not running:
                return
            chosen = draw.choice(running)
            for _ in range(draw.randrange(1, 40)):
                if next(chosen, "ended") == "ended":
                    running.remove(chosen)
                    break
                turns += 1
            if turns > most_turns:
                raise Fault(f"{kernel.name}: programs wait for each other")
