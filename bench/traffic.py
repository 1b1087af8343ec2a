"""Predicted DRAM bytes of the ordered work list: ``python -m bench.traffic``.

Every number that comes out of here is a PREDICTION of a model, never a measurement.

`cache_model` says what is simulated. ``--default``: only the present order and constants.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cache_model import (
    BLOCK,
    GPUS,
    ITEM_US,
    PUBLISH_US,
    ROUND_TRIP_US,
    USABLE_L2,
    Gpu,
    Traffic,
    simulate,
)
from bench.environment import commit
from bench.models import MODELS, adapted
from lars_fused.plan import make_plan

RESULTS = Path(__file__).parent / "results" / "traffic"


@dataclass(frozen=True)
class Choice:
    """What a row of kernels/tuning.py fixes.

    ``window`` is a share of the L2 size: of the 0.7 that are usable, w and g may take 8 bytes in
    12, for v comes between the two reads as well. ``lag`` is a multiple of the programs.
    """

    chunk: int = 4096
    per_sm: int = 4
    window: float = 0.47
    lag: float = 1.0
    order: str = "grouped"
    evict_first: bool = False

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of w and g on the way to one multiprocessor."""
        return self.per_sm * min(BLOCK, self.chunk) * 8


def predict(model: str, gpu: Gpu, choice: Choice) -> Traffic:
    shapes = MODELS[model]()
    numels = [math.prod(shape) for _, shape in shapes]
    adapt = [adapted(name, shape) for name, shape in shapes]
    programs = choice.per_sm * gpu.multiprocessors
    plan = make_plan(
        numels,
        adapt,
        chunk=choice.chunk,
        window=int(choice.window * gpu.l2_mb * 1e6),
        in_flight=max(1, int(choice.lag * programs)),
        bytes_per_element=8,
        order=choice.order,
    )
    return simulate(
        plan,
        numels,
        chunk=choice.chunk,
        programs=programs,
        capacity=gpu.capacity,
        # Coarser where a model is large: the outcome differs in the second decimal.
        granule=BLOCK if sum(numels) < 5e7 else 2 * BLOCK,
        evict_first=choice.evict_first,
        dram_tbps=gpu.dram_tbps,
        l2_tbps=gpu.l2_tbps,
    )


def sweep() -> list[tuple[str, str, Choice]]:
    """(model, GPU, choice): the default for all, then one thing at a time on the H200."""
    cases = [(m, g, Choice()) for m in MODELS for g in GPUS]
    small = ("ResNet-50", "ViT-B/16", "AlexNet")
    for chunk in (4096, 8192, 16384, 32768, 65536):
        # With more than 64K elements in flight a multiprocessor, nearly every second read misses.
        for per_sm in (x for x in (1, 2, 3, 4, 6, 8) if x * chunk <= 1 << 16):
            cases += [(m, "H200", Choice(chunk=chunk, per_sm=per_sm)) for m in small]
    for window in (0.37, 0.42, 0.57, 0.7):
        cases += [(m, "H200", Choice(window=window)) for m in small]
    for lag in (0.25, 0.5, 1.5, 2.0):
        cases += [(m, "H200", Choice(lag=lag)) for m in small]
    for order, evict_first in (("grouped", True), ("sliding", False), ("sliding", True)):
        for chunk, per_sm in ((4096, 4), (8192, 3), (8192, 4)):
            choice = Choice(chunk, per_sm, order=order, evict_first=evict_first)
            cases += [(m, "H200", choice) for m in small]
    return list(dict.fromkeys(cases))


def write(path: Path, header: list[str], rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "prediction.csv")
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--gpu", choices=GPUS, help="only this GPU")
    parser.add_argument("--default", action="store_true", help="no sweeps")
    chosen = parser.parse_args(arguments)
    sha, dirty = commit()
    header = [
        "PREDICTION of a cache simulation; nothing here was measured",
        f"commit {sha}{'-dirty' * dirty}; "
        f"python {platform.python_version()}; torch {torch.__version__}",
        f"command: {parser.prog} {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        f"usable L2 {USABLE_L2}, block {BLOCK}, item {ITEM_US} us, publish {PUBLISH_US} us, "
        f"round trip {ROUND_TRIP_US} us",
    ]
    columns = "{:20} {:5} {:>6} {:>6} {:>6} {:>4} {:8} {:5} {:>6} {:>8} {:>9} {:>9} {:>7}"
    names = "model gpu chunk per_sm window lag order evict kb_sm B/param model_us floor_us wait_us"
    print("\n".join(header))
    print(columns.format(*names.split()))
    rows: list[dict[str, object]] = []
    for model, gpu_name, choice in sweep():
        if chosen.default and choice != Choice():
            continue
        if chosen.model not in (None, model) or chosen.gpu not in (None, gpu_name):
            continue
        gpu = GPUS[gpu_name]
        traffic = predict(model, gpu, choice)
        row: dict[str, object] = {
            "model": model,
            "gpu": gpu_name,
            "chunk": choice.chunk,
            "programs_per_sm": choice.per_sm,
            "window_of_l2": choice.window,
            "lag_of_programs": choice.lag,
            "order": choice.order,
            "evict_first": int(choice.evict_first),
            "in_flight_kb_per_sm": round(choice.in_flight_bytes / 1000, 1),
            "bytes_per_parameter": round(traffic.per_parameter, 3),
            "model_us": round(traffic.us, 1),
            "floor_20_us": round(20 * traffic.parameters / gpu.dram_tbps * 1e-6, 1),
            "wait_us_per_program": round(
                traffic.wait_us / (choice.per_sm * gpu.multiprocessors), 1
            ),
        }
        rows.append(row)
        print(columns.format(*map(str, row.values())), flush=True)
    write(chosen.output, header, rows)
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
