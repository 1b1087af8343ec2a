"""The sweep of launch constants: what it tries, in which order, and that it loses nothing."""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from bench import cases, environment, tune
from bench.budget import Budget
from bench.harness import GateError
from bench.supervise import Pieces
from bench.test_step_host import stubbed_launches
from tests import internals

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

L2 = 1 << 20
PRESENT = internals.kernels().tuning.ROWS["sm"]._replace(window=int(0.47 * L2))


def wished(row=PRESENT, **more):
    """A row of a class with more constants than today's."""
    fields = row._asdict() | more
    return namedtuple("Wished", fields)(**fields)


def swept(present, times, folder, seconds=60.0):
    """Run the search with made-up times."""
    tuner = SimpleNamespace(present=present, times=times, l2=L2, architecture="sm_80")
    results = tune.Results(folder / "tune.csv", present)
    lost = set(environment.read(folder).get("lost", {}))
    tune.search(tuner, Budget(seconds), results, Pieces(folder), lost)
    return results


def distance(row, best):
    return sum(a != b for a, b in zip(row, best, strict=True))


def test_it_finds_the_best_row_and_writes_each_result(tmp_path):
    best = tune.changed(PRESENT, evict="", programs=3, chunk=8192, poll_atomic=True)
    timed = []

    def times(row, rounds):
        timed.append((row, rounds))
        if row.num_warps == 8:
            raise RuntimeError("does not compile")
        ratio = 0.7 + 0.05 * distance(row, best)
        return ratio, {"ResNet-50": round(100 * ratio, 1)}

    results = swept(PRESENT, times, tmp_path)
    assert results.best(1)[0].row == best
    assert results.best(1)[0].rounds == tune.MANY
    with (tmp_path / "tune.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    compiled = [entry for entry in timed if entry[0].num_warps != 8]
    assert [int(line["rounds"]) for line in lines] == [rounds for _, rounds in compiled]
    assert len(set(timed)) == len(timed)
    again = tune.Results(tmp_path / "tune.csv", PRESENT)
    assert again.held == results.held  # what is read back is what was timed


def test_every_combination_of_what_decides_together_is_in_the_grid():
    row = wished(poll_load=False)
    rows = set(tune.grid(row, L2))
    assert all(tune.possible(r) for r in rows)
    names = ("order", "evict", "programs", "backoff", "poll_atomic", "poll_load")
    values = tune.swept(row, L2)
    seen = {tuple(getattr(r, name) for name in names) for r in rows}
    assert len(seen) == math.prod(len(values[name]) for name in names)
    assert {r.block for r in rows} == {1024, 2048, 4096}
    assert tune.grid(row, L2)[0] == row
    far = [distance(r, row) for r in tune.grid(row, L2)]
    assert far == sorted(far)
    for r in rows:  # all of its programs fit a multiprocessor
        assert r.programs * r.threads * r.step_registers <= tune.REGISTERS


def test_names_that_the_row_lacks_are_passed_over():
    fields = {n: v for n, v in PRESENT._asdict().items() if n != "backoff"}
    assert "backoff" not in tune.swept(namedtuple("Wished", fields)(**fields), L2)
    names = set(tune.swept(PRESENT, L2))
    assert {"order", "lag", "backoff", "evict", "block", "programs", "window", "chunk"} <= names
    assert {"poll_atomic"} <= names
    for row in [*tune.grid(PRESENT, L2), *tune.neighbours(PRESENT, L2)]:
        assert row.threads == 32 * row.num_warps


def test_a_second_call_goes_on_where_the_first_one_ended(tmp_path):
    timed = []

    def times(row, rounds):
        timed.append((row, rounds))
        if len(timed) == 7:
            raise KeyboardInterrupt
        return 0.7 + 0.01 * distance(row, PRESENT), {"ResNet-50": 100.0}

    with pytest.raises(KeyboardInterrupt):
        swept(PRESENT, times, tmp_path)
    # As the parent does for a piece in which the process ended.
    (lost,) = Pieces(tmp_path).unfinished()
    environment.note(tmp_path, lost={lost: "the process ended during it"})
    Pieces(tmp_path).path.unlink()
    swept(PRESENT, times, tmp_path)
    assert len(timed) > 40
    assert len(set(timed)) == len(timed)  # the six are read back, the seventh is lost


def test_the_grid_leaves_time_for_the_rest(tmp_path):
    clock = Budget(100.0)

    def times(row, rounds):
        clock.end -= rounds / 5
        return 0.9, {"ResNet-50": 100.0}

    tuner = SimpleNamespace(present=PRESENT, times=times, l2=L2, architecture="sm_80")
    results = tune.Results(tmp_path / "tune.csv", PRESENT)
    tune.search(tuner, clock, results, Pieces(tmp_path), set())
    rounds = [result.rounds for result in results.held.values()]
    assert rounds.count(tune.QUICK) > 20
    assert rounds.count(tune.USUAL) >= 3
    assert -tune.MANY / 5 <= clock.left < 20


def test_a_wrong_result_ends_the_sweep(tmp_path):
    def times(row, rounds):
        raise GateError("error 7 times its bound")

    with pytest.raises(GateError, match="7 times"):
        swept(PRESENT, times, tmp_path)
    assert Pieces(tmp_path).unfinished() == []


@pytest.fixture
def tuner(monkeypatch):
    """On a CPU, launches stubbed: only the times are made up."""
    tuning = internals.kernels().tuning
    monkeypatch.setattr(internals.launch, "why_not", lambda device: None)
    monkeypatch.setattr(tune, "disagreement", lambda variant, truth: variant.step() or 0.0)
    # As on a GPU: the window is a share of the L2.
    row = tuning.ROWS["interpreter"]._replace(window=None)
    monkeypatch.setitem(tuning.ROWS, "interpreter", row)
    timed = []

    def ready(variant):
        timed.append(variant)
        return lambda: 1.0 + len(timed) % 3

    small = cases.Case("ResNet-50", "fp32", [("layer", (3000, 2)), ("bias", (5,))])
    with stubbed_launches():
        yield tune.Tuner(torch.device("cpu"), [small], SimpleNamespace(ready=ready))


def test_the_tuner_times_every_row_beside_the_present_one(tuner, tmp_path):
    assert tuner.present.window == int(tuner.l2 * internals.kernels().tuning.WINDOW_SHARE)
    ratio, found = tuner.times(tune.changed(tuner.present, num_warps=8, programs=2), rounds=2)
    assert ratio > 0
    assert set(found) == {"ResNet-50", "ResNet-50, present row"}
    results = tune.Results(tmp_path / "tune.csv", tuner.present)
    tune.search(tuner, Budget(1.0), results, Pieces(tmp_path), set())
    assert any(row != tuner.present for row in results.held)
    assert all(math.isfinite(result.ratio) for result in results.held.values())


def test_a_row_is_launched_as_it_is_and_leaves_no_trace(tuner, monkeypatch):
    """Whichever kernel it is for, and whichever suits the list."""
    tuning = internals.kernels().tuning
    monkeypatch.setattr(internals.launch, "architecture", lambda device: ("sm_90", 4, L2))
    before = dict(tuning.ROWS), dict(tuning.RESIDENT_ROWS), dict(os.environ)
    tuner.architecture = "sm_90"
    (resident, *_) = tune.resident_rows("sm_90", PRESENT)
    rows = [tune.changed(PRESENT, chunk=8192, evict="", window=123), resident]
    for row, least in itertools.product(rows, (0, math.inf)):
        monkeypatch.setattr(tuning, "LEAST_FILLS", least)  # whether every list suits the rings
        variant = tuner._variant(row, 0)
        (work,) = internals.launches(variant.step.__self__)
        assert work.schedule.target.row == row
        assert work.schedule.target.kernel == ("lars_resident" if row is resident else "lars_step")
    assert before == (tuning.ROWS, tuning.RESIDENT_ROWS, os.environ)


def test_rows_of_the_resident_kernel_come_first_and_the_best_of_each_kernel_last(tmp_path):
    """And the faster kernel's row does not become the one around which the other is swept."""
    asked = []

    def times(row, rounds):
        asked.append((row, rounds))
        resident = 0.5 + 0.1 * abs(row.finishers - 2)
        return resident if row.order == "resident" else 1 - row.lag / 100, {}

    clock = Budget(60.0)
    tuner = SimpleNamespace(present=PRESENT, times=times, l2=L2, architecture="sm_90")
    results = tune.Results(tmp_path / "tune.csv", PRESENT)
    tune.search(tuner, clock, results, Pieces(tmp_path), set())
    (now, *near) = tune.resident_rows("sm_90", PRESENT)
    assert asked[: len(near) + 2] == [(row, tune.USUAL) for row in (PRESENT, now, *near)]
    assert all(tune.possible(row) for row in (now, *near))
    assert (now.finishers, now.backoff, now.programs) == (4, 200, 2)
    assert {tune.label(row, now) for row in near[:-1]} == {
        "finishers=2", "finishers=8", "backoff=0", "evict=''",
    }  # fmt: skip
    assert near[-1].programs == 1
    last = [row for row, rounds in asked if rounds == tune.MANY]
    assert [row.order == "resident" for row in last] == [False, False, False, True]
    assert last[0].lag == max(tune.VALUES["lag"])
    assert last[-1] == now._replace(finishers=2)
    rest = [row for row, _ in asked[len(near) + 2 : -1]]
    assert not any(row.order == "resident" for row in rest)
    assert tune.Results(tmp_path / "tune.csv", PRESENT).held == results.held


def test_an_architecture_without_a_row_for_it_has_none():
    assert tune.resident_rows("sm_80", PRESENT) == []
