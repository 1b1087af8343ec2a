"""`lars-study noise`: files, shares, interruption, damaged files, wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import kept, plans, runs
from lars_fused.study.cli import main
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments import noise_parts
from lars_fused.study.experiments.noise import Plan
from lars_fused.study.loop import Trainer
from tests.study.commands import done_in_shares, finished, interrupted, refused
from tests.study.drawing import coarsely_drawn, undrawn
from tests.study.tables import rows, summary_of

pytestmark = pytest.mark.cpu


SMALL = [
    "noise", "--data=synthetic", "--network=linear", "--steps=8", "--seeds=2", "--batches=8,64,512",
    "--lrs=0.1,0.4", "--lr=0.1", "--sizes=256,all", "--examples=64", "--updates=2", "--repeats=2",
    "--time=0.5", "--chains=64", "--well-batches=2,8", "--temperatures=0.45",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("noise")
    with pytest.MonkeyPatch.context() as patch:
        coarsely_drawn(patch)
        assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_a_study_leaves_its_tables_and_pictures(study: Path) -> None:
    for name in ("gradient_noise", "batch_by_lr", "batch_by_size", "wells"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = rows(study / "by_batch.csv")
    assert len(table) == 2 * (3 + 3 + 2)
    row = next(r for r in table if (r["lr"], r["images"], r["batch"]) == ("0.4", "2048", "64"))
    assert float(row["noise_scale"]) == pytest.approx(0.4 * (2048 / 64 - 1))
    settings = Plan.from_dict(plans.load(study)["plan"]).settings(
        0.4, 2048, 64, int(row["seed"]), 2048
    )
    assert runs.find(study, settings).accuracy == float(row["test_accuracy"])
    assert Trainer(settings, noise_parts_data()).run().accuracy == float(row["test_accuracy"])
    shares = rows(study / "wells.csv")
    assert [(r["tilt"], r["batch"]) for r in shares] == [
        ("gaussian", "2"), ("gaussian", "8"), ("signs", "2"), ("signs", "8"),
    ]  # fmt: skip
    for r in shares:
        assert float(r["lr"]) / int(r["batch"]) == pytest.approx(2 * 0.45 / 12**2)
    summary = summary_of(study)
    assert [p["step"] for p in summary["gradient_noise"]] == [0, 1, 2, 4, 8]


def noise_parts_data():
    from lars_fused.study.data import load

    return load("synthetic")


def test_shares_that_are_merged_are_the_whole_study(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    merged = done_in_shares(SMALL, tmp_path)
    assert main(["report", str(tmp_path / "2")]) == 0
    capsys.readouterr()
    assert main(["report", str(merged)]) == 0
    assert "share in the flat minimum" in capsys.readouterr().out
    for name in ("by_batch.csv", "wells.csv"):
        assert (merged / name).read_bytes() == (study / name).read_bytes()
    ours, theirs = (summary_of(p) for p in (merged, study))
    assert ours["command"] == ["lars-study", *sys.argv[1:]]  # no --only: it is the whole study
    assert plans.whole(["noise", "--only", "1/2", "--steps=3", "--only=2/2"]) == [
        "noise", "--steps=3",
    ]  # fmt: skip
    assert ours["gradient_noise"] == theirs["gradient_noise"]


def test_an_interrupted_study_goes_on_to_the_same_numbers(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    undrawn(monkeypatch)
    calls = interrupted(monkeypatch, noise_parts, "ended_flat", 2)
    assert main([*SMALL, f"--out={tmp_path}"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    earlier = finished(tmp_path)
    monkeypatch.setattr(runs, "Trainer", None)  # every run is finished: none may start again
    monkeypatch.setattr(noise_parts, "Trainer", None)
    assert main([*SMALL, f"--out={tmp_path}"]) == 0
    assert len(calls) == 2 + 3  # one cell was done, the other three follow
    assert earlier.items() <= finished(tmp_path).items()
    for name in ("by_batch.csv", "wells.csv"):
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    wanted = {"a": 1.5}
    assert kept.measure(tmp_path, "wells", wanted, lambda: {"flat": 3}) == {"flat": 3}
    path = kept.path_of(tmp_path, "wells", wanted)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StudyError, match=f"{path} is not a whole JSON file"):
        kept.find(tmp_path, "wells", wanted)
    path.write_text('{"of": {"a": 2.5}, "measured": {"flat": 3}}')
    with pytest.raises(StudyError, match="holds another measurement than its name says"):
        kept.find(tmp_path, "wells", wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network=mlp-bn"], "an example has no gradient of its own"),
        (["--sizes=9999"], "--sizes 9999 is more than the 2,048 training images there are"),
        (["--batches=64,512", "--sizes=32"], "--batches 64 is larger than the smallest of --sizes"),
        (["--steps=0"], "--steps 0 is not allowed: at least 1"),
        (["--pieces=1"], "--pieces 1 is not allowed: at least 2"),
        (["--lrs=0.1,zero"], "is not a list of numbers"),
        (["--lrs=0"], "the numbers must be positive"),
        (["--momentum=1"], "--momentum 1.0 is not allowed"),
        (["--chains=1"], "--chains must be at least 2"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, capsys, arguments, message) -> None:
    refused(["noise", "--data=synthetic", *arguments], message, tmp_path / "out", capsys)
