"""How the demonstration's learning rates were chosen: `python -m lars_fused.study.tune`.

The last 250 training images are held out and stand in for the test set, which is never looked at.
Three seeds (100 to 102, which the demonstration does not use) are averaged for every setting.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from lars_fused.study.data import load
from lars_fused.study.demo_recipes import SGD_BATCH, Recipe, lars, sgd, shared
from lars_fused.study.loop import Trainer
from lars_fused.study.networks.alexnet import small_alexnet_bn

SEEDS = (100, 101, 102)
HELD_OUT = 250
SGD_RATES = (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
TRUST_COEFFICIENTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


def score(recipe: Recipe) -> tuple[float, float, float]:
    """Mean and standard deviation of the held-out accuracy, and mean of the last loss."""
    accuracies, losses = [], []
    for seed in SEEDS:
        settings = replace(recipe.settings, seed=seed, validation=HELD_OUT, evaluations=1)
        history = Trainer(settings, load("digits"), model=small_alexnet_bn).run()
        accuracies.append(history.accuracy)
        losses.append(history.losses[-1])
    return statistics.mean(accuracies), statistics.stdev(accuracies), statistics.mean(losses)


def main() -> None:
    """Prints one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch", type=int, default=1024, help="the large batch")
    arguments = parser.parse_args()
    small = shared(arguments.epochs, SGD_BATCH)
    large = shared(arguments.epochs, arguments.batch)
    print(
        f"{arguments.epochs:g} epochs, {len(SEEDS)} seeds, accuracy on {HELD_OUT} held-out "
        "training images"
    )
    tried = [sgd(base, lr) for base in (large, small) for lr in SGD_RATES]
    tried += [lars(large, trust=trust) for trust in TRUST_COEFFICIENTS]
    for recipe in tried:
        mean, std, loss = score(recipe)
        result = f"{mean:6.2f} ± {std:5.2f} %  last loss {loss:.4f}"
        print(
            f"{recipe.name:4s} batch {recipe.settings.batch:5d}  {result}  {recipe.about}",
            flush=True,
        )


if __name__ == "__main__":
    main()
