"""Every convention against its project's own equations, over a training run with everything in it:
warm-up from 0, a schedule and a sudden drop, steps without any gradient signal, layers that start
at zero, a layer that joins late and is frozen for a while.
"""

import pytest
import torch

from lars_fused import LARS, conventions
from tests.conformance import originals
from tests.conformance.trajectory import Run, check
from tests.tools import COMPILED

pytestmark = COMPILED

DECAY = 0.05  # large, so that it moves every result


def everything(run):
    return [{"params": list(run.net.parameters())}]


def split(run, **left_out):
    """Tensors of one dimension in a group of their own."""
    adapted, others = run.by_dimension()
    return [{"params": adapted}, {"params": others, **left_out}]


# name: convention and its options, LARS's groups, the original, its groups, the largest rate
CASES = {
    "paper": (
        conventions.PAPER, everything, originals.Paper, everything, {}, 4.0,
    ),
    "apex_larc": (
        conventions.APEX_LARC | {"momentum": 0.9}, everything,
        originals.ApexLarc, everything, {"momentum": 0.9}, 0.5,
    ),
    "apex_larc_scaling": (
        conventions.APEX_LARC | {"momentum": 0.9, "trust_clip": False}, everything,
        originals.ApexLarc, everything, {"momentum": 0.9, "clip": False}, 2.0,
    ),
    "apex_larc_without_momentum": (
        conventions.APEX_LARC | {"momentum": 0.0}, everything,
        originals.ApexLarc, everything, {}, 0.5,
    ),
    "apex_larc_nesterov": (
        conventions.APEX_LARC | {"momentum": 0.9, "nesterov": True}, everything,
        originals.ApexLarc, everything, {"momentum": 0.9, "nesterov": True}, 0.5,
    ),
    "torchlars": (
        conventions.TORCHLARS | {"momentum": 0.9, "dampening": 0.1}, everything,
        originals.TorchLars, everything, {"momentum": 0.9, "dampening": 0.1}, 2.0,
    ),
    "timm": (
        conventions.TIMM | {"momentum": 0.9},
        lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.Timm, lambda run: split(run, weight_decay=0), {"momentum": 0.9}, 2.0,
    ),
    "timm_nlarc": (
        conventions.TIMM | {"momentum": 0.9, "nesterov": True, "trust_clip": True},
        lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.Timm, lambda run: split(run, weight_decay=0),
        {"momentum": 0.9, "nesterov": True, "trust_clip": True}, 0.5,
    ),
    "mae": (
        conventions.MAE, lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.Mae, split, {}, 4.0,
    ),
    "simclr": (
        conventions.SIMCLR, lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.SimClr, lambda run: split(run, adapted=False, weight_decay=0.0), {}, 4.0,
    ),
    "simclr_nesterov": (
        conventions.SIMCLR | {"nesterov": True}, everything,
        originals.SimClr, everything, {"use_nesterov": True}, 4.0,
    ),
    "barlow": (
        conventions.MAE, lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.Barlow, split, {"weight_decay_filter": True, "lars_adaptation_filter": True}, 4.0,
    ),
    "dino": (
        conventions.MAE, lambda run: split(run, adapt=False, weight_decay=0.0),
        originals.Dino, split, {}, 4.0,
    ),
    "rocm_fused_lars": (
        conventions.PAPER | {"eps": 0.0, "nesterov": True}, everything,
        originals.RocmFusedLars, everything, {"momentum": 0.9, "nesterov": True}, 4.0,
    ),
}  # fmt: skip


def test_every_convention_is_compared_with_an_original():
    for name in conventions.__all__:
        fixed = dict(getattr(conventions, name)).items()
        compared = any(fixed <= dict(case[0]).items() for case in CASES.values())
        assert compared, f"add a case of {name}, compared with its class in originals.py"


REPEATS = {"apex_larc_without_momentum", "apex_larc_nesterov", "barlow", "dino", "rocm_fused_lars"}
# Beyond those of the stored values: the sum of squares and the root behind q (8, by blocks), and
# g·s, βw, +, ·unit, ·gain, μv, τu, +, ·out, − from a gradient to a weight.
ROUNDINGS = {"torch": 1, "triton": 20}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_the_original(name, backend, device, tier):
    convention, groups, original, original_groups, options, peak = CASES[name]
    size = {"width": 16, "steps": 50}
    if tier == "ptx":  # slow; what follows a step is the same for any number of them
        if name in REPEATS:
            pytest.skip("for time: other cases here have the same options")
        size = {"width": 16, "steps": 10}
    run = Run(peak=peak, device=device, **size)
    other = original(original_groups(run), lr=0.0, weight_decay=DECAY, **options)
    ours = LARS(groups(run), 0.0, **{"weight_decay": DECAY, **convention}, backend=backend)
    check(run, ours, other, ROUNDINGS[backend])


@pytest.mark.parametrize("lr", [0.5, 4.0])
def test_where_timm_differs_it_clips_the_ratio_of_a_zero_norm(lr, backend, device):
    """The difference that docs/implementations.md names: none up to γ = 1, a factor γ above."""
    g = torch.arange(1.0, 7.0).reshape(2, 3)
    theirs = originals.Timm([{"params": [torch.zeros(2, 3)]}], lr=lr, weight_decay=DECAY,
                            trust_clip=True)  # fmt: skip
    theirs.step([g])
    p = torch.nn.Parameter(torch.zeros(2, 3, device=device))
    p.grad = g.to(device)
    convention = conventions.TIMM | {"trust_clip": True}
    LARS([p], lr, weight_decay=DECAY, **convention, backend=backend).step()
    ratio = (p.detach().cpu().double() / theirs.weights[0]).mean()
    torch.testing.assert_close(ratio, torch.tensor(max(lr, 1.0), dtype=torch.float64))
