"""The protocol of every figure: the correctness gate, interleaved variants, quartiles, raw rows.

A case is built once: every variant owns copies of the same tensors. The first step of each variant
that names the reference's options is compared with the reference; if one of ours disagrees, the
case is not timed. `timers` explains how a sample is taken.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor

from bench import environment
from bench.cases import Case
from bench.peers import OURS
from bench.raw import COPY
from bench.timers import host_us, interleave, timer_for
from bench.variants import Inputs, Variant
from lars_fused._engine import portable
from lars_fused.reference import Options

Builders = dict[str, Callable[[Inputs], Variant]]


class GateError(RuntimeError):
    """Ours disagrees with the reference: nothing may be reported."""


@dataclass(frozen=True)
class Row:
    """One line of raw.csv. `bytes`: what the algorithm must move (for `copy`: what it moved)."""

    case: str
    variant: str
    dtype: str
    n_tensors: int
    n_params: int
    bytes: int
    p25: float
    p50: float
    p75: float
    unit: str
    kind: str
    gpu: str
    driver: str
    torch: str
    triton: str
    sha: str
    utc: str


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return (samples[0],) * 3
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return low, middle, high


class Recorder:
    """Rows of this run; appended to raw.csv immediately, so that an aborted run keeps them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.rows = folder, list[Row]()
        sha, dirty = environment.commit()
        self._same = {
            "gpu": environment.gpu_name(),
            "driver": environment.driver(),
            "torch": torch.__version__,
            "triton": environment.version("triton"),
            "sha": f"{sha}-dirty" if dirty else sha,
        }

    def add(
        self, case: str, variant: str, samples: Sequence[float], *, dtype: str = "fp32",
        n_tensors: int = 0, n_params: int = 0, bytes: int = 0, unit: str = "us", kind: str = "gpu",
        utc: str = "",
    ) -> None:  # fmt: skip
        figures = (round(x, 3) for x in quartiles(samples))
        row = Row(
            case, variant, dtype, n_tensors, n_params, bytes, *figures, unit, kind,
            **self._same, utc=utc or environment.now(),
        )  # fmt: skip
        self.rows.append(row)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "raw.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            if new:
                table.writeheader()
            table.writerow(asdict(row))

    def note(self, **entries: object) -> None:
        if self.folder is not None:
            environment.note(self.folder, **entries)


class Truth:
    """The float64 reference's step for some inputs, once for each set of options."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[tuple[Options, ...], tuple[list[Tensor], list[Tensor]]] = {}

    def step(self, options: list[Options]) -> tuple[list[Tensor], list[Tensor]]:
        """New weights and momentum, each stored value rounded once."""
        key = tuple(options)
        if key not in self._known:
            w, v = ([t.clone() for t in ts] for ts in (self.inputs.w, self.inputs.v))
            none, stepped = [None] * len(w), [False] * len(w)
            portable.step_(w, self.inputs.g, v, none, options, stepped, size=1 << 24)
            self._known[key] = w, v
        return self._known[key]


def disagreement(variant: Variant, truth: Truth) -> float:
    """Take one step: the largest error over its bound.

    The bound: one ulp of the storage dtype (reference and variant may round in different
    directions), and 4e-6 of the tensor's root mean square for fp32 sums.
    """
    assert variant.options is not None
    w, v = truth.step(variant.options)
    variant.step()
    pairs = list(zip(w, variant.weights(), strict=True))
    if variant.momenta is not None:
        pairs += zip(v, variant.momenta(), strict=True)
    worst = 0.0
    for right, got in pairs:
        if right.numel() == 0:
            continue
        true, found = right.float(), got.detach().to(right.device).float()
        bound = torch.finfo(right.dtype).eps * true.abs() + 4e-6 * true.square().mean().sqrt()
        ratio = ((found - true).abs() / bound).max()
        worst = max(worst, float(ratio.nan_to_num(nan=math.inf)))
    return worst


@dataclass
class Measured:
    """Samples of each variant, and why some variants are missing."""

    times: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def reason(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:160]


def build(case: Case, device: torch.device, builders: Builders) -> tuple[
    dict[str, Variant], dict[str, str]
]:  # fmt: skip
    """The variants that run and agree with the reference, and what is wrong with the others.

    Raises:
        GateError: if one of ours disagrees.
    """
    variants: dict[str, Variant] = {}
    absent: dict[str, str] = {}
    inputs = case.inputs(device)
    truth = Truth(inputs)
    for name, builder in builders.items():
        try:
            variant = builder(inputs)
            if variant.options is not None:
                # Other projects round more often in 16-bit arithmetic than we do.
                allowed = 1.0 if name in OURS else 100.0 if case.exact else 1e4
                error = disagreement(variant, truth)
                if not error <= allowed:
                    text = f"{name}, {case.name}, {case.dtype}: error {error:.3g} times its bound"
                    raise GateError(text)
            for _ in range(3):
                if variant.prepare:
                    variant.prepare()
                variant.step()
            variants[name] = variant
        except Exception as error:
            if name in OURS:
                raise
            absent[name] = reason(error)
    return variants, absent


def measure(
    case: Case, device: torch.device, builders: Builders, recorder: Recorder, *,
    rounds: int = 50, seconds: float = 6.0, host: bool = True,
) -> Measured:  # fmt: skip
    """Gate, time and record one case: GPU time (or wall time on a CPU), host time, copy.

    Where one of ours disagrees with the reference, that is noted under "gate".
    """
    try:
        variants, absent = build(case, device, builders)
    except GateError as error:
        recorder.note(gate={f"{case.name}, {case.dtype}": str(error)})
        raise
    timer = timer_for(device)
    size = case.copy_elements(device)
    source, target = (torch.ones(size, device=device) for _ in range(2))
    variants[COPY] = Variant(lambda: target.copy_(source), list)
    found = Measured(absent=absent)
    found.times = interleave({n: timer.ready(v) for n, v in variants.items()}, rounds, seconds)
    if host and timer.kind == "gpu":
        calls = {n: v for n, v in variants.items() if not v.chained and n != COPY}
        found.host = interleave(
            {n: _host_sampler(v, device) for n, v in calls.items()}, rounds // 2, seconds / 2
        )
    utc = environment.now()
    facts = {"dtype": case.dtype, "n_tensors": len(case.shapes), "n_params": case.n_params}
    for kind, taken in ((timer.kind, found.times), ("host", found.host)):
        for name, samples in taken.items():
            moved = 8 * size if name == COPY else case.least_bytes
            recorder.add(case.name, name, samples, **facts, bytes=moved, kind=kind, utc=utc)
    bound = [name for name, variant in variants.items() if variant.host_bound]
    recorder.note(host_bound={f"{case.name}, {case.dtype}": bound} if bound else {})
    recorder.note(absent={f"{case.name}, {case.dtype}, {n}": why for n, why in absent.items()})
    return found


def _host_sampler(variant: Variant, device: torch.device) -> Callable[[], float]:
    def sample() -> float:
        if variant.prepare:
            variant.prepare()
        return host_us(variant.step, device)

    return sample
