"""Norms by layer: Table 2 and Figure 2 of the LARS paper, and the bound of its equation 7."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from lars_fused import conventions
from lars_fused.study.errors import StudyError
from lars_fused.study.history import LayerNorms
from lars_fused.study.plans import StudyPlan
from lars_fused.study.runs import Result
from lars_fused.study.settings import Settings


@dataclass(frozen=True)
class Plan(StudyPlan):
    """LARS and SGD on one network at several batch sizes; `base` is what they share."""

    batches: tuple[int, ...]
    lars_lr: float
    sgd_lr: float

    def runs(self) -> list[Settings]:
        """LARS first, then SGD, whose rate is given for the smallest batch and scaled."""
        lars = [
            replace(self.base, optimizer="lars", lr=self.lars_lr, batch=batch)
            for batch in self.batches
        ]
        sgd = [
            replace(
                self.base,
                optimizer="sgd",
                lr=self.sgd_lr,
                scaling="linear",
                base_batch=self.batches[0],
                batch=batch,
            )
            for batch in self.batches
        ]
        return [*lars, *sgd]


@dataclass(frozen=True)
class FirstStep:
    """A row of Table 2: the norms of one tensor at step 1."""

    name: str
    weight: float
    gradient: float
    trust_ratio: float | None

    @property
    def ratio(self) -> float:
        """N(w)/N(g); infinite without a gradient."""
        return self.weight / self.gradient if self.gradient else math.inf


def first_step(result: Result) -> list[FirstStep]:
    """Every tensor of a run at its first step."""
    if not result.history.layers:
        raise StudyError("the run recorded no norms: it needs --layers")
    seen: LayerNorms = result.history.layers[0]
    ratios: list[float | None] = [*seen["trust_ratio"]] or [None] * len(seen["weight"])
    columns = (result.history.layer_names, seen["weight"], seen["gradient"], ratios)
    return [FirstStep(*row) for row in zip(*columns, strict=True)]


def spread(rows: list[FirstStep]) -> tuple[FirstStep, FirstStep]:
    """The tensors with the smallest and the largest N(w)/N(g), of those that have both norms."""
    usable = [row for row in rows if row.weight and row.gradient]
    return min(usable, key=lambda r: r.ratio), max(usable, key=lambda r: r.ratio)


@dataclass(frozen=True)
class Bound:
    """Equation 7 for one tensor, over the recorded steps of a run.

    Attributes:
        start: N(w₀).
        grown: the largest N(wₜ)/N(w₀).
        used: the largest N(wₜ) as a share of the bound, N(w₀) exp(η Σγ); at most 1 if it held.
        with_momentum: the same with γ/(1−μ) for γ: what all steps together can move, momentum
            included, of which the paper's equation takes no account.
    """

    name: str
    start: float
    grown: float
    used: float
    with_momentum: float

    @property
    def held(self) -> bool:
        """Whether the bound held as printed; equality, up to float32's rounding, is no breach."""
        return self.used <= 1.0 + 1e-6


def bounds(result: Result) -> list[Bound]:
    """Equation 7, ‖wₜ‖ < ‖w₀‖ exp(η ∫γ), for every tensor that LARS adapts.

    The integral is the sum of γ over the steps taken before the norm was measured.
    """
    settings = result.settings
    if settings.optimizer != "lars":
        raise StudyError("equation 7 is about LARS")
    eta = settings.trust_coefficient
    eta = eta or float(getattr(conventions, settings.convention)["trust_coefficient"])
    moved = [0.0, *accumulate(result.history.rates)]
    later = result.history.layers[1:]  # at the first step both sides are N(w₀)
    at = [moved[seen["step"] - 1] for seen in later]
    found = []
    for i, name in enumerate(result.history.layer_names):
        start = result.history.layers[0]["weight"][i]
        norms = [seen["weight"][i] for seen in later]
        adapted = any(seen["trust_ratio"][i] != 1.0 for seen in result.history.layers)
        finite = [(n, m) for n, m in zip(norms, at, strict=True) if math.isfinite(n)]
        if not adapted or not start or not finite:
            continue
        grown = [n / start for n, _ in finite]
        used = [g / math.exp(eta * m) for g, (_, m) in zip(grown, finite, strict=True)]
        slower = 1.0 - settings.momentum
        wide = [g / math.exp(eta * m / slower) for g, (_, m) in zip(grown, finite, strict=True)]
        found.append(Bound(name, start, max(grown), max(used), max(wide)))
    return found
