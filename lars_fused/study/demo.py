"""Train a small network on real images at batch 1,024 with LARS, and with SGD beside it.

`python -m lars_fused.study.demo` (or `make demo`). It is a demonstration on 1,297 training images,
not a claim: it prints what comes out, whichever way that is.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lars_fused.study import demo_report as report
from lars_fused.study.data import Data, load
from lars_fused.study.demo_recipes import WARMUP, Recipe, lars, sgd, sgd_tuned, shared
from lars_fused.study.loop import Trainer
from lars_fused.study.networks.alexnet import small_alexnet_bn
from lars_fused.study.order import steps_for
from lars_fused.study.replay import Difference, Recorder, replay, replay_interpreted

REPLAYED_STEPS = 3


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: nothing is trained before every option is known to be usable."""
    parser = argparse.ArgumentParser(prog="lars_fused.study.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each optimizer (3)")
    parser.add_argument("--epochs", type=float, default=40, help="epochs to train (40)")
    parser.add_argument("--batch", type=int, default=1024, help="batch size (1,024)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for the files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds, 3 epochs, one step replayed: does it run?"
    )
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.seeds, chosen.epochs = 2, 3
    if chosen.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {chosen.seeds}")
    if not 0 < chosen.epochs < math.inf:
        parser.error(f"--epochs must be positive, not {chosen.epochs}")
    images = len(load("digits").train)
    if not 2 <= chosen.batch <= images:
        parser.error(f"--batch must lie in 2..{images} (the training images), not {chosen.batch}")
    return chosen


def train_all(
    data: Data, recipes: list[Recipe], args: argparse.Namespace
) -> tuple[list[report.Run], Recorder]:
    """Every recipe with every seed, and the first steps of the first LARS run."""
    # Imported here, as matplotlib and scikit-learn are: all of the extra `study`.
    from tqdm import tqdm

    recorder = Recorder(1 if args.quick else REPLAYED_STEPS)
    runs: list[report.Run] = []
    steps = steps_for(args.epochs, args.batch, len(data.train))
    total = steps * len(recipes) * args.seeds
    # A bar in a file is noise: without a terminal the line of each finished run is the progress.
    with tqdm(total=total, unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        for recipe in recipes:
            for seed in range(args.seeds):
                watch = recorder if recipe.name == "LARS" and seed == 0 else None
                settings = replace(recipe.settings, seed=seed)
                trainer = Trainer(settings, data, model=small_alexnet_bn, recorder=watch)

                def progress(trainer: Trainer, name: str = recipe.name) -> None:
                    loss = trainer.history.losses[-1]
                    seed = trainer.settings.seed
                    bar.set_postfix_str(f"{name}, seed {seed}, loss {loss:.3f}", False)
                    bar.update()

                run = report.Run(recipe.name, seed, trainer.run(progress), trainer.seconds)
                runs.append(run)
                bar.write(
                    f"  {run.recipe:11s} seed {seed}: {run.accuracy:6.2f} %  ({run.seconds:.1f} s)"
                )
                sys.stdout.flush()
    return runs, recorder


def compare_backends(recorder: Recorder, device: torch.device) -> Difference | None:
    """The first steps once more through whichever of the two backends did not train."""
    if device.type == "cuda":
        return replay(recorder, "torch")
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    return replay_interpreted(recorder)


def describe(difference: Difference | None) -> str:
    """The outcome of the replay as text."""
    if difference is None:
        return "The kernels were not replayed: triton is not installed (it is built for Linux)."
    steps = "LARS step" if difference.steps == 1 else f"{difference.steps} LARS steps"
    what = {
        "triton": "the real kernels under Triton's interpreter",
        "torch": "the portable backend",
    }
    return (
        f"The first {steps} replayed through {what[difference.backend]}:"
        f"\nlargest difference {difference.absolute:.2e}, {difference.relative:.2e} of the largest "
        f"weight of its tensor, over {difference.values:,} weights (float32 resolves 1.19e-07)."
    )


def main(argv: list[str] | None = None) -> int:
    """Trains, reports, replays, saves."""
    args = options(argv)
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        print(f"GPU: {torch.cuda.get_device_name()}: LARS trains with the kernels.")
    else:
        print("No GPU: LARS trains with the portable backend; its first steps are replayed below.")
    data = load("digits")
    base = shared(args.epochs, args.batch)
    recipes = [lars(base), sgd(base), sgd_tuned(base)]
    images = len(data.train)
    steps = steps_for(args.epochs, args.batch, images)
    title = (
        f"{images:,} handwritten digits, batch {args.batch:,}, {args.epochs:g} epochs "
        f"({steps} steps), {args.seeds} seeds"
    )
    print(f"{title}; {len(data.test)} images to test")
    for recipe in recipes:
        print(f"  {recipe.name:11s} {recipe.about}", flush=True)

    runs, recorder = train_all(data, recipes, args)
    print(f"\n{report.accuracy_table(runs)}")
    ours, *others = report.by_recipe(runs).values()
    for theirs in others:
        print(report.verdict(ours, theirs))
    # In the network's order; the optimizer's is by group.
    stats = {name: recorder.layer_stats[name] for name, _ in small_alexnet_bn().named_parameters()}
    print(f"\nFirst LARS step, seed 0, by layer:\n{report.layer_table(stats)}")
    difference = compare_backends(recorder, device)
    print(f"\n{describe(difference)}")

    report.plot(runs, args.batch / images, WARMUP * args.epochs, title, args.out / "curves.png")
    facts = {
        "settings": {recipe.name: recipe.about for recipe in recipes},
        "seeds": args.seeds,
        "epochs": args.epochs,
        "batch": args.batch,
        "steps": steps,
        "device": str(device),
        "torch": torch.__version__,
        "replay": asdict(difference) if difference else None,
    }
    report.save(runs, stats, facts, args.out)
    print(
        f"\nFiles in {args.out.resolve()}: curves.png, curves.csv, layers.csv, summary.json "
        f"({time.perf_counter() - began:.0f} s in all)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
