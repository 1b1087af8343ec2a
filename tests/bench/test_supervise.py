"""Runs that go on past what hangs, dies or runs out of memory, and whose time is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import environment, harness, test_step_gpu
from bench.budget import END_VARIABLE, Budget
from bench.supervise import FILE, Pieces, supervised

pytestmark = pytest.mark.cpu

ROOT = Path(environment.ROOT)
# Pieces a, b and c; b ends as told. PyDLL keeps the interpreter's lock, as a hung driver call may.
CHILD = """
import ctypes, os, signal, sys
from pathlib import Path
from bench.budget import Budget
from bench.supervise import Fault, Pieces

def hang():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(20)

def fault():
    raise Fault("no answer")

def error():
    raise ValueError("told")

folder, how = Path(sys.argv[1]), sys.argv[2]
pieces, budget = Pieces(folder), Budget.inherited()
for name in "abc":
    if name in pieces.begun():
        continue
    with pieces.piece(name, 0.5 if (name, how) == ("b", "hang") else 30.0, budget):
        (folder / name).touch()
        if name == "b":
            {"hang": hang, "fault": fault, "abort": os.abort, "error": error}[how]()
"""


@pytest.mark.parametrize("how", ["hang", "fault", "abort"])
def test_a_run_goes_on_past_a_lost_piece(tmp_path, how, capfd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    status = supervised(
        [sys.executable, "-c", CHILD, str(tmp_path), how], tmp_path, Budget(60), env
    )
    assert status == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "environment.json"]
    lost = environment.read(tmp_path)["lost"]
    assert list(lost) == ["b"]
    assert "the process ended during it" in lost["b"]
    if how == "hang":
        assert 'File "<string>", line 9 in hang' in capfd.readouterr().err  # where it hung


def test_an_error_is_the_end_of_a_run_and_no_loss(tmp_path):
    """A wrong result ends the tuner: it must not be started again behind it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), "error"]
    assert supervised(command, tmp_path, Budget(60), env) == 1
    assert not (tmp_path / "c").exists()
    assert environment.read(tmp_path) == {}


def test_no_restart_after_the_time_is_up(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path), "abort"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert supervised(command, tmp_path, Budget(0.0), env) == 1
    assert not (tmp_path / "c").exists()


def test_the_budget_counts_from_the_start_of_the_run(monkeypatch):
    """The child's imports are part of the time: its budget ends when the parent's does."""
    parent = Budget(100.0)
    for name, value in parent.environment().items():
        monkeypatch.setenv(name, value)
    assert Budget.inherited().end == parent.end
    done = subprocess.run(
        [sys.executable, "-c", "from bench.budget import Budget; print(Budget.inherited().end)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(parent.end)
    monkeypatch.delenv(END_VARIABLE)
    assert Budget.inherited().left == float("inf")


# -------------------------------------------------------------------- the cases of a bench


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    recorder = harness.Recorder(tmp_path)
    return test_step_gpu.Asked(torch.device("cpu"), recorder, Budget(60), Pieces(tmp_path))


def a_run(label="case"):
    return test_step_gpu.Run(label, lambda: None, {})


def test_a_case_out_of_memory_is_built_once_and_the_next_one_runs(asked, monkeypatch, tmp_path):
    built = []

    def measure(case, *rest):
        built.append(case)
        if len(built) == 1:
            raise torch.cuda.OutOfMemoryError("tried to allocate 8 GiB")
        return harness.Measured()

    monkeypatch.setattr(test_step_gpu, "measure", measure)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="8 GiB") as caught:
            asked(a_run())
        frames = [entry.name for entry in caught.traceback]
        assert "measure" not in frames  # whose locals would keep the tensors of the case
    assert len(built) == 1
    assert asked(a_run("next")) == harness.Measured()
    assert "8 GiB" in environment.read(tmp_path)["lost"]["case"]
    assert Pieces(tmp_path).unfinished() == []


def test_after_a_fault_the_process_ends_and_another_goes_on(asked, monkeypatch, tmp_path):
    def fault(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(test_step_gpu, "measure", fault)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        asked(a_run())
    assert Pieces(tmp_path).unfinished() == ["case"]
    again = test_step_gpu.Asked(asked.device, asked.recorder, asked.budget, Pieces(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="before this one"):
        again(a_run())


def test_what_does_not_fit_in_the_time_is_left(asked):
    asked.budget = Budget(5.0)
    with pytest.raises(pytest.skip.Exception, match="time is up"):
        asked(a_run()._replace(seconds=10.0))
    assert asked.pieces.path.name == FILE


def test_what_matters_most_is_measured_first_and_compiled_peers_last():
    kinds = [run.label.split("-")[0] for run in test_step_gpu.RUNS]
    assert kinds[:2] == ["first", "first"]
    assert set(kinds[kinds.index("compiled") :]) == {"compiled"}
    assert set(kinds) == {"first", "case", "peers", "compiled"}
    labels = [run.label for run in test_step_gpu.RUNS]
    assert len(set(labels)) == len(labels)
    for run in test_step_gpu.RUNS:  # every ratio is taken within one run
        assert {test_step_gpu.FLOOR, test_step_gpu.ONE} <= set(run.builders)
    jax = [run for run in test_step_gpu.RUNS if test_step_gpu._JAX in run.builders]
    assert all(len(run.builders) == 3 for run in jax)
