"""The ticket protocol under thousands of interleavings, and under broken variants of itself."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels.layout import BOTH, NORM, UPDATE
from tests.kernels.ticket_model import (
    Deadlock,
    Item,
    Protocol,
    State,
    Step,
    TwoQueues,
    Violation,
    interleave,
    run_step,
)

pytestmark = pytest.mark.cpu

CHUNK = 4
RIGHT = Protocol()


def random_items(rng: random.Random) -> tuple[list[Item], int]:
    n = rng.randrange(0, 7)
    plan = make_plan(
        [rng.choice((0, 1, CHUNK, CHUNK + 1, rng.randrange(8 * CHUNK))) for _ in range(n)],
        [rng.random() < 0.8 for _ in range(n)],
        chunk=CHUNK,
        window=rng.randrange(12) * CHUNK * 8,
        lag=rng.randrange(6),
        bytes_per_element=8,
        order=rng.choice(("ahead", "grouped")),
    )
    return list(zip(*(x.tolist() for x in unpack_items(plan.items)), strict=True)), n


def run_steps(
    seed: int, protocol: Protocol = RIGHT, *, steps: int = 3, broken_order: bool = False
) -> None:
    """Several steps in a row on one state, some skipped, with a random number of programs."""
    rng = random.Random(seed)
    items, tensors = random_items(rng)
    if broken_order:
        items = sorted(items, key=lambda item: item[0] == NORM)
    programs = rng.randrange(1, 7)
    resident = rng.randrange(1, programs + 1)
    state = State(tensors)
    for number in range(steps):
        skip = rng.random() < 0.2
        run_step(Step(items, programs, state, number, skip, protocol), resident, rng)


@pytest.mark.parametrize("prefetch", [True, False])
def test_no_deadlock_and_every_item_once(prefetch):
    for seed in range(1500):
        run_steps(seed, Protocol(prefetch=prefetch))


def test_two_queues_neither_deadlock_nor_lose_an_item():
    """The order that no kernel has: whoever builds it has its protocol here."""
    for seed in range(3000):
        run_steps(seed, TwoQueues())


def test_full_residency_and_more_programs_than_items():
    items = [(NORM, 0, 0), (NORM, 0, 1), (UPDATE, 0, 1), (UPDATE, 0, 0)]
    for seed in range(200):
        state, rng = State(1), random.Random(seed)
        for number in range(4):
            run_step(Step(items, 13, state, number, skip=number == 2), 13, rng)
        assert state.counter == 4 << 32, "epoch 1 at first, three steps done, one skipped"


def test_an_empty_list_still_ends_the_step():
    state = State(0)
    run_step(Step([], 5, state, 0), 2, random.Random(0))
    assert state.counter == 2 << 32


def test_one_program_does_everything():
    """The interpreter's case: programs run one after another."""
    for seed in range(200):
        rng = random.Random(seed)
        items, tensors = random_items(rng)
        state = State(tensors)
        for number in range(2):
            run_step(Step(items, 5, state, number), 1, rng)


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        ({"broken_order": True}, Deadlock),
        ({"protocol": Protocol(check_epoch=False)}, Violation),
        ({"protocol": Protocol(tickets=False)}, Deadlock),
        ({"protocol": Protocol(reset_arrivals=False)}, Violation),
        ({"protocol": Protocol(last_ticket_resets=False)}, Violation),
        ({"protocol": TwoQueues(wait_last=False)}, Deadlock),
        ({"protocol": TwoQueues(check_epoch=False)}, Violation),
        ({"protocol": TwoQueues(last_ticket_resets=False)}, Violation),
    ],
    ids=[
        "updates before norms",
        "no epoch",
        "static items",
        "arrivals kept",
        "counter kept",
        "two queues, waiting before the last norm",
        "two queues, no epoch",
        "two queues, tickets kept",
    ],
)
def test_a_broken_protocol_is_caught(broken, caught):
    """Each rule is needed: without it some interleaving goes wrong in the way that it must."""
    for seed in range(300):
        try:
            run_steps(seed, **broken)
        except (Deadlock, Violation) as error:
            if isinstance(error, caught):
                return
    pytest.fail("300 interleavings of a broken protocol passed")


def test_static_items_need_co_residency():
    """The same static assignment passes when all programs are resident."""
    items = [(NORM, 0, c) for c in range(6)] + [(UPDATE, 0, c) for c in range(6)]

    def run(resident: int) -> None:
        for seed in range(50):
            state = State(1)
            step = Step(items, 6, state, 0, protocol=Protocol(tickets=False, prefetch=False))
            run_step(step, resident, random.Random(seed))

    run(6)
    with pytest.raises(Deadlock):
        run(2)


def test_skipping_must_not_raise_the_epoch():
    """A skipped step publishes nothing: its epoch is used by the next step."""
    items = [(NORM, 0, 0), (NORM, 0, 1), (UPDATE, 0, 0), (UPDATE, 0, 1)]
    state, rng = State(1), random.Random(1)
    for number, skip in enumerate((False, True, True, False)):
        before = state.counter
        run_step(Step(items, 3, state, number, skip), 2, rng)
        assert state.counter - before == (0 if skip else 1 << 32)
        assert state.flags[0][1] == ((3, 0, 2) if number == 3 else (0, 0, 2))


def unnoticed(protocol: Protocol, seed: int) -> bool:
    """Whether launches after one during which found_inf was written lose items without a word.

    Items that wait for nobody: others of such a launch may wait for an item that nobody has taken.
    """
    rng = random.Random(seed)
    items = [(BOTH, tensor, 0) for tensor in range(rng.randrange(1, 9))]
    programs, state = rng.randrange(1, 7), State(len(items))
    resident = rng.randrange(1, programs + 1)
    step = Step(items, programs, state, 0, rng.random() < 0.5, protocol)
    interleave(step, resident, rng, flip=0.15)
    for number in (1, 2):
        step = Step(items, programs, state, number, protocol=protocol)
        interleave(step, resident, rng)
        if step.done != Counter(items):
            return not state.noticed()
    return False


def test_found_inf_written_during_a_launch_loses_nothing_unnoticed_in_later_ones():
    assert not any(unnoticed(RIGHT, seed) for seed in range(4000))


@pytest.mark.parametrize("sign", ["notice_late_tickets", "notice_skipped_end"])
def test_both_signs_of_it_are_needed(sign):
    assert any(unnoticed(Protocol(**{sign: False}), seed) for seed in range(4000))


def test_what_nobody_disturbs_is_never_reported():
    for seed in range(1000):
        rng = random.Random(seed)
        items, tensors = random_items(rng)
        state = State(tensors)
        for number in range(4):
            run_step(Step(items, 5, state, number, rng.random() < 0.4), 3, rng)
            assert not state.noticed()
