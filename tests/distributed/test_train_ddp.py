"""The example script: what its log says, that it resumes bitwise, that both kinds of data work."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(
    r"step (\d+)/\d+ loss (\S+) lr (\S+) \S+ ms optimizer \S+ % \d+ images/s noise scale (\S+)"
)


def trained(rank, size, *options):
    """Run the script in this process; the log and a digest of the final weights."""
    import torch

    sys.path.insert(0, str(ROOT / "examples"))
    import train_ddp

    lines = []
    arguments = train_ddp.options([*options])
    trainer = train_ddp.Trainer(arguments, torch.device("cpu"))
    trainer.say = lambda line, bar=None: lines.append(line)
    trainer.run()
    digest = hashlib.sha256()
    for p in trainer.model.parameters():
        digest.update(p.detach().contiguous().numpy().tobytes())
    return lines, digest.hexdigest()


def figures(lines):
    """(step, loss, lr, noise scale) of every step; times differ from run to run."""
    return [match.groups() for match in map(LINE.fullmatch, lines) if match]


# 125 images a rank in micro-batches of 42, 42 and 41.
BF16 = ["--epochs", "2", "--global-batch", "250", "--micro-batch", "50", "--warmup-epochs", "1"]
SMALL = [*BF16, "--no-bf16"]  # six times as fast where a CPU has no bf16 of its own


def test_resumes_bitwise_and_overlaps_bitwise(two, tmp_path):
    whole, weights = two.run(trained, *SMALL)[0]
    assert len(figures(whole)) == 10
    assert [line for line in whole if "test accuracy" in line][-1].startswith("epoch 2: ")
    stored = ["--checkpoint", str(tmp_path / "run.pt")]
    first, _ = two.run(trained, *SMALL, *stored, "--stop-after", "7")[0]
    second, resumed = two.run(trained, *SMALL, *stored)[0]
    assert figures(first) + figures(second) == figures(whole)
    assert resumed == weights
    overlapped, same = two.run(trained, *SMALL, "--overlap")[0]
    assert figures(overlapped) == figures(whole)
    assert same == weights


def test_bf16_begins_as_fp32_does(two):
    exact, narrow = (
        [float(loss) for _, loss, _, _ in figures(two.run(trained, *options)[0][0])]
        for options in ([*SMALL, "--stop-after", "3"], [*BF16, "--stop-after", "3"])
    )
    assert narrow != exact
    assert narrow == pytest.approx(exact, rel=1e-2)


def test_trains_on_a_folder_of_images(two, tmp_path):
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    generator = numpy.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 255, (40, 48, 3), dtype=numpy.uint8)
                image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    options = ["--data", str(tmp_path), "--image-size", "32", "--epochs", "1"]
    lines, _ = two.run(trained, *options, "--global-batch", "8", "--no-bf16")[0]
    assert len(figures(lines)) == 1
    assert lines[-1].startswith("epoch 1: test accuracy")


@pytest.mark.slow
def test_runs_under_torchrun():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, "examples/train_ddp.py", *SMALL],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(figures(done.stdout.splitlines())) == 10
