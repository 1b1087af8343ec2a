"""A model of the one-launch kernel's ticket protocol, for random interleavings.

Programs are generators that yield before every access to shared memory, so a scheduler can
interleave them in any order. Only ``resident`` of them run at a time: another starts only when one
has ended, as on a GPU with fewer slots than programs. Each knob of `Protocol` breaks one rule.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lars_fused.kernels.layout import BOTH, NORM, UPDATE

Item = tuple[int, int, int]


class Deadlock(AssertionError):
    """Every resident program waits for something that nobody resident will do."""


class Violation(AssertionError):
    """LaunchTables done twice or not at all, a foreign ratio used, or state left behind."""


@dataclass(frozen=True)
class Protocol:
    check_epoch: bool = True
    tickets: bool = True  # False: program p does items p, p + programs, ...
    prefetch: bool = True
    reset_arrivals: bool = True
    last_ticket_resets: bool = True
    notice_late_tickets: bool = True  # one that comes after the last
    notice_skipped_end: bool = True  # a skipped step whose ticket 0 was not skipped


@dataclass(frozen=True)
class TwoQueues(Protocol):
    """Order "dynamic": norms and updates in queues of their own, their tickets in one word.

    A program takes the next update if its ratio is published, else the next norm; it waits only
    where every norm has been taken. It takes by compare and swap: by adding it could get a later
    update, and wait for that while there are norms.
    """

    wait_last: bool = True  # False: it waits for the next update while there are norms


@dataclass
class State:
    """What lies in device memory from one step to the next."""

    tensors: int
    counter: int = 1 << 32  # epoch << 32 | next ticket
    tickets: tuple[int, int] = (0, 0)  # of norms and updates, with two queues
    ended: int = 0  # programs, with two queues
    arrivals: list[int] = field(default_factory=list)
    flags: list[tuple[int, object]] = field(default_factory=list)  # (epoch, ratio)
    last_epoch: int = 0  # of the last launch that handed out its ticket 0
    lost_epoch: int = 0  # of a launch that is known to have lost work

    def __post_init__(self) -> None:
        self.arrivals = [0] * self.tensors
        self.flags = [(0, None)] * self.tensors

    def draw(self) -> tuple[int, int]:
        word, self.counter = self.counter, self.counter + 1
        return word >> 32, word & 0xFFFFFFFF

    def noticed(self) -> bool:
        """What `queue_state.lost_epoch` says."""
        at_start = self.counter & 0xFFFFFFFF == 0 and self.last_epoch == (self.counter >> 32) - 1
        return self.lost_epoch > 0 or not at_start


@dataclass
class Step:
    """One launch, and the record of what it did."""

    items: list[Item]
    programs: int
    state: State
    number: int
    skip: bool = False
    protocol: Protocol = Protocol()
    done: Counter[Item] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.chunks = Counter(tensor for kind, tensor, _ in self.items if kind == NORM)
        self.epoch = self.state.counter >> 32
        self.partials: dict[tuple[int, int], int] = {}

    def ratio(self, tensor: int) -> tuple[int, int, int]:
        """Stands for the trust ratio: which step, which tensor, from how many chunks."""
        return self.number, tensor, self.chunks[tensor]

    def program(self, index: int) -> Iterator[str]:
        """Yields "go" where it may be interrupted and "wait" where it polls in vain."""
        skip = self.skip
        n_items = 0 if skip else len(self.items)
        yield "go"
        epoch, ticket = self._next(index, None)
        if ticket == 0 and not skip:
            yield "go"
            if self.state.last_epoch != epoch - 1:
                self.state.lost_epoch = epoch - 1
            self.state.last_epoch = epoch
        while True:
            following = None
            if ticket < n_items and self.protocol.prefetch:
                yield "go"
                following = self._next(index, ticket)
            if ticket >= n_items:
                break
            yield from self._do(self.items[ticket], epoch)
            if following is None:
                yield "go"
                following = self._next(index, ticket)
            epoch, ticket = following
        last = n_items + self.programs - 1
        if self.protocol.notice_late_tickets and ticket > last:
            yield "go"
            self.state.lost_epoch = epoch
        if self.protocol.last_ticket_resets and ticket == last:
            yield "go"
            taken = self.state.last_epoch == epoch
            if self.protocol.notice_skipped_end and skip and taken:
                self.state.lost_epoch = epoch
            yield "go"
            self.state.counter = (epoch if skip else epoch + 1) << 32

    def two_queues(self, index: int) -> Iterator[str]:
        """The same for `TwoQueues`."""
        protocol, state = self.protocol, self.state
        assert isinstance(protocol, TwoQueues)
        norms = [item for item in self.items if item[0] != UPDATE]
        updates = [item for item in self.items if item[0] == UPDATE]
        epoch, taken = self.epoch, not self.skip
        while taken:
            yield "go"
            seen = n, u = state.tickets
            if n >= len(norms) and u >= len(updates):
                break
            yield "go"
            ready = u < len(updates) and self._published(updates[u][1], epoch)
            if u < len(updates) and not ready and not (n < len(norms) and protocol.wait_last):
                yield "wait"
                continue
            yield "go"
            if state.tickets != seen:
                continue
            state.tickets = (n, u + 1) if ready else (n + 1, u)
            yield from self._do(updates[u] if ready else norms[n], epoch)
        yield "go"
        state.ended += 1
        if state.ended == self.programs and protocol.last_ticket_resets:
            yield "go"
            state.tickets, state.ended = (0, 0), 0
            state.counter = (epoch + taken) << 32

    def _next(self, index: int, ticket: int | None) -> tuple[int, int]:
        if self.protocol.tickets:
            return self.state.draw()
        return self.epoch, index if ticket is None else ticket + self.programs

    def _do(self, item: Item, epoch: int) -> Iterator[str]:
        kind, tensor, chunk = item
        state = self.state
        if kind == NORM:
            yield "go"
            self.partials[tensor, chunk] = self.number
            yield "go"
            state.arrivals[tensor] += 1
            if state.arrivals[tensor] == self.chunks[tensor]:
                yield "go"
                found = [self.partials.get((tensor, c)) for c in range(self.chunks[tensor])]
                if found != [self.number] * len(found):
                    raise Violation(f"ratio of tensor {tensor} from unfinished partials {found}")
                if self.protocol.reset_arrivals:
                    state.arrivals[tensor] = 0
                yield "go"
                state.flags[tensor] = (epoch, self.ratio(tensor))
        elif kind == UPDATE:
            yield "go"
            while not self._published(tensor, epoch):
                yield "wait"
            if state.flags[tensor][1] != self.ratio(tensor):
                raise Violation(f"step {self.number} used the ratio {state.flags[tensor][1]}")
        elif kind != BOTH:
            raise Violation(f"unknown kind {kind}")
        yield "go"
        self.done[item] += 1

    def _published(self, tensor: int, epoch: int) -> bool:
        found, ratio = self.state.flags[tensor]
        return found == epoch if self.protocol.check_epoch else ratio is not None


def interleave(step: Step, resident: int, rng: random.Random, flip: float = 0.0) -> None:
    """Run the programs at random until all have ended.

    ``flip``: how probable it is that somebody writes found_inf before a program goes on.
    """
    waiting_to_start = list(range(step.programs))
    rng.shuffle(waiting_to_start)  # the hardware promises no order of starting
    running: list[Iterator[str]] = []
    blocked: set[int] = set()
    while running or waiting_to_start:
        while waiting_to_start and len(running) < resident:
            begin = step.two_queues if isinstance(step.protocol, TwoQueues) else step.program
            running.append(begin(waiting_to_start.pop()))
        at = rng.randrange(len(running))
        if flip and rng.random() < flip:
            step.skip = not step.skip
        burst = rng.choice((1, 1, 2, 5, 20))  # now and then one program runs far ahead
        for _ in range(burst):
            said = next(running[at], "end")
            if said == "wait":
                blocked.add(id(running[at]))
                if len(blocked) == len(running):
                    raise Deadlock(f"{len(running)} programs wait, items done: {len(step.done)}")
                break
            blocked.clear()
            if said == "end":
                del running[at]
                break


def run_step(step: Step, resident: int, rng: random.Random) -> None:
    """Interleave the programs at random until all have ended; check the step's outcome."""
    epoch = step.state.counter >> 32
    interleave(step, resident, rng)
    expected = Counter() if step.skip else Counter(step.items)
    if step.done != expected:
        raise Violation(f"items done wrongly: {(step.done - expected) + (expected - step.done)}")
    if any(step.state.arrivals):
        raise Violation(f"arrivals left behind: {step.state.arrivals}")
    if step.state.counter != (epoch if step.skip else epoch + 1) << 32:
        raise Violation(f"counter left at {step.state.counter:#x} after epoch {epoch}")
