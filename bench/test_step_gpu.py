"""GPU time and host time of one step: ours, the floors and the peers, by model and dtype.

The order is that of importance, for a run whose time is up leaves out the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from bench.cases import DTYPES, SWEEP, Case, model_case, slug, sweep_case
from bench.harness import COPY, Builders, GateError, Measured, Recorder, measure
from bench.models import MODELS
from bench.peers import COMPILED, EAGER, FLOOR, LADDER, ONE, PROJECTS
from bench.timers import Budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda finds none"),
]

_FIRST = ("ResNet-50", "ViT-B/16", "one 100M tensor")
_OTHERS = tuple(name for name in MODELS if name not in _FIRST)
_FP32, *_MIXED = DTYPES
_BRIEF = {**LADDER, "foreach LARS": EAGER["foreach LARS"]}
_WITH_COMPILED = {name: LADDER[name] for name in (FLOOR, ONE)} | COMPILED


class Run(NamedTuple):
    """Variants that are timed side by side in one case."""

    label: str
    make: Callable[[], Case]
    builders: Builders
    seconds: float = 0.0  # what must be left for it to begin


def _models(names: tuple[str, ...], dtypes: list[str], builders: Builders, end: str) -> list[Run]:
    return [
        Run(
            f"{slug(name)}-{slug(dtype)}{end}", functools.partial(model_case, name, dtype), builders
        )
        for dtype in dtypes
        for name in names
    ]


RUNS = [
    *_models(_FIRST, [_FP32], {**LADDER, **EAGER, **PROJECTS}, ""),
    *_models(_FIRST, _MIXED, _BRIEF, ""),
    *[Run(f"sweep{n:.0e}", functools.partial(sweep_case, n), _BRIEF) for n in SWEEP],
    *_models(_OTHERS, [_FP32], {**LADDER, **EAGER, **PROJECTS}, ""),
    *[
        run._replace(seconds=60)
        for run in _models(_FIRST[:2], [_FP32], _WITH_COMPILED, "-compiled")
    ],
    *_models(_OTHERS, _MIXED, _BRIEF, ""),
]
_PARAMETERS = [
    pytest.param(run, name, id=f"{run.label}-{name}")
    for run in RUNS
    for name in (COPY, *run.builders)
]


@pytest.fixture(scope="module")
def measured(
    device: torch.device, recorder: Recorder, budget: Budget
) -> Callable[[Run], Measured | None]:
    """Measures a run when its first variant is asked for; None once the time is up."""

    @functools.cache
    def by_label(label: str) -> Measured | GateError | None:
        run = next(run for run in RUNS if run.label == label)
        if budget.left <= run.seconds:
            return None
        torch._dynamo.reset()  # its limit of recompilations counts those of earlier cases
        torch.cuda.empty_cache()
        try:
            return measure(run.make(), device, run.builders, recorder)
        except GateError as error:
            return error  # once a case, not once a variant

    def ask(run: Run) -> Measured | None:
        found = by_label(run.label)
        if isinstance(found, GateError):
            raise found
        return found

    return ask


@pytest.mark.parametrize(("run", "variant"), _PARAMETERS)
def test_step(run, variant, measured, replay):
    found = measured(run)
    if found is None:
        pytest.skip("the time is up")
    if variant in found.absent:
        pytest.skip(f"absent: {found.absent[variant]}")
    replay(found.times[variant])
