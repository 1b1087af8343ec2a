"""A kernel that waits to be measured: what it may not disturb, and the part that measures it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from bench import candidate, environment, harness, peers, profiler, small_step, test_step_gpu
from bench.budget import Budget
from bench.cases import Case
from bench.peers import FLOOR, HELD, ONE
from lars_fused._engine import launch
from lars_fused.kernels import tuning
from tests import internals
from tests.kernels import test_resident

pytestmark = pytest.mark.cpu


@pytest.fixture
def on(monkeypatch):
    """As on a GPU of some architecture."""

    def on(architecture):
        monkeypatch.setattr(launch, "architecture", lambda device: (architecture, 132, 0))

    return on


@pytest.fixture
def done(monkeypatch, tmp_path):
    """What the part does, in order; its tests end as `done.tests` says."""
    seen = SimpleNamespace(tests=0, names=[])

    def status(command):
        assert command[-2:] == ["ci/test.py", "candidate"]
        seen.names.append("tests")
        return seen.tests

    def note(what):
        return lambda *args, **_: seen.names.append(what) or "clean"

    monkeypatch.setattr(candidate, "_status", status)
    monkeypatch.setattr(candidate, "measure", lambda case, *_, **__: seen.names.append(case.name))
    monkeypatch.setattr(candidate.profiler, "count_step", note("count"))
    monkeypatch.setattr(candidate.profiler, "weigh", note("weigh"))
    monkeypatch.setattr(candidate.sanitizer, "check", note("check"))
    return seen


def test_no_figure_of_the_launched_kernels_waits_for_it():
    assert HELD not in peers.LADDER
    assert HELD not in profiler.ORDER
    assert not any(HELD in run.builders for run in test_step_gpu.RUNS)
    assert [*candidate.BESIDE] == [FLOOR, ONE, HELD]


def test_its_tests_are_no_tests_of_the_gpu_tier():
    """One that fails there would keep every figure of the run from being quoted."""
    for function in vars(test_resident).values():
        marks = {mark.name for mark in getattr(function, "pytestmark", [])}
        assert "gpu" not in marks or test_resident.pytestmark.name == "candidate"


def test_where_none_waits_there_is_nothing_to_do(on, done, tmp_path, capsys):
    on("sm_80")
    assert candidate.main(tmp_path, Budget(60)) == 0
    assert "no row for sm_80 waits" in capsys.readouterr().out
    assert done.names == []
    assert environment.read(tmp_path) == {}


def test_it_is_tested_then_timed_then_weighed(on, done, tmp_path):
    on("sm_90")
    assert candidate.main(tmp_path, Budget(60)) == 0
    assert done.names == ["tests", *candidate.MODELS, "count", "weigh", "check", "check"]
    noted = environment.read(tmp_path)["candidate"]
    assert noted == {"tests": "passed", "memcheck": "clean", "racecheck": "clean"}


@pytest.mark.parametrize("hung", [False, True])
def test_what_has_not_passed_its_tests_is_not_timed(on, done, monkeypatch, tmp_path, hung):
    on("sm_90")
    done.tests = 1
    if hung:  # in a folder of an earlier call, and the process before this one was ended
        environment.note(tmp_path, candidate={"tests": candidate.PASSED})
        monkeypatch.setattr(candidate, "_status", lambda command: sys.exit(1))
        with pytest.raises(SystemExit):
            candidate.main(tmp_path, Budget(60))
    assert candidate.main(tmp_path, Budget(60)) == 1
    assert done.names == ([] if hung else ["tests"])
    noted = environment.read(tmp_path).get("candidate", {})
    assert noted == {"tests": "begun" if hung else "failed, exit status 1"}
    environment.note(tmp_path, sha="0", dirty=False, gpu="cpu")
    assert environment.reportable(tmp_path) is None


def test_a_wrong_step_is_noted_and_keeps_nobody_from_being_quoted(on, monkeypatch, tmp_path):
    on("sm_90")
    monkeypatch.setattr(candidate, "_test", lambda folder: environment.note(
        folder, candidate={"tests": candidate.PASSED}))  # fmt: skip
    small = Case("small", "fp32", [("layer", (30, 2))])
    monkeypatch.setattr(candidate, "model_case", lambda model: small)

    def wrong(inputs):
        variant = peers.ours(inputs, backend="torch")
        variant.options = [o._replace(lr=2 * o.lr) for o in variant.options]
        return variant

    monkeypatch.setattr(candidate, "BESIDE", {FLOOR: peers.sgd_fused, HELD: wrong})
    with pytest.raises(harness.GateError, match="times its bound"):
        candidate.main(tmp_path, Budget(60), "cpu")
    environment.note(tmp_path, sha="0", dirty=False, gpu="cpu")
    assert "GateError" in environment.read(tmp_path)["candidate"]["candidate: ResNet-50"]
    assert environment.reportable(tmp_path) is None


def test_the_small_step_takes_its_row_and_leaves_no_trace(on, monkeypatch):
    on("sm_90")
    seen, rows = [], internals.kernels().tuning.ROWS
    before = dict(rows)

    def after_two_steps(device, backend, launches, chunk):
        seen.append((tuning.row_for("sm_90").order, launches, chunk))
        return torch.zeros(1)

    monkeypatch.setattr(small_step, "after_two_steps", after_two_steps)
    small_step.main("cpu", "torch", candidate=True)
    chunk = tuning.CANDIDATES["sm_9"].chunk
    assert seen[1:] == [("resident", 1, chunk), ("resident", 2, chunk)]
    assert rows == before
    on("sm_80")
    with pytest.raises(SystemExit, match="no row for sm_80"):
        small_step.main("cpu", "torch", candidate=True)
