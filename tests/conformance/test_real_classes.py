"""The projects' own classes beside ours, where they are installed. In float64, on the portable
backend: what is compared is the equations, to rounding.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from lars_fused import LARS, conventions
from tests.conformance import originals
from tests.conformance.trajectory import Run, check

pytestmark = pytest.mark.cpu

DECAY = 0.05


class Real:
    """A real torch optimizer with the interface of `originals`."""

    def __init__(self, groups, make):
        self.weights = [p.detach().double().clone() for g in groups for p in g["params"]]
        at = iter(self.weights)
        self.optimizer = make([{**g, "params": [next(at) for _ in g["params"]]} for g in groups])

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, grads):
        for w, g in zip(self.weights, grads, strict=True):
            w.grad = None if g is None else g.double().clone()
        self.optimizer.step()


def compare(make_other, convention, groups, peak, **options):
    run = Run(width=16, steps=50, peak=peak, dtype=torch.float64)
    ours = LARS(groups(run), 0.0, **{"weight_decay": DECAY, **convention, **options},
                backend="torch")  # fmt: skip
    check(run, ours, make_other(run), roundings=20)


def everything(run):
    return [{"params": list(run.net.parameters())}]


def split(run, **left_out):
    adapted, others = run.by_dimension()
    return [{"params": adapted}, {"params": others, **left_out}]


@pytest.fixture
def timm_lars(monkeypatch):
    """The class of timm from its own file: the package itself would need torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    for name in [n for n in sys.modules if n == "timm" or n.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    path = Path(found.submodule_search_locations[0])
    for name, folder in (("timm", path), ("timm.optim", path / "optim")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("timm.optim.lars").Lars
    for name in [n for n in sys.modules if n.startswith("timm.optim.")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "options", [{}, {"trust_clip": True}, {"nesterov": True}, {"dampening": 0.2}], ids=str
)
def test_timm(timm_lars, options):
    compare(
        lambda run: Real(
            split(run, weight_decay=0.0),
            lambda groups: timm_lars(groups, 0.0, 0.9, weight_decay=DECAY, **options),
        ),
        conventions.TIMM,
        lambda run: split(run, adapt=False, weight_decay=0.0),
        0.5,
        momentum=0.9,
        **options,
    )


@pytest.mark.parametrize("clip", [True, False])
def test_apex_larc(clip):
    parallel = pytest.importorskip("apex.parallel", reason="apex with LARC is not installed")

    def make(groups):
        sgd = torch.optim.SGD(groups, 0.1, 0.9, weight_decay=DECAY)  # LARC divides by the rate
        return parallel.LARC(sgd, clip=clip)

    compare(
        lambda run: Real(everything(run), make),
        conventions.APEX_LARC,
        everything,
        0.5,
        momentum=0.9,
        trust_clip=clip,
    )


def test_torchlars():
    torchlars = pytest.importorskip("torchlars", reason="torchlars is not installed")
    compare(
        lambda run: Real(
            everything(run),
            lambda groups: torchlars.LARS(torch.optim.SGD(groups, 0.1, 0.9, weight_decay=DECAY)),
        ),
        conventions.TORCHLARS,
        everything,
        2.0,
        momentum=0.9,
    )


def test_mae():
    mae = pytest.importorskip("util.lars", reason="MAE's checkout is not on the path")
    compare(
        lambda run: Real(split(run), lambda groups: mae.LARS(groups, 0.0, weight_decay=DECAY)),
        conventions.MAE,
        lambda run: split(run, adapt=False, weight_decay=0.0),
        4.0,
    )


class Optax(Real):
    """optax keeps no learning rate: it is put into its state, as inject_hyperparams allows."""

    def __init__(self, groups, optax, jax, nesterov):
        self.weights = [p.detach().double().clone() for g in groups for p in g["params"]]
        self.jax, self.apply = jax, optax.apply_updates
        flags = [g.get("adapted", True) for g in groups for _ in g["params"]]
        self.lars = optax.inject_hyperparams(
            optax.lars, static_args=("weight_decay_mask", "trust_ratio_mask", "nesterov")
        )(
            learning_rate=0.0, weight_decay=DECAY, weight_decay_mask=flags, trust_ratio_mask=flags,
            nesterov=nesterov,
        )  # fmt: skip
        self.state = self.lars.init(self.arrays(self.weights))

    def arrays(self, tensors):
        return [self.jax.numpy.asarray(t.numpy()) for t in tensors]

    def set_lr(self, lr):
        self.state.hyperparams["learning_rate"] = self.jax.numpy.asarray(lr)

    def step(self, grads):
        if any(g is None for g in grads):
            raise AssertionError("optax has no missing gradients")
        now = self.arrays(self.weights)
        updates, self.state = self.lars.update(self.arrays(grads), self.state, now)
        for w, new in zip(self.weights, self.apply(now, updates), strict=True):
            w.copy_(torch.tensor(new.tolist(), dtype=w.dtype))


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax(nesterov, monkeypatch):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    monkeypatch.setattr("tests.conformance.trajectory.frozen", lambda t, steps: False)
    with jax.enable_x64(True):
        compare(
            lambda run: Optax(split(run, adapted=False), optax, jax, nesterov),
            conventions.SIMCLR,
            lambda run: split(run, adapt=False, weight_decay=0.0),
            4.0,
            nesterov=nesterov,
        )


@pytest.mark.parametrize(
    ("original", "options"),
    [(originals.Sgd, {"momentum": 0.9, "nesterov": True}), (originals.Sgd, {"momentum": 0.0})],
    ids=["nesterov", "no_momentum"],
)
def test_sgd_without_adaptation(original, options):
    """`torch.optim.SGD` is always there, and holds the originals' own momentum to it."""
    run = Run(width=8, steps=20, peak=0.5, dtype=torch.float64)
    groups = everything(run)
    real = Real(groups, lambda gs: torch.optim.SGD(gs, 0.0, weight_decay=DECAY, **options))
    ours = LARS(groups, 0.0, weight_decay=DECAY, adapt=False, lr_in_momentum=False,
                backend="torch", **options)  # fmt: skip
    theirs = original(groups, lr=0.0, weight_decay=DECAY, **options)
    _both = types.SimpleNamespace(
        set_lr=lambda lr: (real.set_lr(lr), theirs.set_lr(lr)),
        step=lambda grads: (real.step(grads), theirs.step(grads)),
        weights=real.weights,
    )
    check(run, ours, _both, roundings=20)
    for a, b in zip(theirs.weights, real.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
