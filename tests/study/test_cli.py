"""The command line: recipes, interruption, full disks, wrong input, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")

import click
from threadpoolctl import threadpool_info, threadpool_limits

from lars_fused.study import loop, runs
from lars_fused.study.cli import cli, main
from lars_fused.study.settings import Settings
from tests.processes import Study
from tests.study.drawing import undrawn

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch) -> None:
    if request.function is not test_report_of_single_runs:
        undrawn(monkeypatch)


TRAIN = ["train", "--data=synthetic", "--batch=64"]


def result_in(out: Path) -> dict:
    (path,) = (out / "runs").glob("*/result.json")
    return json.loads(path.read_text())


def weights_in(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "runs").glob("*/weights.pt")
    return torch.load(path, weights_only=True)


def failure(arguments: list[str], capsys) -> str:
    """The one line of a command that must fail."""
    assert main(arguments) != 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("lars-study: ")
    assert shown.err.count("\n") == 1, shown.err
    return shown.err


def test_every_default_that_help_prints_is_accepted() -> None:
    shown = 0
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=name)
        for option in command.params:
            record = option.get_help_record(context)
            found = re.search(r"\[default: ([^\];]*)", record[1]) if record else None
            if found:
                shown += 1
                printed = option.type_cast_value(context, found[1])
                assert printed == option.type_cast_value(context, option.default), option.name
                own = (
                    getattr(Settings(), option.name)
                    if name == "train" and option.name != "out"
                    else printed
                )
                assert printed == own, option.name
    assert shown > 90


@pytest.mark.parametrize("text", ["1/0", "1/3/2", "x/2"])
def test_what_is_no_fraction_is_refused(text, capsys) -> None:
    assert "is not a list of numbers" in failure(["train", f"--milestones={text}"], capsys)


def test_a_recipe_is_trained_and_its_published_number_shown(tmp_path, capsys) -> None:
    arguments = [
        "train", "--recipe=table6-8192", "--data=synthetic", "--batch=128", "--epochs=1",
        "--width=0.0625", "--lr=3", "--train-images=256", "--evaluations=1", f"--out={tmp_path}",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "differs from table6-8192: data synthetic instead of ImageNet" in shown.out
    assert "differs from table6-8192: batch 128 instead of 8192" in shown.out
    assert "differs from table6-8192: lr 3 instead of 10" in shown.out
    lines = shown.out.splitlines()
    reached = next(i for i, line in enumerate(lines) if line.startswith("Test accuracy"))
    assert lines[reached + 1] == "Published (table 6, ImageNet): 69 %."
    saved = result_in(tmp_path)
    settings = saved["settings"]
    assert (settings["network"], settings["warmup_epochs"]) == ("googlenet", 60.0)
    assert (settings["augment"], settings["batch"], settings["lr"]) == ("extended", 128, 3.0)
    assert f"Test accuracy {saved['accuracy']:.2f} %" in lines[reached]
    assert "\r" not in shown.err, "a progress bar was drawn without a terminal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=imagenet"], "--data imagenet is unknown"),
        (["--data=emnist:/nowhere"], "/nowhere is not a folder"),
        (["--network=vgg"], "--network vgg is unknown"),
        (["--batch=4096"], "--batch 4,096 is larger than the 2,048 training images"),
        (["--recipe=table9"], "--recipe table9 is unknown"),
        (["--recipe=table3a-512"], "lr illegible in the source; give --lr"),
        (["--recipe=table1b-8192-lr0.3", "--batch=8192"], "--batch 8,192 is larger than the 2,048"),
        (["--optimizer=lamb"], "'lamb' is not one of"),
        (["--lr=-1"], "--lr -1.0 is not allowed"),
        (["--lr=fast"], "'fast' is not a valid float"),
        (["--validation=5000"], "--validation 5000 is not allowed"),
        (["--resolution=4"], "at least 6 pixels"),
        (["--nonsense"], "No such option"),
        (["--network=mlp-bn", "--micro-batch=1"], "batch normalisation needs two"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message) -> None:
    out = tmp_path / "out"
    assert message in failure([*TRAIN, *arguments, f"--out={out}"], capsys)
    assert not list(out.rglob("result.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "/nowhere"], "does not exist"),
        (["report", "."], "holds no study.json"),
        (["batch-size", "--data=synthetic", "--batches=64,9999"], "--batch 9,999 is larger"),
        (["batch-size", "--batches=64,sixty"], "'64,sixty' is not a list of numbers"),
        (["batch-size", "--batches=64,64"], "names a number twice"),
        (["batch-size", "--lars-grid=1,2"], "tuned alike"),
        (["batch-size", "--methods=lamb"], "--methods lamb is unknown"),
        (["layers", "--only=3/2"], "i must lie in 1..n"),
        (["layers", "--network=vgg"], "--network vgg is unknown"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_study_is_not_written_to(tmp_path, capsys) -> None:
    (tmp_path / "study.json").write_text('{"study": "layers", "plan": {}}')
    assert "holds a study of layers; choose another" in failure(
        [*TRAIN, f"--out={tmp_path}"], capsys
    )


def test_a_damaged_result_or_checkpoint_is_named(tmp_path, capsys) -> None:
    arguments = [*TRAIN, "--epochs=0.1", f"--out={tmp_path}"]
    assert main(arguments) == 0
    (path,) = (tmp_path / "runs").glob("*/result.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    capsys.readouterr()
    assert f"{path} is not a whole JSON file" in failure_after_header(arguments, capsys)
    path.unlink()
    (path.parent / runs.CHECKPOINT).write_bytes(b"PK\x03\x04 half a checkpoint")
    assert "checkpoint.pt is damaged" in failure_after_header(arguments, capsys)


def failure_after_header(arguments: list[str], capsys) -> str:
    """As `failure`, for what goes wrong once the run has been announced."""
    assert main(arguments) != 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    return shown.err


def killed_after(step: int) -> None:
    """The process ends itself, as by `kill -9`, right after it has saved at this step."""
    save, loop.CHECKPOINT_SECONDS = loop.Trainer.save, 0.0

    def then_killed(trainer: loop.Trainer) -> None:
        save(trainer)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.Trainer.save = then_killed


def test_a_killed_run_goes_on_to_the_bitwise_same_result(tmp_path) -> None:
    arguments = [
        "train", "--data=synthetic", "--train-images=256", "--batch=16", "--network=c1",
        "--width=0.125", "--epochs=1", "--warmup-epochs=0.5",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*arguments, f"--out={whole}"]) == 0
    process = Study([*arguments, f"--out={killed}"], tmp_path, killed_after, 5)
    assert process.wait()[0] == -signal.SIGKILL
    (checkpoint,) = killed.rglob(runs.CHECKPOINT)
    assert not list(killed.rglob("result.json"))
    assert torch.load(checkpoint, weights_only=True)["step"] == 5
    assert len(result_in(whole)["history"]["losses"]) == 16
    assert main([*arguments, f"--out={killed}"]) == 0
    assert result_in(killed)["history"] == result_in(whole)["history"]
    for name, tensor in weights_in(whole).items():
        assert torch.equal(tensor, weights_in(killed)[name])
    assert not list(killed.rglob(runs.CHECKPOINT))


def full_disk() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path) -> None:
    out = tmp_path / "out"
    arguments = [*TRAIN, "--epochs=0.1", f"--out={out}"]
    assert main(arguments) == 0
    earlier = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    status, _, shown = Study([*arguments, "--seed=1"], tmp_path, full_disk).wait()
    assert status == 1
    assert "could not be written" in shown
    assert shown.count("\n") == 1, shown
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == earlier
    assert main([*arguments, "--seed=1"]) == 0


def as_rank(rank: int, size: int, port: int) -> None:
    """What torchrun tells its processes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path) -> None:
    """Batch normalisation and dropout included: a micro-batch is a rank's half of the batch."""
    arguments = [
        "--data=synthetic", "--network=c1", "--width=0.125", "--batch=63", "--epochs=0.2",
        "--augment=minimal", "--layers=3", "--micro-batch=32", "--evaluations=2",
    ]  # fmt: skip
    assert main(["train", *arguments, f"--out={tmp_path / 'one'}"]) == 0
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = ["train", *arguments, f"--out={tmp_path / 'two'}"]
    ranks = [Study(command, tmp_path, as_rank, i, 2, store.port) for i in range(2)]
    done = [rank.wait() for rank in ranks]
    assert [status for status, _, _ in done] == [0, 0], done
    assert sum(out.count("Test accuracy") for _, out, _ in done) == 1
    one, two = result_in(tmp_path / "one"), result_in(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["history"]["losses"]) == 7
    # The same sums, in the same order but for the one of the two halves: a few ulp a step.
    tolerance = 7 * 16 * torch.finfo(torch.float32).eps
    assert two["history"]["losses"] == pytest.approx(one["history"]["losses"], rel=tolerance)
    ours, theirs = weights_in(tmp_path / "one"), weights_in(tmp_path / "two")
    for name, tensor in ours.items():
        largest = float(tensor.abs().max()) if tensor.is_floating_point() else 0.0
        gap = float((tensor - theirs[name]).abs().max())
        assert gap <= tolerance * largest, name


def test_tensorboard_holds_every_step(tmp_path, capsys) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*TRAIN, "--epochs=0.2", "--tensorboard", f"--out={tmp_path}"]) == 0
    (folder,) = tmp_path.rglob("events")
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [event.value for event in events.Scalars("training loss")]
    assert losses == pytest.approx(result_in(tmp_path)["history"]["losses"])
    assert events.Scalars("test_accuracy")[-1].value == pytest.approx(
        result_in(tmp_path)["accuracy"]
    )


def test_recipes_are_listed(capsys) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert "table1a-4096-lr0.05" in shown
    assert "illegible in the source" in shown
    assert "60,965,224" in shown


def test_report_of_single_runs(tmp_path, capsys) -> None:
    assert main([*TRAIN, "--epochs=0.1", f"--out={tmp_path}"]) == 0
    (picture,) = tmp_path.rglob("curves.png")
    picture.unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert f"{result_in(tmp_path)['accuracy']:.2f}" in capsys.readouterr().out
    assert picture.exists()


@pytest.mark.parametrize(
    ("command", "variable", "gpu", "threads"),
    [
        ("recipes", None, False, 1),
        ("recipes", "3", False, 3),
        ("recipes", None, True, 3),
        ("train", None, False, 3),
    ],
)
def test_a_sweep_takes_one_core_and_a_run_all_of_them(
    command, variable, gpu, threads, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threadpool_limits(3):
            main([command, *(["--data=nowhere"] if command == "train" else [])])
            assert torch.get_num_threads() == threads
            pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
            assert {pool["num_threads"] for pool in pools} == {threads}
    finally:
        torch.set_num_threads(before)


def test_versions_and_command_are_in_the_result(tmp_path) -> None:
    assert main([*TRAIN, "--epochs=0.1", f"--out={tmp_path}"]) == 0
    saved = result_in(tmp_path)
    assert Settings.from_dict(saved["settings"]).batch == 64
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["command"][0] == "lars-study"


def test_a_missing_extra_is_named_with_the_remedy() -> None:
    code = "import sys; sys.modules['click'] = None; import lars_fused.study.cli"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("lars-study needs click, which is not installed: pip install")
    assert len(run.stderr.splitlines()) == 1
