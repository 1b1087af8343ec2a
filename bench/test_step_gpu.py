"""GPU time and host time of one step: ours, the floors and the peers, by model and dtype.

Ordered by importance, because a run that is out of time skips the rest. Rows are written run by
run: the most important ones are in short runs of few variants, before the peers. Labels start with
the word that `ci/gpu.sh` selects by: first, case, peers, compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from bench.budget import Budget
from bench.cases import DTYPES, SWEEP, Case, model_case, slug, sweep_case
from bench.harness import COPY, Builders, GateError, Measured, Recorder, measure, reason
from bench.models import MODELS
from bench.peers import COMPILED, EAGER, FLOOR, LADDER, ONE, PROJECTS, TWO
from bench.supervise import Fault, Pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda finds none"),
]

_FIRST = ("ResNet-50", "ViT-B/16")
_LARGE = "one 100M tensor"
_OTHERS = tuple(name for name in MODELS if name not in (*_FIRST, _LARGE))
_FP32, *_MIXED = DTYPES
_BRIEF = {
    **{name: LADDER[name] for name in (FLOOR, ONE, TWO)}, "foreach LARS": EAGER["foreach LARS"],
}  # fmt: skip
_BESIDE = {name: LADDER[name] for name in (FLOOR, ONE)}  # ratios are taken within one run
_JAX = "optax lars, jit"  # a separate run: another runtime that starts slowly
_PEERS = {**EAGER, **{name: peer for name, peer in PROJECTS.items() if name != _JAX}}


class Run(NamedTuple):
    """Variants that are timed side by side in one case."""

    label: str
    make: Callable[[], Case]
    builders: Builders
    seconds: float = 0.0  # seconds that must be left for it to start
    limit: float = 45.0  # seconds after which it counts as hung


def _models(
    kind: str, names: tuple[str, ...], builders: Builders, dtypes: list[str] | None = None,
    **times: float,
) -> list[Run]:  # fmt: skip
    return [
        Run(
            f"{kind}-{slug(name)}-{slug(dtype)}", functools.partial(model_case, name, dtype),
            builders, **times,
        )
        for dtype in dtypes or [_FP32]
        for name in names
    ]  # fmt: skip


RUNS = [
    *_models("first", _FIRST, LADDER),
    *_models("peers", _FIRST, _BESIDE | _PEERS),
    *_models("case", (_LARGE,), _BRIEF),
    *_models("peers-jax", _FIRST, _BESIDE | {_JAX: PROJECTS[_JAX]}, limit=90),
    *_models("case", (*_FIRST, _LARGE), _BRIEF, _MIXED),
    *[Run(f"case-sweep{n:.0e}", functools.partial(sweep_case, n), _BRIEF) for n in SWEEP],
    *_models("case", _OTHERS, LADDER),
    *_models("peers", (_LARGE, *_OTHERS), _BESIDE | _PEERS),
    *_models("peers-jax", (_LARGE, *_OTHERS), _BESIDE | {_JAX: PROJECTS[_JAX]}, limit=90),
    *_models("case", _OTHERS, _BRIEF, _MIXED),
    *_models("compiled", _FIRST, _BESIDE | COMPILED, seconds=60, limit=180),
]
_PARAMETERS = [
    pytest.param(run, name, id=f"{run.label}-{name}")
    for run in RUNS
    for name in (COPY, *run.builders)
]


class Asked:
    """Measures a run when its first variant asks, and gives the others their results."""

    def __init__(
        self, device: torch.device, recorder: Recorder, budget: Budget, pieces: Pieces
    ) -> None:
        self.device, self.recorder, self.budget, self.pieces = device, recorder, budget, pieces
        self._known: dict[str, Measured | Exception | str] = {}

    def __call__(self, run: Run) -> Measured:
        if run.label not in self._known:
            self._known[run.label] = self._come_of(run)
        found = self._known[run.label]
        if isinstance(found, Exception):
            raise found
        if isinstance(found, str):
            pytest.skip(found)
        return found

    def _come_of(self, run: Run) -> Measured | Exception | str:
        if run.label in self.pieces.begun():
            return "begun by the process before this one"
        if self.budget.left <= run.seconds:
            return "the time is up"
        torch._dynamo.reset()  # its limit of recompilations counts those of earlier cases
        torch.cuda.empty_cache()
        try:
            with self.pieces.piece(run.label, run.limit, self.budget):
                return self._measured(run)
        except Fault as fault:
            pytest.exit(f"{run.label}: {fault}", returncode=1)

    def _measured(self, run: Run) -> Measured | Exception:
        try:
            return measure(run.make(), self.device, run.builders, self.recorder)
        except GateError as error:
            return GateError(str(error))  # without the traceback, which keeps its tensors alive
        except Exception as error:
            why = reason(error)
        self.recorder.note(lost={run.label: why})
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise Fault(why) from error
        return RuntimeError(why)


@pytest.fixture(scope="module")
def measured(
    device: torch.device, recorder: Recorder, budget: Budget, pieces: Pieces
) -> Callable[[Run], Measured]:
    return Asked(device, recorder, budget, pieces)


@pytest.mark.parametrize(("run", "variant"), _PARAMETERS)
def test_step(run, variant, measured, replay):
    found = measured(run)
    if variant in found.absent:
        pytest.skip(f"absent: {found.absent[variant]}")
    replay(found.times[variant])
