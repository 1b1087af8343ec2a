"""Tables and pictures of single runs."""

from __future__ import annotations

from pathlib import Path

from lars_fused.study import pictures, runs
from lars_fused.study.plans import load as load_plan
from lars_fused.study.runs import Result
from lars_fused.study.tables import data_name, network_name, table


def heading(result: Result) -> str:
    """A run in one line."""
    s = result.settings
    return (
        f"{data_name(s)}, {network_name(s)}, {s.optimizer}, batch {s.batch:,}, "
        f"lr {s.peak_lr:.4g}, {s.epochs:g} epochs, seed {s.seed}"
    )


def evaluations(result: Result) -> str:
    """What the run measured on the way."""
    share = result.epochs_per_step
    rows = [
        [
            f"{e['step'] * share:.1f}",
            str(e["step"]),
            f"{e['train_loss']:.4f}",
            f"{e['train_accuracy']:.2f}",
            f"{e['test_loss']:.4f}",
            f"{e['test_accuracy']:.2f}",
        ]
        for e in result.history.evaluations
    ]
    header = ["epoch", "step", "training loss", "training accuracy, %", "test loss"]
    return table([*header, "test accuracy, %"], rows)


def draw(result: Result, folder: Path) -> Path:
    """Losses, accuracies and learning rate over the run."""
    share = result.epochs_per_step
    history = result.history
    x = [e["step"] * share for e in history.evaluations]
    file = folder / "curves.png"
    with pictures.figure(file, heading(result), 3, width=4.4) as (losses, accuracies, rates):
        steps = [step * share for step in range(1, len(history.losses) + 1)]
        losses.plot(steps, history.losses, color="0.75", linewidth=0.8, label="each step")
        for place, name in enumerate(("train", "test")):
            which = "training images" if name == "train" else "test images"
            for axes, figure in ((losses, "loss"), (accuracies, "accuracy")):
                values = [[e[f"{name}_{figure}"]] for e in history.evaluations]  # type: ignore[literal-required]
                pictures.line(axes, x, values, which, place)
        losses.set(xlabel="epochs", yscale="log", title="Loss (log scale)")
        accuracies.set(xlabel="epochs", ylabel="%", title="Accuracy")
        rates.plot([0, *steps[:-1]], history.rates, color=pictures.COLOURS[2])
        rates.set(xlabel="epochs", title="Learning rate", ylim=(0, None))
        losses.legend(frameon=False, fontsize=8)
        accuracies.legend(frameon=False, fontsize=8)
    return file


def report(out: Path) -> str:
    """A line for every finished run in a folder, and their pictures made again."""
    load_plan(out)
    rows = []
    for path in sorted((out / "runs").glob(f"*/{runs.RESULT}")):
        result = runs.read(path)
        draw(result, path.parent)
        stopped = f"diverged at step {result.history.diverged}" if result.history.diverged else ""
        rows.append([heading(result), f"{result.accuracy:.2f}", f"{result.seconds:.0f}", stopped])
    if not rows:
        return f"no run is finished in {out}"
    return table(["run", "test accuracy, %", "seconds", ""], rows)
