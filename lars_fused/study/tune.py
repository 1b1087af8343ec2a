"""How the demonstration's learning rates were chosen: `python -m lars_fused.study.tune`.

The last 250 training images are held out and stand in for the test set, which is never looked at.
Three seeds (100 to 102, which the demonstration does not use) are averaged for every setting.
"""

from __future__ import annotations

import argparse
import statistics

from lars_fused.study.digits import Digits, hold_out, load
from lars_fused.study.training import SGD_BATCH, Recipe, lars, sgd, train

SEEDS = (100, 101, 102)
SGD_RATES = (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
TRUST_COEFFICIENTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


def score(data: Digits, recipe: Recipe, epochs: float, batch: int) -> tuple[float, float, float]:
    """Mean and standard deviation of the held-out accuracy, and mean of the last loss."""
    runs = [
        train(data, recipe, seed=seed, epochs=epochs, batch=batch, evaluations=1) for seed in SEEDS
    ]
    accuracies = [run.accuracy for run in runs]
    loss = statistics.mean(run.losses[-1] for run in runs)
    return statistics.mean(accuracies), statistics.stdev(accuracies), loss


def main() -> None:
    """Prints one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch", type=int, default=1024, help="the large batch")
    arguments = parser.parse_args()
    data = hold_out(load(), 250)
    epochs, large = arguments.epochs, arguments.batch
    count = len(data.test_labels)
    print(f"{epochs:g} epochs, {len(SEEDS)} seeds, accuracy on {count} held-out training images")
    tried = [(batch, sgd(batch, lr)) for batch in (SGD_BATCH, large) for lr in SGD_RATES]
    tried += [(large, lars("torch", trust=trust)) for trust in TRUST_COEFFICIENTS]
    for batch, recipe in tried:
        mean, std, loss = score(data, recipe, epochs, batch)
        result = f"{mean:6.2f} ± {std:5.2f} %  last loss {loss:.4f}"
        print(f"{recipe.name:4s} batch {batch:5d}  {result}  {recipe.settings}", flush=True)


if __name__ == "__main__":
    main()
