"""The work list: every chunk once, norms before updates, lag and window kept."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from lars_fused._engine.plan import Plan, chunk_count, make_plan, unpack_items
from lars_fused.kernels.layout import (
    BOTH,
    GROUP_SHIFT,
    MAX_CHUNKS,
    MAX_GROUPS,
    MAX_TENSORS,
    NORM,
    UPDATE,
    pack_item,
)

# A bare GPU machine, which collects this file too, has no hypothesis.
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.cpu

CHUNK = 16
ORDERS = ("ahead", "grouped")

tensors = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 40 * CHUNK),
            st.integers(0, 40).flatmap(
                lambda c: st.sampled_from([max(0, c * CHUNK + d) for d in (-1, 0, 1)])
            ),
        ),
        st.booleans(),
    ),
    max_size=25,
)


def plan_of(
    numels: list[int],
    adapt: list[bool] | None = None,
    *,
    room: int = 30,
    lag: int = 6,
    order: str = "grouped",
    chunk: int = CHUNK,
) -> Plan:
    """``room``: the window in chunks of fp32 w and g."""
    return make_plan(
        tuple(numels),
        tuple([True] * len(numels) if adapt is None else adapt),
        chunk=chunk,
        window=room * chunk * 8,
        lag=lag,
        bytes_per_element=8,
        order=order,
    )


def listed(plan: Plan) -> list[tuple[int, int, int]]:
    return list(zip(*(x.tolist() for x in unpack_items(plan.items)), strict=True))


def places(plan: Plan) -> dict[tuple[int, int], list[int]]:
    """(kind, tensor) -> places in ticket order."""
    found = defaultdict(list)
    for place, (kind, tensor, _) in enumerate(listed(plan)):
        found[kind, tensor].append(place)
    return found


@settings(max_examples=200)
@given(tensors, st.integers(0, 60), st.integers(1, 50), st.sampled_from(ORDERS))
def test_every_chunk_once_and_norms_before_updates(case, room, lag, order):
    numels, adapt = [n for n, _ in case], [a for _, a in case]
    plan = plan_of(numels, adapt, room=room, lag=lag, order=order)
    expected = []
    for i, (n, a) in enumerate(case):
        count = chunk_count(n, CHUNK)
        kinds = (NORM, UPDATE) if a and count > 1 else (BOTH,)
        expected += [(kind, i, c) for kind in kinds for c in range(count)]
    assert plan.items.dtype == torch.int64
    assert sorted(listed(plan)) == sorted(expected)
    where = places(plan)
    for (kind, tensor), found in where.items():
        if kind == UPDATE:
            assert max(where[NORM, tensor]) < min(found)

    slotted = [(s, chunk_count(n, CHUNK)) for s, n in zip(plan.slots, numels, strict=True)]
    used = sorted(x for s, count in slotted if s >= 0 for x in range(s, s + count))
    assert used == list(range(plan.n_slots)), "slots overlap or leave a gap"
    assert [s >= 0 for s in plan.slots] == [chunk_count(n, CHUNK) > 1 for n in numels]
    assert plan.n_tensors == len(numels)
    again = plan_of(numels, adapt, room=room, lag=lag, order=order)
    assert torch.equal(plan.items, again.items)


def outstanding(plan: Plan) -> int:
    """The largest number of chunks whose norm is listed and whose update is not yet."""
    now = most = 0
    for kind, _, _ in listed(plan):
        now += {NORM: 1, UPDATE: -1, BOTH: 0}[kind]
        most = max(most, now)
    return most


@settings(max_examples=150)
@given(tensors, st.integers(0, 60), st.integers(1, 50))
def test_a_group_fits_the_window(case, room, lag):
    numels, adapt = [n for n, _ in case], [a for _, a in case]
    largest = max((chunk_count(n, CHUNK) for n, a in case if a), default=0)
    plan = plan_of(numels, adapt, room=room, lag=lag)
    assert outstanding(plan) <= max(room, largest)


@settings(max_examples=150)
@given(tensors, st.integers(0, 50))
def test_ahead_is_never_further_ahead_than_the_lag(case, lag):
    """Chunks normed and not yet updated: a tensor and the lag, and at the end as much again."""
    numels, adapt = [n for n, _ in case], [a for _, a in case]
    counts = [chunk_count(n, CHUNK) for n, a in case if a]
    plan = plan_of(numels, adapt, lag=lag, order="ahead")
    assert outstanding(plan) <= 2 * (max((c for c in counts if c > 1), default=0) + lag)


def test_ahead_covers_each_wait_exactly_where_tensors_follow():
    """Ten items between a tensor's last norm and its first update; more where nothing follows."""
    plan = plan_of([6 * CHUNK] * 20, lag=10, order="ahead")
    where = places(plan)
    gaps = [min(where[UPDATE, i]) - max(where[NORM, i]) - 1 for i in range(20)]
    assert gaps[:16] == [10] * 16
    assert min(gaps[16:]) > 10


def test_a_small_tensor_at_the_end_leaves_no_wait_uncovered():
    plan = plan_of([6 * CHUNK] * 9 + [2 * CHUNK], lag=10, order="ahead")
    where = places(plan)
    assert min(min(where[UPDATE, i]) - max(where[NORM, i]) - 1 for i in range(10)) >= 10


def test_ahead_takes_the_tensors_as_they_come():
    items = listed(plan_of([n * CHUNK for n in (9, 2, 7, 4, 5)], lag=1, order="ahead"))
    assert [i for k, i, c in items if k == NORM and c == 0] == [0, 1, 2, 3, 4]


def test_items_carry_the_group():
    plan = make_plan(
        (3 * CHUNK, 5), (True, True), (7, MAX_GROUPS - 1), chunk=CHUNK, window=0, lag=1,
        bytes_per_element=8,
    )  # fmt: skip
    groups = (plan.items >> GROUP_SHIFT) & (MAX_GROUPS - 1)
    _, tensors, _ = unpack_items(plan.items)
    assert groups[tensors == 0].unique().tolist() == [7]
    assert groups[tensors == 1].unique().tolist() == [MAX_GROUPS - 1]
    good = {"chunk": CHUNK, "window": 0, "lag": 1, "bytes_per_element": 8}
    with pytest.raises(ValueError, match="a group must be in"):
        make_plan((5,), (True,), (MAX_GROUPS,), **good)
    with pytest.raises(ValueError, match="1 tensors but 2 groups"):
        make_plan((5,), (True,), (0, 1), **good)


@pytest.mark.parametrize("order", ORDERS)
def test_updates_come_a_lag_after_their_last_norm(order):
    """Tensors of 8 chunks and a window that holds a tensor and the lag: nobody needs to wait."""
    lag = 12
    plan = plan_of([8 * CHUNK] * 21, room=8 + 2 * lag, lag=lag, order=order)
    where = places(plan)
    gaps = sorted(min(where[UPDATE, i]) - max(where[NORM, i]) - 1 for i in range(21))
    assert gaps[0] >= lag


def test_grouped_lag_is_no_longer_than_needed():
    plan = plan_of([8 * CHUNK] * 39, room=1000, lag=12)
    assert outstanding(plan) == 8 + 16, "a group is its largest tensor and the lag, rounded up"


def test_a_rest_too_small_for_its_lag_joins_the_group_before():
    assert outstanding(plan_of([8 * CHUNK] * 4, room=32, lag=12)) == 32
    assert outstanding(plan_of([8 * CHUNK] * 4, room=31, lag=12)) == 24


def test_singles_fill_the_wait_of_a_tensor_alone():
    numels = [50 * CHUNK] + [CHUNK] * 10
    where = places(plan_of(numels, room=30, lag=6))
    assert min(where[UPDATE, 0]) - max(where[NORM, 0]) - 1 == 6
    assert len([p for (k, _), ps in where.items() if k == BOTH for p in ps if p > 100]) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_a_large_tensor_is_updated_backwards(order):
    items = listed(plan_of([100 * CHUNK, 3 * CHUNK], room=30, lag=0, order=order))
    assert items[:100] == [(NORM, 0, c) for c in range(100)]
    assert [c for k, i, c in items if (k, i) == (UPDATE, 0)] == list(reversed(range(100)))


@pytest.mark.parametrize("order", ORDERS)
def test_tiniest_items_come_last(order):
    items = listed(plan_of([1, 7, 20 * CHUNK, 3], room=30, lag=1, order=order))
    assert items[-2:] == [(BOTH, 3, 0), (BOTH, 0, 0)]


@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]])
def test_nothing_to_do(numels):
    plan = plan_of(numels)
    assert plan.items.shape == (0,)
    assert plan.items.dtype == torch.int64
    assert plan.slots == (-1,) * len(numels)
    assert plan.n_slots == 0


@pytest.mark.parametrize(
    ("numel", "kinds"),
    [
        (CHUNK - 1, [BOTH]),
        (CHUNK, [BOTH]),
        (CHUNK + 1, [NORM] * 2 + [UPDATE] * 2),
        (2 * CHUNK, [NORM] * 2 + [UPDATE] * 2),
        (2 * CHUNK + 1, [NORM] * 3 + [UPDATE] * 3),
    ],
)
def test_chunk_boundaries(numel, kinds):
    assert [k for k, _, _ in listed(plan_of([numel]))] == kinds
    count = chunk_count(numel, CHUNK)
    assert [k for k, _, _ in listed(plan_of([numel], [False]))] == [BOTH] * count


@pytest.mark.parametrize("order", ORDERS)
def test_ten_billion_elements(order):
    numel = 10**10 + 1
    plan = plan_of([numel], room=10, order=order, chunk=1 << 20)
    count = chunk_count(numel, 1 << 20)
    assert plan.items.numel() == 2 * count
    assert plan.n_slots == count
    kinds, _, chunks = unpack_items(plan.items)
    assert torch.equal(chunks[kinds == NORM], torch.arange(count))
    assert torch.equal(chunks[kinds == UPDATE], torch.arange(count).flip(0))


@pytest.mark.parametrize("kind", [NORM, UPDATE, BOTH])
@pytest.mark.parametrize("tensor", [0, 1, MAX_TENSORS - 1])
@pytest.mark.parametrize("chunk", [0, 1, MAX_CHUNKS - 1])
def test_packing_round_trip(kind, tensor, chunk):
    word = torch.tensor([pack_item(kind, tensor, chunk)])
    assert listed(Plan(word, (), 0, 1, word[:0])) == [(kind, tensor, chunk)]
    assert word.item() == kind | tensor << 2 | chunk << 40


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ((0, 0, 0), "kind"),
        ((4, 0, 0), "kind"),
        ((NORM, MAX_TENSORS, 0), "tensor index"),
        ((NORM, -1, 0), "tensor index"),
        ((NORM, 0, MAX_CHUNKS), "chunk index"),
    ],
)
def test_packing_limits(item, text):
    with pytest.raises(ValueError, match=text):
        pack_item(*item)


def test_refusals_name_the_value():
    good = {"chunk": CHUNK, "window": 0, "lag": 1, "bytes_per_element": 8}
    with pytest.raises(ValueError, match="2 tensors but 1 adapt"):
        make_plan((1, 2), (True,), **good)
    with pytest.raises(ValueError, match=r"tensor 1 .*got -5"):
        make_plan((1, -5), (True, True), **good)
    with pytest.raises(ValueError, match=rf"tensor 0 .*got {MAX_CHUNKS * CHUNK + 1}"):
        make_plan((MAX_CHUNKS * CHUNK + 1,), (True,), **good)
    with pytest.raises(ValueError, match="zigzag"):
        make_plan((1,), (True,), **good, order="zigzag")
    for name in ("chunk", "lag", "bytes_per_element", "window"):
        with pytest.raises(ValueError, match="at least"):
            make_plan((1,), (True,), **{**good, name: -1})


@pytest.mark.parametrize("order", ORDERS)
def test_item_words_of_many_tensors(order):
    """No more than one word per chunk and kind, whatever the number of tensors."""
    numels = [100] * 3000 + [100_000] * 500
    plan = plan_of(numels, room=400, lag=264, order=order, chunk=8192)
    assert plan.items.numel() == 3000 + 500 * 2 * 13 == plan.items.unique().numel()


def test_a_group_takes_no_more_than_the_lag_needs():
    """The 4 chunks that cover the lag, not the 10 that would fit the window as well."""
    items = listed(plan_of([n * CHUNK for n in (20, 10, 10, 4)], room=40, lag=4))
    assert [i for k, i, c in items if k == NORM and c == 0] == [0, 3, 1, 2]
