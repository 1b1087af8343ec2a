"""The traffic model against cases worked by hand, and the predictions that were promised."""

from __future__ import annotations

import csv

import pytest
import torch
from lars_fused.kernels import tuning

from bench.cache_model import GPUS, Cache, simulate
from bench.traffic import Choice, main, predict
from lars_fused.plan import BOTH, NORM, UPDATE, Plan, make_plan, pack_item

pytestmark = pytest.mark.cpu

CHUNK = 4096


def plan_by_hand(items: list[tuple[int, int, int]]) -> Plan:
    return Plan(torch.tensor([pack_item(*item) for item in items]), (), 0, 1)


def two_passes(chunks: int) -> Plan:
    return plan_by_hand([(kind, 0, c) for kind in (NORM, UPDATE) for c in range(chunks)])


def test_cache_by_hand():
    cache = Cache(30)
    cache.touch(1, 10)
    cache.touch(2, 10, write=True)  # a full-line write fetches nothing
    cache.touch(3, 10)
    assert (cache.read, cache.written) == (20, 0)
    cache.touch(1, 10)  # a hit, and now 2 is the oldest
    cache.touch(4, 10)
    assert (cache.read, cache.written) == (30, 10)
    cache.touch(1, 10)
    assert cache.read == 30
    cache.touch(3, 10, early=True)  # the most recent, but marked to leave first
    cache.touch(5, 10)
    cache.touch(4, 10)
    assert cache.read == 40
    cache.touch(3, 10, write=True)
    cache.flush()
    assert (cache.read, cache.written, cache.used) == (40, 20, 0)


def test_a_dirty_line_stays_dirty_when_read():
    cache = Cache(10)
    cache.touch(1, 10, write=True)
    cache.touch(1, 10)
    cache.touch(2, 10)
    assert cache.written == 10


@pytest.mark.parametrize("order", ["grouped", "sliding"])
@pytest.mark.parametrize("programs", [1, 7])
def test_what_fits_costs_twenty(order, programs):
    """12 bytes read (w, g, v), 8 written (w, v), to the byte, tails included."""
    numels = [20 * CHUNK + 5, 3 * CHUNK - 1, CHUNK, 7, 0]
    plan = make_plan(
        numels, [True] * 5, chunk=CHUNK, window=10**9, in_flight=3, bytes_per_element=8, order=order
    )
    traffic = simulate(plan, numels, chunk=CHUNK, programs=programs, capacity=10**9)
    assert (traffic.read, traffic.written) == (12 * sum(numels), 8 * sum(numels))
    assert traffic.per_parameter == 20


def test_two_passes_cost_twenty_eight():
    """Forwards twice through more than the cache holds: nothing is ever found again."""
    numel, capacity = 256 * CHUNK, 50 * CHUNK * 12
    traffic = simulate(two_passes(256), [numel], chunk=CHUNK, programs=4, capacity=capacity)
    assert (traffic.read, traffic.written) == (20 * numel, 8 * numel)


def test_single_pass_costs_twenty():
    """One program's chunk is all that has to stay between norm and update."""
    numel = 256 * CHUNK
    plan = plan_by_hand([(BOTH, 0, c) for c in range(256)])
    traffic = simulate(plan, [numel], chunk=CHUNK, programs=4, capacity=6 * CHUNK * 12)
    assert traffic.per_parameter == 20


@pytest.mark.parametrize(("evict_first", "bytes_between"), [(False, 12), (True, 8)])
def test_backwards_saves_what_is_still_cached(evict_first, bytes_between):
    """28 less the 8 bytes of w and g of the last d elements, where d fill the cache.

    Between the two reads of an element lie w and g of what came after it and, unless they leave
    first, their v.
    """
    numel, capacity = 1000 * CHUNK, 100 * CHUNK * 12
    plan = make_plan(
        [numel], [True], chunk=CHUNK, window=capacity, in_flight=4, bytes_per_element=8
    )
    traffic = simulate(
        plan, [numel], chunk=CHUNK, programs=4, capacity=capacity, evict_first=evict_first
    )
    by_hand = 28 - 8 * (capacity / bytes_between) / numel
    assert traffic.per_parameter == pytest.approx(by_hand, abs=0.05)


def test_one_hundred_million_elements():
    by_hand = 28 - 8 * (GPUS["H200"].capacity / 12) / 1e8
    predicted = predict("one 100M tensor", GPUS["H200"], Choice()).per_parameter
    assert predicted == pytest.approx(by_hand, abs=0.02)


def test_bytes_follow_the_element_sizes():
    """bf16 w and g, fp32 v: 2 + 2 + 4 read, 2 + 4 written."""
    numel = 10 * CHUNK
    traffic = simulate(
        two_passes(10), [numel], chunk=CHUNK, programs=2, capacity=10**9, sizes=(2, 2, 4)
    )
    assert traffic.per_parameter == 14


def test_too_many_programs_thrash():
    """Chunks in flight beyond the cache: the reason why chunk and programs are chosen together."""
    h200 = GPUS["H200"]
    assert predict("ResNet-50", h200, Choice(chunk=16384)).per_parameter > 27


def test_an_update_before_its_norms_is_found():
    plan = plan_by_hand([(UPDATE, 0, 0), (UPDATE, 0, 1), (NORM, 0, 0), (NORM, 0, 1)])
    with pytest.raises(RuntimeError, match="waits for itself"):
        simulate(plan, [2 * CHUNK], chunk=CHUNK, programs=2, capacity=10**9)


def test_time_is_bounded_by_bytes_and_latency():
    numel = 1000 * CHUNK
    plan = two_passes(1000)
    slow, fast = (
        simulate(plan, [numel], chunk=CHUNK, programs=p, capacity=10**9) for p in (1, 528)
    )
    # Norms from DRAM, updates from L2 (12 bytes read), then 8 dirty bytes back to DRAM.
    by_hand = numel * (8 / 4.3e6 + 12 / 9.7e6 + 8 / 4.3e6)
    assert by_hand < fast.us < by_hand + 3 * (1.2 + 1 + 2 * 0.75)
    assert slow.us > 2000 * (1.2 + 2 * 0.75), "one program pays each item's latency in full"


@pytest.mark.parametrize(
    ("model", "bound"), [("ResNet-50", 20.5), ("ViT-B/16", 20.5), ("AlexNet", 26.5)]
)
def test_predictions_on_h200(model, bound):
    choice = Choice()
    assert choice.in_flight_bytes >= 33_000
    assert 20 <= predict(model, GPUS["H200"], choice).per_parameter <= bound


def test_table_says_that_it_is_a_prediction(tmp_path, capsys):
    output = tmp_path / "prediction.csv"
    main(["--model", "GoogLeNet", "--gpu", "A100", "--output", str(output)])
    lines = output.read_text().splitlines()
    assert lines[0].startswith("# PREDICTION")
    assert "commit" in lines[1]
    assert "--model GoogLeNet" in lines[2]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(row["model"], row["gpu"]) for row in rows] == [("GoogLeNet", "A100")]
    assert 20 <= float(rows[0]["bytes_per_parameter"]) <= 28
    assert "PREDICTION" in capsys.readouterr().out


def test_the_model_predicts_for_the_constants_that_are_launched():
    row, choice = tuning.row_for("sm_90"), Choice()
    assert (row.chunk, row.programs, row.window) == (choice.chunk, choice.per_sm, None)
    assert choice.window == tuning.WINDOW_SHARE
