"""What a GPU run does besides timing: the profiler's counts, the sweep of constants, its script."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, environment, peers, profiler, tune
from bench.harness import GateError
from bench.test_step_host import stubbed_launches
from bench.timers import Budget
from lars_fused import LARS, launch, tables

pytestmark = pytest.mark.cpu


def ncu_lines(kernels, unit="byte"):
    yield "==PROF== Connected"
    yield '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    for i, (name, read, written) in enumerate(kernels):
        yield f'"{i}","{name}","dram__bytes_read.sum","{unit}","{read:,}"'
        yield f'"{i}","{name}","dram__bytes_write.sum","{unit}","{written:,}"'


def test_dram_bytes_from_ncu():
    n = profiler.STEPS
    kernels = [("lars_step", 12_000, 8_000)] * n + [
        ("l2norm", 8_000, 0),
        ("lars_update", 12_000, 8_000),
    ] * n
    kernels += [("void at::native::multi_tensor_apply_kernel<...>", 6_000, 4_000)] * 2 * n
    kernels += [("lars_step", 24_000, 16_000)] * n
    plan = [("A", peers.ONE), ("A", peers.TWO), ("A", peers.FLOOR), ("B", peers.ONE)]
    found = profiler.dram_bytes(ncu_lines(kernels), plan)
    assert found == {plan[0]: 20_000, plan[1]: 28_000, plan[2]: 20_000, plan[3]: 40_000}
    with pytest.raises(ValueError, match="expected"):
        profiler.dram_bytes(ncu_lines(kernels[::-1]), plan)
    with pytest.raises(ValueError, match="Mbyte"):
        profiler.dram_bytes(ncu_lines(kernels, "Mbyte"), plan)
    assert profiler.dram_bytes(["==ERROR== nothing"], plan) == {}


def test_counts_from_the_profiler():
    n, gpu, cpu = profiler.STEPS, torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, device, start=5.0, end=6.0):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    events = [event("lars_fused steps", cpu, 0.0, 100.0), event("lars_fused steps", gpu)]
    events += [event("Optimizer.step#LARS.step", gpu), event("lars_step", gpu)] * n
    assert profiler.counts(events) == (1, 0, 0)
    events += [event("cudaDeviceSynchronize", cpu, 101.0, 102.0)]  # the profiler's own
    assert profiler.counts(events) == (1, 0, 0)
    events += [event("Memcpy HtoD (Pinned -> Device)", gpu)] * 2 * n
    events += [event("cudaStreamSynchronize", cpu)] * n
    assert profiler.counts(events) == (1, 2, 1)


def test_tuning_finds_the_best_and_leaves_no_trace(tmp_path, monkeypatch):
    present = tune.Candidate(4096, 2048, 4, 96, 4, 0.47, "evict_first", "grouped")
    best = present._replace(chunk=8192, programs=3, order="sliding")

    def times(candidate):
        if candidate.num_warps == 8:
            raise RuntimeError("does not compile")
        wrong = sum(a != b for a, b in zip(candidate, best, strict=True))
        return 0.7 + 0.1 * wrong, {"ResNet-50": 100 * (0.7 + 0.1 * wrong)}

    results = tune.search(SimpleNamespace(present=present, times=times), Budget())
    assert results[0][1] == best
    tune.write(tmp_path / "tune.csv", results)
    assert "does not" not in (tmp_path / "tune.csv").read_text()

    pytest.importorskip("triton")
    rows = launch.kernels().tuning.ROWS
    before, make = dict(rows), tables.make_plan
    monkeypatch.setattr(launch, "why_not", lambda device: None)
    with tune.used(present, "interpreter", 1 << 20), stubbed_launches():
        assert launch.kernels().tuning.row_for("interpreter").window == int(0.47 * (1 << 20))
        p = torch.nn.Parameter(torch.ones(10_000, 2))
        p.grad = torch.ones_like(p)
        optimizer = LARS([p], backend="triton")
        optimizer.step()
    ((_, work),) = optimizer._last.stepper.parts
    assert (work.row.chunk, work.row.evict) == (4096, "evict_first")
    assert rows == before
    assert tables.make_plan is make


def test_gpu_script_names_its_parts(tmp_path):
    script = Path(__file__).parent.parent / "ci" / "gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(script), "nothing"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "tests, bench, profile and tune" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_script_goes_no_further_than_a_step_that_fails(tmp_path):
    script = Path(__file__).parent.parent / "ci" / "gpu.sh"
    given = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(script), "tests"], env=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "-- smoke:" in done.stdout
    assert "-- tests:" not in done.stdout


def test_the_tuner_times_every_candidate_beside_the_row(monkeypatch, tmp_path):
    """The whole search on a CPU, launches stubbed: only the times are made up."""
    pytest.importorskip("triton")
    tuning = launch.kernels().tuning
    monkeypatch.setattr(launch, "why_not", lambda device: None)
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
        tuner = tune.Tuner(torch.device("cpu"), [small], SimpleNamespace(ready=ready))
        present = tuner.present
        assert present.window == tuning.WINDOW_SHARE
        assert tune.row_of(present, row, tuner.l2)._replace(window=None) == row
        ratio, found = tuner.times(present._replace(num_warps=8, programs=2), rounds=2)
        results = tune.search(tuner, Budget(1.0))
    assert ratio > 0
    assert set(found) == {"ResNet-50", "ResNet-50, present row"}
    assert any(c != present for _, c, _ in results)
    assert all(math.isfinite(r) for r, _, _ in results)
    tune.write(tmp_path / "tune.csv", results)
    assert "registers" in (tmp_path / "tune.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("seen", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_profiler_that_saw_nothing_counts_nothing(monkeypatch, tmp_path, seen):
    """No launch at all is a blind profiler, and not a step that launches nothing."""

    def no_ncu(budget):
        raise RuntimeError("ncu is not installed")

    monkeypatch.setattr(profiler, "_ready", lambda model, name: None)
    monkeypatch.setattr(profiler, "count", lambda variant: seen)
    monkeypatch.setattr(profiler, "_run_ncu", no_ncu)
    assert profiler.main(tmp_path, 1.0) == 0
    absent = environment.read(tmp_path)["absent"]
    raw = tmp_path / "raw.csv"
    rows = list(csv.DictReader(raw.open())) if raw.exists() else []
    assert absent[profiler.DRAM] == "RuntimeError: ncu is not installed"
    assert len(rows) == (9 if seen[0] else 0)
    assert len(absent) == (1 if seen[0] else 1 + len(profiler.ORDER))


def test_a_wrong_result_ends_the_sweep():
    present = tune.Candidate(4096, 2048, 4, 96, 4, 0.47, "evict_first", "grouped")

    def times(candidate):
        raise GateError("error 7 times its bound")

    with pytest.raises(GateError, match="7 times"):
        tune.search(SimpleNamespace(present=present, times=times), Budget())
