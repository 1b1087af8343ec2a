"""`ci/gpu.sh` from end to end without a GPU: the parts are stand-ins, the script and the rest real.

A stand-in for the interpreter prints, leaves rows as the part would, and then ends, fails or hangs
so that no signal but the last one reaches it. The rest of `bench` is real; REPORT=0 leaves out the
report, which takes longest.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import environment, harness, merge, peers, report
from bench.cases import model_case, slug

pytestmark = pytest.mark.cpu

ROOT = Path(environment.ROOT)
SCRIPT = ROOT / "ci" / "gpu.sh"
SHA = "0123456789"

STAND_IN = """#!/usr/bin/env bash
hang() { trap '' INT TERM HUP; while :; do sleep 1; done; }
as_told() { case ${1:-0} in hang) hang ;; *) exit "${1:-0}" ;; esac; }
leave_rows() {
    local folder rows=resnet50
    while [ $# -gt 0 ]; do
        case $1 in --output) folder=$2 ;; --only) [[ $2 != *case* ]] || rows=vitb16 ;; esac
        shift
    done
    if [ -e "$folder/raw.csv" ]; then
        tail -n +2 "$ROWS/$rows/raw.csv" >>"$folder/raw.csv"
    else
        cp "$ROWS/$rows/raw.csv" "$folder"
    fi
    echo "rows of $rows"
}
case "$*" in
*tests.cases*bench.small_step*) echo "a small step"; as_told "${SMOKE:-}" ;;
*ci/test.py*) echo "tests passed so far: 7"; as_told "${TESTS:-}" ;;
*"bench run"*) leave_rows "$@"; as_told "${BENCH:-}" ;;
*"bench profile"* | *"bench sanitize"* | *"bench tune"*)
    echo "part: $*" ;;
*"bench report"*) [ -n "${REPORT:-}" ] || exec REAL "$@" ;;
*) exec REAL "$@" ;;
esac
"""


def write_rows(folder, name):
    """What a run of one case leaves."""
    case, recorder = model_case(name), harness.Recorder(folder)
    facts = {"n_tensors": len(case.shapes), "n_params": case.n_params, "utc": name}
    recorder.add(case.name, harness.COPY, [500.0], **facts, bytes=2_500_000_000)
    for variant in (peers.FLOOR, peers.ONE, peers.TWO):
        recorder.add(case.name, variant, [100.0, 110.0], **facts, bytes=case.least_bytes)


@pytest.fixture
def run(tmp_path):
    stand_in, rows = tmp_path / "python", tmp_path / "rows"
    stand_in.write_text(STAND_IN.replace("REAL", sys.executable))
    stand_in.chmod(0o755)
    for name in ("ResNet-50", "ViT-B/16"):
        write_rows(rows / slug(name), name)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {
        "PYTHON": str(stand_in), "ROWS": str(rows), "OUT": str(tmp_path / "out"),
        "KEEP": str(tmp_path / "kept"), environment.SHA_VARIABLE: SHA, "SAVE_SECONDS": "0.5",
        "GRACE": "1",
    }  # fmt: skip

    def start(*arguments, **more):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=env | more, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(*arguments, **more):
        with start(*arguments, **more) as process:
            try:
                output, _ = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                end_of_session(process.pid)
                raise
        return process.returncode, output

    run.start = start
    return run


def unpacked(tmp_path, archive):
    target = tmp_path / archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder


def has_rows(archive):
    with tarfile.open(archive) as packed:
        return any(name.endswith("/raw.csv") for name in packed.getnames())


def archives(tmp_path):
    return sorted((tmp_path / "out").iterdir())


def cases_of(folder):
    with (folder / "raw.csv").open(newline="") as file:
        return {row["case"] for row in csv.DictReader(file)}


def test_two_calls_fill_one_folder_and_an_archive_each(run, tmp_path):
    status, output = run("first", REPORT="0")
    assert status == 0, output
    order = [output.index(f"-- {part}: ") for part in ("smoke", "tests", "bench:first", "profile")]
    assert order == sorted(order)
    status, output = run("second")
    assert status == 0, output
    assert "-- bench:case or peers or norms: " in output
    (kept,) = (tmp_path / "kept").glob("2*")
    assert kept.name.endswith(f"-cpu-{SHA}")
    assert cases_of(kept) == {"ResNet-50", "ViT-B/16"}
    one, two = archives(tmp_path)
    assert cases_of(unpacked(tmp_path, one)) == {"ResNet-50"}
    last = unpacked(tmp_path, two)
    assert cases_of(last) == {"ResNet-50", "ViT-B/16"}
    assert {"table.md", "log.txt", "environment.json", "steps.png"} <= set(os.listdir(last))
    log = (last / "log.txt").read_text()
    assert log.count("a small step") == 2
    assert "tests passed so far: 7" in log
    assert "-- second: " in log  # its last line, too
    assert environment.read(last)["tests"] == {"exit status": 0}
    assert environment.reportable(last) is None


@pytest.mark.slow
def test_without_arguments_all_three_calls_are_made(run, tmp_path):
    status, output = run(REPORT="0")
    assert status == 0, output
    ends = [output.index(f"-- {call}: ") for call in ("first", "second", "third")]
    assert ends == sorted(ends)
    assert "-- tune: " in output
    assert "-- bench:compiled: " in output
    assert len(archives(tmp_path)) == output.count("results: ") == 3


@pytest.mark.slow
def test_parts_that_hang_are_ended_and_lose_nothing(run, tmp_path):
    status, output = run(
        "tests", "bench", "profile", TESTS="hang", BENCH="hang",
        TESTS_SECONDS="2", BENCH_SECONDS="3",
    )  # fmt: skip
    assert status == 1, output
    assert "tests: ended after 2 s" in output
    assert "bench: ended after 3 s" in output
    (archive,) = archives(tmp_path)
    folder = unpacked(tmp_path, archive)
    assert cases_of(folder) == {"ResNet-50"}
    assert "ResNet-50" in (folder / "table.md").read_text()
    assert "tests passed so far: 7" in (folder / "log.txt").read_text()
    assert "part: -m bench profile" in (folder / "log.txt").read_text()
    assert environment.reportable(folder) == "the tests of its commit failed"


@pytest.mark.slow
def test_a_call_ends_within_its_limit(run, tmp_path):
    """Even where each part takes all that it may: the script shares out what is left."""
    status, output = run(
        "tests", "bench", "profile", TESTS="hang", BENCH="hang", LIMIT="45", TESTS_SECONDS="2",
        REPORT_SECONDS="5", REPORT="0",
    )  # fmt: skip
    assert status == 1, output
    taken = [int(s) for s in re.findall(r"ended after (\d+) s", output)]
    assert len(taken) == 2
    assert sum(taken) <= 45 - 5 - 15  # the report, and the time to end and save
    assert "-- profile: not begun, the time is up" in output
    assert "bench: ended after" in output


@pytest.mark.slow
def test_a_call_that_is_killed_from_outside_has_left_what_there_was(run, tmp_path):
    with run.start("bench", BENCH="hang") as process:
        for line in process.stdout:
            if line.startswith("rows of"):
                break
        until = time.monotonic() + 60
        (archive,) = archives(tmp_path)  # as the small step left it
        while not has_rows(archive):
            assert time.monotonic() < until, "nothing is saved while a part runs"
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert cases_of(unpacked(tmp_path, archive)) == {"ResNet-50"}
        end_of_session(process.pid)


def end_of_session(session):
    """End what a killed script left: the processes of its session alone."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                pid = int(entry.name)
                if os.getsid(pid) == session:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.mark.slow
def test_an_interrupted_call_ends_its_part_and_copies_its_results(run, tmp_path):
    with run.start("bench", BENCH="hang", SAVE_SECONDS="100") as process:
        for line in process.stdout:
            if line.startswith("rows of"):
                break
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(20) == 130
    assert "results: " in output
    (archive,) = archives(tmp_path)
    assert cases_of(unpacked(tmp_path, archive)) == {"ResNet-50"}


@pytest.mark.slow
def test_a_wrong_small_step_ends_the_call(run, tmp_path):
    status, output = run("tests", SMOKE="1")
    assert status == 1, output
    assert "-- smoke: " in output
    assert "-- tests: " not in output
    (archive,) = archives(tmp_path)
    assert environment.reportable(unpacked(tmp_path, archive)) == "the tests of its commit failed"


@pytest.mark.slow
def test_some_tests_do_not_stand_for_all_and_success_does_not_undo_failure(run, tmp_path):
    run("tests:graphs")
    (kept,) = (tmp_path / "kept").glob("2*")
    assert "tests" not in environment.read(kept)
    run("tests", TESTS="3")
    run("tests", TESTS="0")
    assert environment.read(kept)["tests"] == {"exit status": 3}


@pytest.mark.parametrize(("sha", "why"), [("0123456789-dirty", "differs"), ("none", "no commit")])
def test_nothing_is_run_whose_figures_could_not_be_quoted(run, tmp_path, sha, why):
    given = {environment.SHA_VARIABLE: sha}
    status, output = run("tests", **given)
    assert status == 2, output
    assert why in output
    assert environment.SHA_VARIABLE in output
    assert not (tmp_path / "kept").exists()
    if sha != "none":
        status, output = run("tests", UNQUOTABLE="1", **given)
        assert status == 0
        assert "UNQUOTABLE" in output
        (kept,) = (tmp_path / "kept").glob("2*")
        assert environment.reportable(kept)


def test_usage(run):
    for arguments, status in (("--help", 0), ("nothing", 2)):
        done, output = run(arguments)
        assert done == status
        for word in ("first", "second", "third", "LARS_FUSED_SHA", "KEEP", "OUT", "LIMIT"):
            assert word in output
    assert "no part nothing" in output


def test_the_limits_of_a_call_fit_in_ten_minutes():
    """The parts' limits are read from the script, which also counts what is left at each part."""
    show = 'for c in first second third; do declare -n p=$c; t=0; for part in "${p[@]}"; do '
    show += "t=$((t + ${limits[$part]})); done; echo $((t + limits[smoke] + limits[report])); done"
    text = SCRIPT.read_text()
    tables = text[text.index("first=(") : text.index("\ncase ${1:-}")]
    done = subprocess.run(["bash", "-c", tables + "\n" + show], capture_output=True, text=True)
    totals = [int(line) for line in done.stdout.split()]
    assert len(totals) == 3, done.stderr
    assert max(totals) <= 560


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run([SHELLCHECK, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------- folders put together


def made(parent, utc, **facts):
    folder = parent / "2026-01-01-h200-0123456789"
    base = {"sha": SHA, "dirty": False, "gpu": "H200", "packages": {"torch": "2.11.0"}}
    environment.note(folder, **{**base, "utc": utc, **facts})
    text = "case,variant,dtype,n_tensors,n_params,bytes,p25,p50,p75,unit,kind,utc\n"
    row = f"norms,ours,fp32,1,100,400,1,2,3,us,gpu,{utc}\n"
    (folder / "raw.csv").write_text(text + row)
    (folder / "log.txt").write_text(f"log of {utc}\n")
    (folder / "benchmark.json").write_text(f'"{utc}"\n')
    return folder


def test_folders_of_several_machines_are_put_together(tmp_path):
    first = made(tmp_path / "a", "1", tests={"exit status": 4}, lost={"case-x": "hung"})
    second = made(tmp_path / "b", "2", tests={"exit status": 0}, sanitizer={"memcheck": "clean"})
    (second / "tune.csv").write_text("ratio\n0.9\n")
    archive = tmp_path / "b.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(second, second.name)
    for _ in range(2):  # what was merged may be merged again
        merged = merge.merge([first, archive], tmp_path / "results")
        rows = list(csv.DictReader((merged / "raw.csv").open()))
        assert [row["utc"] for row in rows] == ["1", "2"]
        facts = environment.read(merged)
        assert facts["tests"] == {"exit status": 4}
        assert facts["lost"] == {"case-x": "hung"}
        assert facts["sanitizer"] == {"memcheck": "clean"}
        assert (merged / "log.txt").read_text() == "log of 1\n"
        assert (merged / "log-2.txt").read_text() == "log of 2\n"
        names = {"benchmark.json", "benchmark-2.json", "tune.csv", "table.md"}
        assert names <= set(os.listdir(merged))
        assert "log-3.txt" not in os.listdir(merged)


def test_results_of_two_commits_are_not_put_together(tmp_path):
    first, second = made(tmp_path / "a", "1"), made(tmp_path / "b", "2", sha="9876543210")
    with pytest.raises(ValueError, match="several commits or GPUs"):
        merge.merge([first, second], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_table_says_what_was_lost_and_what_the_sanitizer_said(tmp_path):
    lost, said = {"peers-jax-x": "the process ended during it"}, {"memcheck": "clean"}
    text = report.markdown(made(tmp_path, "1", lost=lost, sanitizer=said))
    assert "peers-jax-x: not measured (the process ended during it)." in text
    assert "compute-sanitizer, memcheck: clean." in text


def test_a_part_on_a_gpu_is_supervised(tmp_path):
    """`python -m bench sanitize` from its command line, a stand-in for the tool and for the GPU."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
    )
    tool, folder = tmp_path / "compute-sanitizer", tmp_path / "results"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
    tool.chmod(0o755)
    environment.note(folder, sha=SHA, dirty=False, gpu="H200")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "sanitize", str(folder), "--seconds", "60"], cwd=ROOT,
        env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
        },
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compute-sanitizer racecheck: clean" in done.stdout
    assert environment.read(folder)["sanitizer"] == {"memcheck": "clean", "racecheck": "clean"}
    assert not (folder / "pieces.txt").exists()
