"""The model of a launch and the quality of its plan, in one table: ``python -m bench.traffic``.

Every number that comes out of here is a PREDICTION of a model, never a measurement.

`launch_model`, `resident_model` and `cache_model` say what is simulated; "H200 as published" is the
GPU before one was measured. ``--default``: only the orders and constants that `kernels/tuning.py`
launches, those of `lars_resident` (order "resident") for every list, also where `lars_step` is
chosen. Columns beside the model's bytes and times:

    cover       items between the last norm of a tensor and its first update, as a share of the
                programs: the least of all tensors that wait, and of half of them
    between_mb  MB of w and g read for norms, and with those of v updated, between the two reads of
                a chunk: the most of all chunks. The first is what a cache must hold if finished
                updates leave it first (`evict_first` honoured), the second if they do not
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from bench.cache_model import GPUS, Gpu, Traffic
from bench.environment import commit
from bench.launch_model import NOW, Geometry, Timing, simulate
from bench.models import MODELS, adapted
from bench.resident_model import HELD, simulate_resident
from lars_fused._engine.plan import Plan, make_plan, unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import NORM, UPDATE

RESULTS = Path(__file__).parent / "results" / "traffic"
ROW = tuning.row_for("sm_90")


@dataclass(frozen=True)
class Choice:
    """What a row of `kernels/tuning.py` fixes; the defaults are those of the row for sm_90.

    ``evict_first``: whether the hardware honours the hint. ``window``: a share of the L2 size.
    """

    order: str = ROW.order
    lag: float = ROW.lag
    evict_first: bool = True
    per_sm: int = ROW.programs
    block: int = ROW.block
    chunk: int = ROW.chunk
    window: float = tuning.WINDOW_SHARE
    slots: int = 0
    """Chunks that a worker of `lars_resident` holds (order "resident")."""
    finishers: int = ROW.finishers

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.chunk, self.block, self.per_sm, evict_first=self.evict_first)

    def workers(self, gpu: Gpu) -> int:
        """Programs that take items."""
        return self.per_sm * gpu.multiprocessors - self.finishers


_HELD = tuning.RESIDENT_ROWS["sm_9"]
RESIDENT = Choice(
    order=_HELD.order, per_sm=_HELD.programs, block=_HELD.block, chunk=_HELD.chunk,
    slots=tuning.slots(_HELD, 8), finishers=_HELD.finishers,
)  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """What a plan promises, whatever runs it; see the module's text."""

    least_cover: float
    median_cover: float
    norms_between_mb: float
    all_between_mb: float


def sizes_of(model: str) -> tuple[list[int], list[bool]]:
    """Elements of a model's tensors, and whether each is adapted."""
    shapes = MODELS[model]()
    numels = [math.prod(shape) for _, shape in shapes]
    return numels, [adapted(name, shape) for name, shape in shapes]


def planned(model: str, gpu: Gpu, choice: Choice) -> Plan:
    """The plan that is launched for a model in fp32."""
    return make_plan(
        *sizes_of(model),
        chunk=choice.chunk,
        window=int(choice.window * gpu.l2_mb * 1e6),
        lag=int(choice.lag * choice.per_sm * gpu.multiprocessors),
        bytes_per_element=8,
        order=choice.order,
        span=(choice.slots - 2) * choice.workers(gpu) if choice.slots else 0,
    )


def quality(plan: Plan, chunk: int, programs: int) -> Quality:
    """Cover of each wait, and bytes between the two reads of a chunk, of fp32 tensors."""
    kinds, tensors, chunks = unpack_items(plan.items)
    place = torch.arange(len(kinds))
    norm, update = kinds == NORM, kinds == UPDATE
    if not bool(norm.any()):
        return Quality(math.inf, math.inf, 0.0, 0.0)
    last = torch.full((plan.n_tensors,), -1).scatter_reduce(0, tensors[norm], place[norm], "amax")
    first = torch.full((plan.n_tensors,), len(kinds)).scatter_reduce(
        0, tensors[update], place[update], "amin"
    )
    waits = last >= 0
    covers = ((first - last - 1)[waits] / programs).tolist()
    # Each chunk's two places in the list, found by sorting both kinds by tensor and chunk.
    key = tensors * (int(chunks.max()) + 1) + chunks
    read, again = (place[k][key[k].argsort()] for k in (norm, update))
    megabyte = chunk / 1e6
    normed, updated = (8 * norm * megabyte).cumsum(0), (12 * update * megabyte).cumsum(0)
    norms = normed[again] - normed[read]
    return Quality(
        min(covers), median(covers), float(norms.max()),
        float((norms + updated[again] - updated[read]).max()),
    )  # fmt: skip


def predict(model: str, gpu: Gpu, choice: Choice, timing: Timing = NOW) -> Traffic:
    """Bytes and time of one step of a model in fp32."""
    plan, numels = planned(model, gpu, choice), sizes_of(model)[0]
    if choice.slots:
        return simulate_resident(
            plan, numels, gpu, choice.geometry, choice.slots, choice.finishers, timing
        )
    return simulate(plan, numels, gpu, choice.geometry, timing)


def sweep() -> list[tuple[str, str, Choice]]:
    """(model, GPU, choice): what is launched for all, then one thing at a time on the H200."""
    cases = [(m, g, Choice(evict_first=e)) for m in MODELS for g in GPUS for e in (True, False)]
    cases += [(m, g, RESIDENT) for m in MODELS for g in GPUS if g.startswith("H")]
    few = ("ResNet-50", "ViT-B/16", "AlexNet")
    variants = [Choice(order="grouped")]
    variants += [Choice(lag=lag) for lag in (0.25, 0.5, 0.75, 1.5)]
    variants += [Choice(per_sm=n) for n in (3, 5, 6)]
    variants += [Choice(block=4096), Choice(block=1024), Choice(block=4096, chunk=8192)]
    for choice in variants:
        cases += [(m, "H200", replace(choice, evict_first=e)) for m in few for e in (True, False)]
    return cases


def line(model: str, gpu: Gpu, choice: Choice) -> dict[str, object]:
    """One line of the table."""
    programs = choice.workers(gpu)
    traffic = predict(model, gpu, choice)
    rate = gpu.held_tbps if choice.slots else gpu.dram_tbps
    plan = quality(planned(model, gpu, choice), choice.chunk, programs)
    return {
        "model": model,
        "gpu": gpu.name,
        **{name: int(x) if name == "evict_first" else x for name, x in asdict(choice).items()},
        "bytes_per_parameter": round(traffic.per_parameter, 3),
        "model_us": round(traffic.us, 1),
        "floor_20_us": round(20 * traffic.parameters / rate * 1e-6, 1),
        "wait_us_per_program": round(traffic.wait_us / programs, 1),
        "least_cover": round(plan.least_cover, 2),
        "median_cover": round(plan.median_cover, 2),
        "norms_between_mb": round(plan.norms_between_mb, 1),
        "all_between_mb": round(plan.all_between_mb, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "prediction.csv")
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--gpu", choices=GPUS, help="only this GPU")
    parser.add_argument("--default", action="store_true", help="no sweeps")
    chosen = parser.parse_args(arguments)
    sha, dirty = commit()
    header = [
        "PREDICTION of a discrete-event model; nothing here was measured",
        f"commit {sha}{'-dirty' * dirty}; "
        f"python {platform.python_version()}; torch {torch.__version__}",
        f"command: {parser.prog} {' '.join(sys.argv[1:] if arguments is None else arguments)}",
        *(str(gpu) for gpu in GPUS.values()),
        f"{NOW}; {HELD}",
    ]
    print("\n".join(header))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    with chosen.output.open("w", newline="") as file:
        file.writelines(f"# {text}\n" for text in header)
        table: csv.DictWriter[str] | None = None
        for model, gpu, choice in sweep():
            if chosen.default and replace(choice, evict_first=True) not in (Choice(), RESIDENT):
                continue
            if chosen.model not in (None, model) or chosen.gpu not in (None, gpu):
                continue
            row = line(model, GPUS[gpu], choice)
            if table is None:
                table = csv.DictWriter(file, row, lineterminator="\n")
                table.writeheader()
                print("  ".join(row))
            table.writerow(row)
            file.flush()
            print("  ".join(map(str, row.values())), flush=True)
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
