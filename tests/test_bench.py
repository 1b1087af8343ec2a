"""The measuring itself: peers against the reference, the gate, the timers, the host path."""

from __future__ import annotations

import csv
import functools
import gc
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, harness, peers, profiler, timers, tune
from bench.cases import DTYPES, Case, model_case, sweep_case
from bench.harness import COPY, GateError, Recorder, Truth, disagreement, measure
from bench.test_step_host import FOREACH, STUBBED, host_times, parameters, stubbed_launches
from bench.timers import Budget, CpuTimer, CudaTimer, interleave
from lars_fused import LARS, launch, tables

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
SHAPES = [("a", (7, 5)), ("a.bias", (7,)), ("b", (3, 4, 2)), ("c", (130, 9)), ("empty", (0, 3))]
SMALL = Case("small", "fp32", SHAPES)
PEERS = {
    **peers.EAGER,
    **peers.PORTABLE_LADDER,
    **peers.PROJECTS,
    "compiled foreach LARS": lambda i: peers.plain(
        i, foreach=True, compiled=True, compiler="eager"
    ),
    "compiled eager LARS": lambda i: peers.plain(i, compiled=True, compiler="eager"),
}


# ------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEERS)
def test_peer_agrees_with_the_reference(name, dtype):
    inputs = Case("small", dtype, SHAPES).inputs(CPU)
    given = [t.clone() for t in inputs.g]
    try:
        variant = PEERS[name](inputs)
    except (ImportError, RuntimeError) as error:
        if name in peers.EAGER or name in peers.OURS or "compiled" in name:
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    if variant.options is not None:
        # Not ours: fp32 norms and 16-bit arithmetic of eager PyTorch.
        exact = name == peers.PORTABLE
        assert disagreement(variant, Truth(inputs)) <= (
            1 if exact else 5 if dtype == "fp32" else 1e3
        )
    before = [t.clone() for t in variant.weights()]
    if variant.prepare:
        variant.prepare()
    variant.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, variant.weights(), strict=True)]
    assert moved == [t.numel() > 0 for t in inputs.w]
    for kept, g in zip(given, inputs.g, strict=True):
        assert torch.equal(kept, g)


@pytest.mark.interpret
@pytest.mark.parametrize("launches", [1, 2])
def test_ours_passes_the_gate(launches, backend):
    """In the interpreter's tier these are the kernels."""
    inputs = Case("small", "bf16, fp32 momentum", SHAPES).inputs(CPU)
    variant = peers.ours(inputs, launches, backend)
    assert disagreement(variant, Truth(inputs)) <= 1
    assert variant.step.__self__.backend == backend


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_gate_sees_every_term(field):
    inputs = SMALL.inputs(CPU)
    changed = {field: getattr(inputs.hyper, field) * 1.01}
    wrong = peers.Inputs(inputs.w, inputs.g, inputs.v, inputs.adapt, peers.Hyper(**changed))
    variant = peers.plain(wrong, foreach=True)
    variant.options = inputs.options()
    assert disagreement(variant, Truth(inputs)) > 10


def test_bytes_of_a_case():
    resnet = model_case("ResNet-50")
    assert resnet.least_bytes == 20 * resnet.n_params
    single = Case("one", "fp32", [("w", (10, 10))])
    assert single.two_pass_bytes == 2800
    assert Case("one", "fp32", [("b", (100,))]).two_pass_bytes == 2000  # nothing is read again
    assert Case("one", "bf16, fp32 momentum", [("w", (10, 10))]).least_bytes == 1400
    assert Case("one", "fp32, bf16 gradients", [("w", (10, 10))]).least_bytes == 1800
    for n in cases.SWEEP:
        assert sweep_case(n).n_params == pytest.approx(n, rel=0.03)


# ----------------------------------------------------------------------- gate and records


def recorder(folder: Path) -> Recorder:
    return Recorder(folder)


def test_a_wrong_step_of_ours_is_not_reported(tmp_path):
    def wrong(inputs):
        variant = peers.ours(inputs, backend="torch")
        right = variant.step
        variant.step = lambda: (right(), variant.weights()[3].data.mul_(1 + 3e-6))
        return variant

    with pytest.raises(GateError, match="portable, small, fp32"):
        measure(SMALL, CPU, {peers.PORTABLE: wrong}, recorder(tmp_path), rounds=2)
    assert not (tmp_path / "raw.csv").exists()
    from bench import environment, report

    assert "small, fp32" in environment.read(tmp_path)["gate"]
    assert environment.reportable(tmp_path)
    assert "nothing is reported" in report.markdown(tmp_path)
    assert report.write(tmp_path) == 1


def test_raw_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(Case, "copy_elements", lambda self, device: 1000)

    def broken(inputs):
        raise ImportError("no module named elsewhere")

    def disagrees(inputs):
        variant = peers.plain(inputs)
        variant.options = [o._replace(lr=0.4) for o in inputs.options()]
        return variant

    builders = {
        **peers.PORTABLE_LADDER, "broken": broken, "disagrees": disagrees,
        "eager LARS": peers.plain,
    }  # fmt: skip
    monkeypatch.setattr(harness, "timer_for", lambda device: CpuTimer(1 << 16))
    found = measure(SMALL, CPU, builders, recorder(tmp_path), rounds=6)
    assert found.absent["broken"] == "ImportError: no module named elsewhere"
    assert "GateError" in found.absent["disagrees"]
    with (tmp_path / "raw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    header = "case variant dtype n_tensors n_params bytes p25 p50 p75 unit kind"
    assert " ".join(rows[0]) == f"{header} gpu driver torch triton sha utc"
    assert [r["variant"] for r in rows] == [*peers.PORTABLE_LADDER, "eager LARS", COPY]
    for row in rows:
        assert 0 < float(row["p25"]) <= float(row["p50"]) <= float(row["p75"])
        assert (row["kind"], row["unit"], row["gpu"], row["n_tensors"]) == (
            "host",
            "us",
            "cpu",
            "5",
        )
        assert int(row["bytes"]) == (8000 if row["variant"] == COPY else 20 * SMALL.n_params)
    assert len({row["utc"] for row in rows}) == 1


def test_quartiles_by_hand():
    assert harness.quartiles([5, 1, 2, 4, 3]) == (2, 3, 4)
    assert harness.quartiles([7.0]) == (7, 7, 7)


# ------------------------------------------------------------------------------- timers


def test_interleaved_in_rotating_order():
    calls = []
    samplers = {name: functools.partial(lambda n: calls.append(n) or 1.0, name) for name in "abc"}
    taken = interleave(samplers, 4, math.inf)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(interleave(samplers, 100, 0.0, least=3)["a"]) == 3


class Gpu:
    """A queue that runs beside the host; microseconds."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.at = math.inf

            def record(self):
                self.at = max(gpu.device, gpu.host)

            def query(self):
                return self.at <= gpu.host

            def synchronize(self):
                gpu.wait()

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        cuda = timers.torch.cuda
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "_sleep", lambda cycles: self.run(cycles / 2000), raising=False)
        monkeypatch.setattr(cuda, "synchronize", lambda device=None: self.wait())
        properties = SimpleNamespace(L2_cache_size=4096)
        monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
        clock = SimpleNamespace(perf_counter_ns=lambda: self.host * 1e3)
        monkeypatch.setattr(timers, "time", clock)

    def run(self, us):
        self.device = max(self.device, self.host) + us

    def wait(self):
        self.host = max(self.host, self.device)

    def step(self, launches, launch_us, kernel_us):
        for _ in range(launches):
            self.host += launch_us
            self.run(kernel_us)


def test_gpu_time_does_not_hold_the_hosts(monkeypatch):
    gpu = Gpu(monkeypatch)
    timer = CudaTimer(CPU)
    assert timer.cycles_per_us == pytest.approx(2000)
    variant = peers.Variant(lambda: gpu.step(100, 5.0, 2.0), list)
    sample = timer.ready(variant)
    assert [sample() for _ in range(3)] == pytest.approx([200.0] * 3)
    assert not variant.host_bound


def test_a_late_host_is_noticed(monkeypatch):
    gpu = Gpu(monkeypatch)
    launch_us = [5.0]
    variant = peers.Variant(lambda: gpu.step(100, launch_us[0], 2.0), list)
    sample = CudaTimer(CPU).ready(variant)
    launch_us[0] = 40.0  # from now on eight times slower than when it was measured
    assert sample() == pytest.approx(200.0)
    assert not variant.host_bound


def test_a_step_that_waits_is_marked(monkeypatch):
    gpu = Gpu(monkeypatch)

    def step():
        gpu.step(1, 5.0, 2.0)
        gpu.wait()
        gpu.step(1, 5.0, 2.0)

    variant = peers.Variant(step, list)
    sample = CudaTimer(CPU).ready(variant)
    assert sample() >= 9
    assert variant.host_bound
    assert gpu.host < 200_000


def test_pytest_benchmark_is_handed_the_samples(tmp_path):
    suite = tmp_path / "test_it.py"
    suite.write_text("def test_it(replay):\n    replay([3.0, 1.0, 2.0])\n")
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "-p", "bench.conftest"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={output}", f"--rootdir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    import json

    report = json.loads(output.read_text())
    assert "node" not in report["machine_info"]
    assert report["benchmarks"][0]["stats"]["data"] == pytest.approx([3e-6, 1e-6, 2e-6])


# ---------------------------------------------------------------------- profile and tuning


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


# ---------------------------------------------------------------------------- host path


@pytest.fixture
def needs_triton():
    pytest.importorskip("triton", reason="without triton there is no launch to prepare")


def test_host_time_of_resnet50(needs_triton):
    found = host_times(None, rounds=150, calls=4, names=(FOREACH,))
    assert min(found[STUBBED]) <= 0.25 * min(found[FOREACH])


def test_host_time_grows_linearly(needs_triton):
    few = many = math.inf
    for _ in range(2):  # in turn, so that what else runs meets both
        few = min(few, *host_times(1000, 20, 1, ("none",), cold=True)[STUBBED])
        many = min(many, *host_times(10_000, 10, 1, ("none",), cold=True)[STUBBED])
    assert many <= 12 * few


def optimizer_of(count):
    params = parameters(count)
    return params, LARS(params, 0.1, backend="triton")


def test_nothing_grows_over_ten_thousand_steps(needs_triton):
    params, optimizer = optimizer_of(2)

    def steps(n):
        for i in range(n):
            if i % 7 == 0:
                optimizer.param_groups[0]["lr"] = 0.1 + 1e-6 * i
            params[i % 2].grad = torch.full((1, 1), 1.0)
            optimizer.step()

    with stubbed_launches() as made:
        steps(200)
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        tracemalloc.start()
        del made[:]
        steps(100)  # what is allocated in turn is then known to tracemalloc
        del made[:]
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        steps(10_000)
        assert made == ["lars_step"] * 10_000
        del made[:]
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 20_000  # two bytes a step
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors + 3


def test_uploads_only_what_changed(needs_triton, monkeypatch):
    params, optimizer = optimizer_of(40)
    uploads = []
    upload = tables.Work._upload
    monkeypatch.setattr(
        tables.Work, "_upload",
        lambda self, to, host: (uploads.append(tuple(host.shape)), upload(self, to, host))[1],
    )  # fmt: skip
    words = launch.kernels().tile.TENSOR_WORDS.value

    def uploads_of_a_step():
        del uploads[:]
        optimizer.step()
        return list(uploads)

    with stubbed_launches():
        uploads_of_a_step()
        assert uploads_of_a_step() == []
        kept = params[7].grad, params[9].grad
        params[7].grad, params[9].grad = (torch.randn_like(g) for g in kept)
        assert uploads_of_a_step() == [(3, words)]  # rows 7 to 9
        assert uploads_of_a_step() == []
        optimizer.param_groups[0]["lr"] = 0.2
        assert [shape[0] for shape in uploads_of_a_step()] == [1]  # the group's row
        assert uploads_of_a_step() == []


# ------------------------------------------------------------------------------ one command


def test_gpu_script_names_its_parts(tmp_path):
    script = Path(__file__).parent.parent / "ci" / "gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(script), "nothing"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "tests, bench, profile and tune" in done.stderr


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
