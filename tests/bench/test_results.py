"""Every figure that is told comes from a file in bench/results/, and none where there is no file.

In README.md a measurement stands between two markers:

    <!-- results: bench/results/FILE OR FOLDER -->
    ...
    <!-- /results -->

Each number between them that has a unit of time, bandwidth or speed-up, or a per cent sign, must
stand in that file (or in table.md or raw.csv of that folder). Outside of markers there is none.
"""

from __future__ import annotations

import csv
import re
from dataclasses import fields
from pathlib import Path

import pytest

from bench import environment, harness, promises, report
from bench.cases import model_case, sweep_case
from bench.harness import COPY, Recorder, Row
from bench.peers import COMPILED, EAGER, FLOOR, ONE, PROJECTS, TWO
from bench.profiler import COUNTS, DRAM
from bench.raw import rows_of

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
FOLDERS = [path.parent for path in sorted((ROOT / "bench" / "results").glob("*/raw.csv"))]
BLOCK = re.compile(r"<!-- results: (\S+) -->(.*?)<!-- /results -->", re.DOTALL)
MEASUREMENT = re.compile(
    r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)\s?"
    r"(?:µs|us\b|ms\b|[KMGT]?B/s|B/param|%|(?:×|x|times)\s(?:faster|slower|as fast|quicker))"
)


def claims(text: str) -> list[str]:
    """Numbers that look like measurements."""
    return MEASUREMENT.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def missing(text: str, root: Path) -> list[str]:
    """What is told without a file that says so."""
    found = [f"{number} outside of markers" for number in claims(BLOCK.sub("", text))]
    for name, block in BLOCK.findall(text):
        path = root / name
        if not path.exists():
            found.append(f"{name} does not exist")
            continue
        if path.is_dir() and environment.reportable(path):
            found.append(f"{name}: {environment.reportable(path)}")
        files = [path] if path.is_file() else [path / "table.md", path / "raw.csv"]
        held = set(re.findall(r"\d+(?:\.\d+)?", "".join(f.read_text() for f in files)))
        found += [f"{n} is not in {name}" for n in claims(block) if n.replace(",", "") not in held]
    return found


def test_readme_tells_nothing_that_was_not_measured():
    assert missing((ROOT / "README.md").read_text(), ROOT) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("batch 1,024, epoch 3 of 50, 161 tensors", []),
        ("a step takes 130 µs", ["130 outside of markers"]),
        ("it is 3.5x faster", ["3.5 outside of markers"]),
        ("reaches 91.2% and 4.3 TB/s", ["91.2 outside", "4.3 outside"]),
        ("<!-- results: table.md -->130.5 µs, 1,300 ms<!-- /results -->", []),
        ("<!-- results: table.md -->131 µs<!-- /results -->", ["131 is not in table.md"]),
        ("<!-- results: gone.md -->130.5 µs<!-- /results -->", ["gone.md does not exist"]),
    ],
)
def test_the_convention(text, wrong, tmp_path):
    (tmp_path / "table.md").write_text("| ours | 130.5 (129.9 to 131.7) | 1300 |\n")
    found = missing(text, tmp_path)
    assert len(found) == len(wrong)
    assert all(f.startswith(w) for f, w in zip(found, wrong, strict=True))


def test_bench_readme_holds_the_table_of_the_folders():
    text = promises.README.read_text()
    assert promises.section(text) == text, "run `python -m bench report --readme`"
    assert text.count(promises.BEGIN) == text.count(promises.END) == 1


def test_readme_shows_the_gpu_s_table_and_picture():
    text = (ROOT / "README.md").read_text()
    (folder,) = {ROOT / name for name, _ in BLOCK.findall(text) if "-cpu-" not in name}
    assert report.first_screen(rows_of(folder)) in text, "bench.report.first_screen writes it"
    assert f"]({(folder / 'gpu.png').relative_to(ROOT)})" in text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_folder_is_what_it_says(folder):
    facts = environment.read(folder)
    with (folder / "raw.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [f.name for f in fields(Row)]
    assert folder.name.endswith(f"-{facts['sha']}" + "-dirty" * facts["dirty"])
    for row in rows:
        assert row["sha"] == facts["sha"] + "-dirty" * facts["dirty"]
        assert row["gpu"] == facts["gpu"]
        # torch says which build it is, its package may not: 2.11.0+cu130 and 2.11.0.
        assert row["torch"].split("+")[0] == facts["packages"]["torch"].split("+")[0]
        assert row["kind"] in ("gpu", "host")
        assert float(row["p25"]) <= float(row["p50"]) <= float(row["p75"])
    assert (folder / "table.md").read_text() == report.markdown(folder)


# ---------------------------------------------------------------- a folder made by hand

US = {FLOOR: 100.0, ONE: 110.0, TWO: 125.0, "foreach LARS": 400.0, "eager LARS": 900.0}
US |= {"timm Lars": 800.0, "optax lars, jit": 150.0, "compiled foreach LARS": 300.0}


@pytest.fixture
def gpu_folder(tmp_path, monkeypatch):
    """Results as a GPU would leave them: ours 1.1 times the floor, copies at 5 TB/s."""
    monkeypatch.setattr(environment, "gpu_name", lambda: "H200")
    monkeypatch.setattr(environment, "commit", lambda: ("0123456789", False))
    monkeypatch.setattr(environment, "driver", lambda: "580.1")
    folder = environment.folder(tmp_path)
    environment.note(folder, **environment.facts("python -m bench"), tests={"exit status": 0})
    recorder = Recorder(folder)
    every = [model_case("ResNet-50"), model_case("ViT-B/16"), model_case("one 100M tensor")]
    for case in [*every, *map(sweep_case, (10**4, 10**5, 10**7))]:
        facts = {
            "n_tensors": len(case.shapes),
            "n_params": case.n_params,
            "utc": f"of {case.n_params}",
        }
        recorder.add(case.name, COPY, [500.0], **facts, bytes=2_500_000_000)
        for name, us in US.items():
            scaled = us * case.n_params / 25e6
            samples = [scaled * x for x in (0.98, 1, 1.03)]
            recorder.add(case.name, name, samples, **facts, bytes=case.least_bytes)
            recorder.add(case.name, name, [30.0], **facts, kind="host")
    for unit, value in zip((*COUNTS, DRAM), (1, 0, 0, 20.25), strict=True):
        recorder.add("ResNet-50", ONE, [value], unit=unit)
    recorder.note(absent={"ResNet-50, fp32, apex LARC": "ModuleNotFoundError: no apex"})
    recorder.note(host_bound={"ResNet-50, fp32": ["apex LARC"]})
    return folder


def test_promises_come_from_the_folder(gpu_folder):
    lines = {line.measure: line for line in promises.lines([gpu_folder])}
    of_copy = 28 * 25 / 5 / 110  # 28 bytes at 5M bytes a microsecond, 110 us for 25M parameters
    shown = {
        "GPU time, ResNet-50, ours / SGD(fused=True)": "1.100",
        "GPU time, ViT-B/16, one launch / two launches": "0.880",
        "GPU time, ResNet-50, optax lars, jit / ours": "1.364",
        "GPU time, ResNet-50, apex LARC / ours": "not measured",
        "GPU time, ResNet-50, compiled eager LARS / ours": "not measured",
        "28 B/param over copy bandwidth / our GPU time, one 100M tensor": f"{of_copy:.3f}",
        "launches a step, steady state": "1",
        "waits of the host a step, steady state": "0",
        "DRAM bytes a parameter, ResNet-50": "20.25",
        "host time, 10,000 tensors / 1,000 tensors": "not measured",
    }
    assert {measure: lines[measure].measured for measure in shown} == shown
    assert lines["launches a step, steady state"].folder == gpu_folder.name
    peers = {*EAGER, *COMPILED, *PROJECTS}
    assert sum(f", {peer} / ours" in m for peer in peers for m in lines) == len(peers)


@pytest.mark.parametrize(
    ("must", "measured", "missed"),
    [
        ("≤ 1.15", "1.150", False), ("≤ 1.15", "1.151", True),
        ("≥ 0.85", "0.850", False), ("≥ 0.85", "0.756", True),
        ("< 1", "0.999", False), ("< 1", "1.00", True),
        ("> 1", "1.001", False), ("> 1", "1.000", True),
        ("1", "1", False), ("0", "2", True),
        ("≤ 20.5", "22.14 (prediction)", True), ("≤ 20.5", "20.14 (prediction)", False),
        ("reported", "3.0", False), ("≤ 1.15", "not measured", False),
    ],
)  # fmt: skip
def test_a_figure_that_breaks_its_bound_is_missed(must, measured, missed):
    assert promises.Line("GPU time", must, measured).missed is missed


def test_what_was_missed_is_marked_as_such(monkeypatch):
    found = [promises.Line("bytes", "≤ 1", "2", "here"), promises.Line("time", "≤ 1", "1", "here")]
    monkeypatch.setattr(promises, "lines", lambda folders: found)
    rows = promises.readme_table().splitlines()[2:]
    assert rows == ["| bytes | ≤ 1 | 2, **missed** | here |", "| time | ≤ 1 | 1 | here |"]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"dirty": True},
        {"gate": {"a": "b"}},
        {"tests": {"exit status": 1}},
        {"tests": None},
        {"sanitizer": {"memcheck": "errors: 2"}},
    ],
    ids=str,
)
def test_what_may_not_be_quoted_is_not_measured(gpu_folder, spoilt):
    environment.note(gpu_folder, **spoilt)
    for line in promises.lines([gpu_folder]):
        assert line.measured == "not measured" or "prediction" in line.measured
    assert "Not to be quoted" in report.markdown(gpu_folder)


def test_ratios_are_within_one_run(gpu_folder, monkeypatch):
    """A compiled peer is compared with ours of its own run, not with the faster one before."""
    recorder = Recorder(gpu_folder)
    facts = {"n_tensors": 161, "n_params": model_case("ResNet-50").n_params, "utc": "later"}
    recorder.add("ResNet-50", ONE, [220.0], **facts)
    recorder.add("ResNet-50", "compiled eager LARS", [440.0], **facts)
    lines = {line.measure: line.measured for line in promises.lines([gpu_folder])}
    assert lines["GPU time, ResNet-50, compiled eager LARS / ours"] == "2.000"
    assert lines["GPU time, ResNet-50, optax lars, jit / ours"] == "1.364"


def test_table_and_plots(gpu_folder):
    pytest.importorskip("matplotlib")
    assert report.write(gpu_folder) == 0
    text = (gpu_folder / "table.md").read_text()
    resnet = model_case("ResNet-50")
    floor, us = 20 * resnet.n_params / 5e6, 110 * resnet.n_params / 25e6
    step = text[text.index("## ResNet-50, fp32") :].splitlines()
    line = next(line for line in step if line.startswith(f"| {ONE} |"))
    assert f"| 1.10 | 1.00 | {floor / us:.2f} | 30.0" in line
    assert f"20.00 B/param over copy bandwidth | {floor:.1f} |" in text
    assert "apex LARC: absent (ModuleNotFoundError: no apex)" in text
    assert "apex LARC wait for the GPU" in text
    assert "5000 GB/s" in text
    assert "20.25 | DRAM bytes a parameter" in text
    assert f"| {ONE} | 1.10 | 1.10 |" in text
    for name in ("steps.png", "bandwidth.png", "sweep.png", "gpu.png"):
        assert (gpu_folder / name).stat().st_size > 10_000


def test_the_first_screen_s_table(gpu_folder):
    """1.1 of the floor; 20 bytes at 5M bytes a microsecond for 25M parameters in 110 us."""
    ours = next(s for s in report.first_screen(rows_of(gpu_folder)).splitlines() if ONE in s)
    us = 110 * model_case("ResNet-50").n_params / 25e6
    assert f"| {ONE} | {us:.0f} (1.10) | {20 * 25 / 5 / 110:.2f} |" in ours
    assert ours.endswith("| 20.2 | 1 |")


def test_what_is_absent_is_said_of_its_dtype_only(gpu_folder):
    environment.note(gpu_folder, absent={"ResNet-50, fp32, bf16 gradients, x": "no"})
    assert "x: absent" not in report.markdown(gpu_folder)


def test_recorder_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harness.Recorder(None).add("case", "variant", [1.0])
    assert list(tmp_path.iterdir()) == []
