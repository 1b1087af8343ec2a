"""What a GPU run counts: launches, copies, waits, bytes of DRAM; what the sanitizer says."""

from __future__ import annotations

import csv
import time
from types import SimpleNamespace

import pytest
import torch

from bench import environment, peers, profiler, sanitizer
from bench.budget import Budget

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


def test_dram_bytes_where_two_variants_run_the_same_kernel():
    """Of one model after the other, and where a plan has a single variant."""
    n = profiler.STEPS
    kernels = [("lars_resident", 12, 8)] * n + [("lars_step", 14, 8)] * n
    kernels += [("lars_step", 20, 8)] * n + [("lars_step", 21, 8)] * n
    plan = [(model, name) for model in "AB" for name in (peers.ONE, peers.CACHED)]
    found = profiler.dram_bytes(ncu_lines(kernels), plan)
    assert found == dict(zip(plan, (20, 22, 28, 29), strict=True))
    alone = [("A", peers.ONE), ("B", peers.ONE)]
    found = profiler.dram_bytes(ncu_lines([*kernels[:n], *kernels[2 * n : 3 * n]]), alone)
    assert found == dict(zip(alone, (20, 28), strict=True))
    with pytest.raises(ValueError, match="expected"):  # one launch more
        profiler.dram_bytes(ncu_lines([("lars_step", 1, 1)] * (2 * n + 1)), alone)


def test_remarks_of_ncu_between_and_after_its_rows():
    plan = [("A", peers.ONE)]
    lines = list(ncu_lines([("lars_step", 12_000, 8_000)] * profiler.STEPS))
    whole = [*lines[:4], "==PROF== Target process 17 terminated", "", *lines[4:]]
    whole += ["==PROF== Disconnected from process 17", "==WARNING== No kernels, were profiled"]
    assert profiler.dram_bytes(whole, plan) == {plan[0]: 20_000}
    cut = [*lines, '"9","lars_step","dram__by']  # it was ended in the middle of a line
    assert profiler.dram_bytes(cut, plan) == {plan[0]: 20_000}


NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
rows="$(dirname "$0")/rows"
{how}
"""


@pytest.mark.parametrize("how", ["ok", "hang", "refused"])
def test_ncu_ends_within_its_time_and_leaves_what_it_printed(how, tmp_path, monkeypatch):
    kernels = [("lars_step", 12_000, 8_000)] * profiler.STEPS
    kernels += [("void multi_tensor_apply_kernel<...>", 6_000, 4_000)] * 2 * profiler.STEPS
    rows = "\n".join([*ncu_lines(kernels), "==PROF== Disconnected\n"])
    (tmp_path / "rows").write_text(rows)
    how_it_ends = {
        "ok": 'cp "$rows" "$2"',
        "hang": 'cp "$rows" "$2"; trap "" INT TERM; sleep 300',
        "refused": "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1",
    }
    stub = tmp_path / "ncu"
    stub.write_text(NCU.replace("{how}", how_it_ends[how]))
    stub.chmod(0o755)
    monkeypatch.setattr(profiler, "tool", lambda name: str(stub))
    monkeypatch.setattr(profiler, "MODELS", ("A",))
    names = (peers.ONE, peers.FLOOR)
    start = time.monotonic()
    if how == "refused":
        with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
            profiler.run_ncu(names, tmp_path, Budget(20))
        return
    found = profiler.run_ncu(names, tmp_path, Budget(20 if how == "ok" else 10))
    assert time.monotonic() - start < 100  # the stub hangs for 300
    assert (tmp_path / "ncu.csv").read_text() == rows
    # What was going on when it was ended may not be whole.
    last = {("A", peers.FLOOR): 20_000} if how == "ok" else {}
    assert found == {("A", peers.ONE): 20_000, **last}


MEMCHECK = """========= COMPUTE-SANITIZER
two small steps agree with the portable path, in one launch and in two
========= ERROR SUMMARY: {n} errors
"""
RACECHECK = "========= RACECHECK SUMMARY: {n} hazards displayed ({n} errors, 0 warnings)\n"
UNSUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the documentation
========= Target application returned an error
"""


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, MEMCHECK.format(n=0), "clean"),
        (0, RACECHECK.format(n=0), "clean"),
        (sanitizer.FOUND, MEMCHECK.format(n=3), "errors: 3"),
        (0, RACECHECK.format(n=2), "errors: 2"),
        (1, UNSUPPORTED, "not run: Error: Device not supported. Please refer"),
        (137, "========= COMPUTE-SANITIZER\n", "not run: its time was up"),
        (0, "nothing\n", "not run: exit status 0"),  # clean only where the tool says so
        (1, MEMCHECK.format(n=0), "not run: exit status 1"),  # the step itself went wrong
    ],
)
def test_what_the_sanitizer_found(status, output, verdict):
    assert sanitizer.verdict(status, output).startswith(verdict)


def test_a_folder_with_what_the_sanitizer_found_is_not_quoted(tmp_path, monkeypatch):
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(f"#!/bin/sh\necho '{MEMCHECK.format(n=3)}'\nexit {sanitizer.FOUND}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sanitizer, "tool", lambda name: str(stub))
    folder = tmp_path / "results"
    environment.note(folder, sha="0123456789", dirty=False)
    assert environment.reportable(folder) is None
    assert sanitizer.main(folder, Budget(60)) == 1
    assert environment.read(folder)["sanitizer"] == dict.fromkeys(sanitizer.TOOLS, "errors: 3")
    assert "compute-sanitizer" in environment.reportable(folder)
    assert "3 errors" in (folder / "memcheck.txt").read_text()


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


@pytest.mark.parametrize("seen", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_profiler_that_saw_nothing_counts_nothing(monkeypatch, tmp_path, seen):
    """No launch at all is a blind profiler, and not a step that launches nothing."""

    def no_ncu(names, folder, budget):
        raise RuntimeError("ncu is not installed")

    monkeypatch.setattr(profiler, "_ready", lambda model, name: None)
    monkeypatch.setattr(profiler, "count", lambda variant: seen)
    monkeypatch.setattr(profiler, "run_ncu", no_ncu)
    assert profiler.main(tmp_path, Budget(20)) == 0
    absent = environment.read(tmp_path)["absent"]
    raw = tmp_path / "raw.csv"
    rows = list(csv.DictReader(raw.open())) if raw.exists() else []
    assert absent[profiler.DRAM] == "RuntimeError: ncu is not installed"
    assert len(rows) == (len(profiler.ORDER) * 3 if seen[0] else 0)
    assert len(absent) == (1 if seen[0] else 1 + len(profiler.ORDER))
