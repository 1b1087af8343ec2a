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
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, harness, peers, test_step_gpu, timers, variants
from bench.cases import DTYPES, Case, model_case, slug, sweep_case
from bench.harness import COPY, GateError, Recorder, Truth, disagreement, measure
from bench.models import MODELS
from bench.test_step_host import (
    FOREACH,
    STUBBED,
    groups,
    host_times,
    parameters,
    stubbed_launches,
)
from bench.timers import CpuTimer, CudaTimer, interleave
from lars_fused import LARS
from lars_fused.kernels import layout
from tests import internals
from tests.prices import best_of, least_ratio, thread_time

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
SHAPES = [("a", (7, 5)), ("a.bias", (7,)), ("b", (3, 4, 2)), ("c", (130, 9)), ("empty", (0, 3))]
SMALL = Case("small", "fp32", SHAPES)
PEERS = {
    **peers.EAGER,
    **peers.PORTABLE_LADDER,
    **peers.PROJECTS,
    **peers.CPU_PROJECTS,
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
        # Others: fp32 norms and 16-bit arithmetic of eager PyTorch.
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


@pytest.fixture
def small_sm_90(monkeypatch):
    """A GPU of four multiprocessors, launches stubbed, and a list that suits its rings."""
    pytest.importorskip("triton")
    monkeypatch.setattr(internals.launch, "architecture", lambda device: ("sm_90", 4, 1 << 24))
    with stubbed_launches() as made:
        yield made, Case("small", "fp32", [(f"layer{i}", (200, 200)) for i in range(3)])


@pytest.mark.parametrize(
    ("name", "suits", "kernels"),
    [
        (peers.ONE, True, ["lars_resident"]),
        (peers.ONE, False, ["lars_step"]),
        (peers.CACHED, True, ["lars_step"]),
        (peers.TWO, True, ["l2norm", "lars_update"]),
    ],
)
def test_what_each_variant_of_ours_launches(name, suits, kernels, small_sm_90, monkeypatch):
    tuning = internals.kernels().tuning
    made, case = small_sm_90
    if not suits:
        monkeypatch.setattr(tuning, "LEAST_FILLS", 3)
    variant = peers.LADDER[name](case.inputs(CPU))
    for _ in range(2):
        variant.step()
    assert made == 2 * kernels
    (work,) = internals.launches(variant.step.__self__)
    resident = kernels == ["lars_resident"]
    row = tuning.resident_row_for("sm_90") if resident else tuning.row_for("sm_90")
    assert work.schedule.target.row == row


def test_what_holding_on_chip_gains_is_timed_on_whole_models_in_fp32_alone():
    assert [*peers.LADDER] == [peers.FLOOR, peers.ONE, peers.CACHED, peers.TWO]
    assert peers.CACHED not in peers.CPU_LADDER
    beside = {run.label for run in test_step_gpu.RUNS if peers.CACHED in run.builders}
    assert {"first-resnet50-fp32", "first-vitb16-fp32"} <= beside
    models = {slug(name) for name in MODELS}
    assert {tuple(label.split("-")[1:]) for label in beside} <= {(m, "fp32") for m in models}
    for run in test_step_gpu.RUNS:
        assert {peers.FLOOR, peers.ONE} <= {*run.builders}  # ratios are taken within one run


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_gate_sees_every_term(field):
    inputs = SMALL.inputs(CPU)
    changed = {field: getattr(inputs.hyper, field) * 1.01}
    wrong = variants.Inputs(inputs.w, inputs.g, inputs.v, inputs.adapt, variants.Hyper(**changed))
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
    variant = variants.Variant(lambda: gpu.step(100, 5.0, 2.0), list)
    sample = timer.ready(variant)
    assert [sample() for _ in range(3)] == pytest.approx([200.0] * 3)
    assert not variant.host_bound


def test_a_late_host_is_noticed(monkeypatch):
    gpu = Gpu(monkeypatch)
    launch_us = [5.0]
    variant = variants.Variant(lambda: gpu.step(100, launch_us[0], 2.0), list)
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

    variant = variants.Variant(step, list)
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
    # A worker of xdist says so to its children, in whom pytest-benchmark then does nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    import json

    report = json.loads(output.read_text())
    assert "node" not in report["machine_info"]
    assert report["benchmarks"][0]["stats"]["data"] == pytest.approx([3e-6, 1e-6, 2e-6])


# ---------------------------------------------------------------------------- host path


@pytest.fixture
def needs_triton():
    pytest.importorskip("triton", reason="without triton there is no launch to prepare")


def test_host_time_of_resnet50(needs_triton):
    def best():
        found = host_times(None, rounds=50, calls=4, names=(FOREACH,))
        return min(found[STUBBED]), min(found[FOREACH])

    assert least_ratio(0.25, best) <= 0.25


def test_host_time_grows_linearly(needs_triton):
    """Each step behind cold caches, so that few tensors have no advantage over many."""
    other, counts = torch.zeros(1 << 24), (10_000, 1000)

    def sample(step):
        other.add_(1)
        return thread_time(step)

    with stubbed_launches():
        steps = [
            LARS(groups(parameters(n), adapt=False), 0.1, backend="triton").step for n in counts
        ]
        for step in steps:
            for _ in range(3):
                step()
        best = functools.partial(best_of, 10, *(functools.partial(sample, step) for step in steps))
        assert least_ratio(12.0, best) <= 12.0


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
        held = []
        for n in (2_000, 4_000, 4_000, 4_000):
            steps(n)
            assert made == ["lars_step"] * n
            del made[:]
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    # A leak grows in every stretch: an object every seventh step is 14 KB. What Python allocated
    # before the tracing, and allocates anew in turn, is 3 to 20 KB now and then.
    grown = [after - before for before, after in pairwise(held)]
    assert min(grown) < 8_000  # two bytes a step
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors + 3


def test_uploads_only_what_changed(needs_triton, monkeypatch):
    params, optimizer = optimizer_of(40)
    uploads = internals.record_uploads(monkeypatch)
    words = layout.TENSOR_WORDS

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
