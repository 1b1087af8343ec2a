"""Ways to take the same step: `lars_fused` itself, and the peers that it is measured against.

Each builder takes `Inputs` and returns a `Variant` that owns copies of weights and momentum. A peer
that is not installed, or does not support these tensors, raises and is then listed as absent with
the reason. Peers are found only by importing them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lars_fused import LARS
from lars_fused._engine import launch_tables
from lars_fused.reference import Options

ONE = "lars_fused, one launch"
TWO = "lars_fused, two launches"
PORTABLE = "lars_fused, portable"
FLOOR = "SGD(fused=True)"
OURS = (ONE, TWO, PORTABLE)
# Where every tensor costs a peer several launches or a compilation, more of them would only wait.
MANY = 1000


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of every peer: each term moves the result, and w settles near −g/β."""

    lr: float = 0.5
    momentum: float = 0.8
    weight_decay: float = 0.3
    trust_coefficient: float = 0.05
    eps: float = 1e-8


@dataclass
class Inputs:
    """Tensors of one case. A peer copies `w` and `v`; it must leave `g` as it is."""

    w: list[Tensor]
    g: list[Tensor]
    v: list[Tensor]
    adapt: list[bool]
    hyper: Hyper = field(default_factory=Hyper)

    def options(self, **convention: Any) -> list[Options]:
        """The reference's options of each tensor."""
        h = self.hyper
        base: dict[str, Any] = {
            "lr": h.lr, "momentum": h.momentum, "eps": h.eps,
            "trust_coefficient": h.trust_coefficient, **convention,
        }  # fmt: skip
        yes = Options(**base, weight_decay=h.weight_decay, adapt=True)
        no = Options(**base, weight_decay=0.0, adapt=False)
        return [yes if a else no for a in self.adapt]


@dataclass
class Variant:
    """One way to step, ready to be timed."""

    step: Callable[[], object]
    weights: Callable[[], list[Tensor]]
    prepare: Callable[[], object] | None = None  # before each step, not timed
    graph: bool = False  # so many launches that only graph replay shows the GPU's own time
    chained: Callable[[int], object] | None = None  # run that many steps and wait: other runtimes
    options: list[Options] | None = None  # the reference's options
    host_bound: bool = False  # set by the timer
    momenta: Callable[[], list[Tensor]] | None = None  # compared too


def set_gradient(p: Tensor, g: Tensor) -> None:
    """Set the gradient `g` of `p`, whatever its dtype.

    Before `Tensor.grad_dtype` (torch 2.13) only `grad.data` could have a different dtype.
    """
    if g.dtype == p.dtype:
        p.grad = g
    elif hasattr(Tensor, "grad_dtype"):
        p.grad_dtype = g.dtype  # type: ignore[attr-defined]
        p.grad = g
    else:
        p.grad = torch.zeros_like(p)
        p.grad.data = g


def _parameters(inputs: Inputs) -> list[torch.nn.Parameter]:
    found = []
    for w, g in zip(inputs.w, inputs.g, strict=True):
        p = torch.nn.Parameter(w.clone())
        set_gradient(p, g)
        found.append(p)
    return found


def _groups(inputs: Inputs, params: list[Any], **undecayed: Any) -> list[dict[str, Any]]:
    """Decayed and adapted tensors; then the others, with `undecayed` as their options."""
    groups = [
        {"params": [p for p, a in zip(params, inputs.adapt, strict=True) if a]},
        {"params": [p for p, a in zip(params, inputs.adapt, strict=True) if not a], **undecayed},
    ]
    return [group for group in groups if group["params"]]


def _with_momentum(optimizer: Any, params: list[Any], v: list[Tensor]) -> None:
    for p, buffer in zip(params, v, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer.to(p.device).clone()


def _same_dtype(inputs: Inputs, who: str) -> None:
    if {t.dtype for t in [*inputs.w, *inputs.g]} != {inputs.w[0].dtype}:
        raise RuntimeError(f"{who} needs one dtype for parameters and gradients")


def _not_many(inputs: Inputs) -> None:
    if len(inputs.w) > MANY:
        raise RuntimeError(f"not run beyond {MANY} tensors")


# ------------------------------------------------------------------ lars_fused and the floor


def ours(inputs: Inputs, launches: int = 1, backend: str = "triton") -> Variant:
    params, h = _parameters(inputs), inputs.hyper
    optimizer = LARS(
        _groups(inputs, params, weight_decay=0.0, adapt=False), h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps,
        backend=backend,
    )  # fmt: skip
    _with_momentum(optimizer, params, inputs.v)

    def step() -> None:
        # Read when the tables are made, by the first step.
        with launch_tables.forced_launches(launches):
            optimizer.step()
        variant.step = optimizer.step

    def momenta() -> list[Tensor]:
        return [optimizer.state[p]["momentum_buffer"] for p in params]

    variant = Variant(step, lambda: params, options=inputs.options(), momenta=momenta)
    return variant


def sgd_fused(inputs: Inputs, **kind: bool) -> Variant:
    """20 bytes per parameter in fp32, no norms: the floor. Momentum has the weights' dtype."""
    _same_dtype(inputs, "SGD")
    params, h = _parameters(inputs), inputs.hyper
    groups = _groups(inputs, params, weight_decay=0.0)
    kind = kind or {"fused": True}
    optimizer = torch.optim.SGD(groups, h.lr, h.momentum, weight_decay=h.weight_decay, **kind)
    return Variant(optimizer.step, lambda: params)


# ------------------------------------------------------------------ our own plain LARS


def _eager(w: list[Tensor], g: list[Tensor], v: list[Tensor], adapt: list[bool], h: Hyper) -> None:
    """As users write it: one tensor after the other."""
    for i, adapted in enumerate(adapt):
        d = g[i]
        if adapted:
            w_norm, g_norm = torch.linalg.vector_norm(w[i]), torch.linalg.vector_norm(g[i])
            q = h.trust_coefficient * w_norm / (g_norm + h.weight_decay * w_norm + h.eps)
            q = torch.where((w_norm > 0) & (g_norm > 0), q, 1.0)
            d = (d + h.weight_decay * w[i]) * q
        v[i].mul_(h.momentum).add_(d, alpha=h.lr)
        w[i].sub_(v[i])


def _foreach(
    w: list[Tensor], g: list[Tensor], v: list[Tensor], adapt: list[bool], h: Hyper
) -> None:
    """The same with PyTorch's foreach functions."""
    yes = [i for i, adapted in enumerate(adapt) if adapted]
    if yes:
        some_w, some_g = [w[i] for i in yes], [g[i] for i in yes]
        w_norms = torch.stack(torch._foreach_norm(some_w))
        g_norms = torch.stack(torch._foreach_norm(some_g))
        q = h.trust_coefficient * w_norms / (g_norms + h.weight_decay * w_norms + h.eps)
        q = torch.where((w_norms > 0) & (g_norms > 0), q, 1.0)
        scaled = torch._foreach_add(some_g, some_w, alpha=h.weight_decay)
        torch._foreach_mul_(scaled, list(q.to(scaled[0].dtype).unbind()))
        at = dict(zip(yes, scaled, strict=True))
        g = [at.get(i, grad) for i, grad in enumerate(g)]
    torch._foreach_mul_(v, h.momentum)
    torch._foreach_add_(v, g, alpha=h.lr)
    torch._foreach_sub_(w, v)


def plain(
    inputs: Inputs, foreach: bool = False, compiled: bool = False, compiler: str = "inductor"
) -> Variant:
    if compiled or not foreach:
        _not_many(inputs)
    w, v = [t.clone() for t in inputs.w], [t.clone() for t in inputs.v]
    run: Any = _foreach if foreach else _eager
    if compiled:
        run = torch.compile(run, backend=compiler, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        run(w, inputs.g, v, inputs.adapt, inputs.hyper)

    return Variant(step, lambda: w, graph=not compiled, options=inputs.options())


# ------------------------------------------------------------------ other projects


@contextlib.contextmanager
def _without_its_package(*packages: str) -> Iterator[None]:
    """Import a module without running its packages' own imports: timm's ask for torchvision."""
    if packages[0] in sys.modules and sys.modules[packages[0]].__spec__ is None:
        yield  # a stand-in of a test
        return
    found = importlib.util.find_spec(packages[0])
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {packages[0]!r}")
    root = Path(found.submodule_search_locations[0]).parent
    held = {n: m for n, m in sys.modules.items() if n.split(".")[0] == packages[0]}
    for name in held:
        del sys.modules[name]
    for name in packages:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == packages[0]]:
            del sys.modules[name]
        sys.modules.update(held)


def _clones(inputs: Inputs, params: list[Any]) -> Callable[[], None]:
    """Give each parameter its own gradient; returns a function that resets them before a step.

    For peers that write to gradients, which the variants share.
    """
    grads = [g.clone() for g in inputs.g]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return lambda: torch._foreach_copy_(grads, inputs.g)


def timm_lars(inputs: Inputs) -> Variant:
    """Up to timm 1.0.30 a step writes to the gradients, so they are reset before each step."""
    _same_dtype(inputs, "timm")
    _not_many(inputs)
    with _without_its_package("timm", "timm.optim"):
        lars = importlib.import_module("timm.optim.lars").Lars
    params, h = _parameters(inputs), inputs.hyper
    anew = _clones(inputs, params)  # up to 1.0.30 it writes to them
    optimizer = lars(
        _groups(inputs, params, weight_decay=0.0), h.lr, h.momentum, weight_decay=h.weight_decay,
        trust_coeff=h.trust_coefficient, eps=h.eps,
    )  # fmt: skip
    _with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False)
    return Variant(optimizer.step, lambda: params, anew, graph=True, options=options)


def kozistr_lars(inputs: Inputs, foreach: bool = False) -> Variant:
    """`pytorch_optimizer.LARS`: adapts tensors with more than one dimension; no eps."""
    _same_dtype(inputs, "pytorch_optimizer")
    _not_many(inputs)
    lars = importlib.import_module("pytorch_optimizer").LARS
    params, h = _parameters(inputs), inputs.hyper
    anew = _clones(inputs, params)
    optimizer = lars(
        _groups(inputs, params, weight_decay=0.0), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, foreach=foreach,
    )  # fmt: skip
    _with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False, eps=0.0)
    return Variant(optimizer.step, lambda: params, anew, graph=True, options=options)


def torch_optimizer_lars(inputs: Inputs) -> Variant:
    """`torch_optimizer.LARS`: adapts tensors with weight decay."""
    _same_dtype(inputs, "torch_optimizer")
    _not_many(inputs)
    lars = importlib.import_module("torch_optimizer").LARS
    params, h = _parameters(inputs), inputs.hyper
    optimizer = lars(
        _groups(inputs, params, weight_decay=0.0), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps,
    )  # fmt: skip
    _with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False)
    return Variant(optimizer.step, lambda: params, options=options)


def apex_larc(inputs: Inputs) -> Variant:
    """LARC scales `p.grad` in place, so gradients are reset before each step."""
    _same_dtype(inputs, "apex LARC")
    _not_many(inputs)
    larc = importlib.import_module("apex.parallel.LARC").LARC
    params, h = _parameters(inputs), inputs.hyper
    grads = [g.clone() for g in inputs.g]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    groups = _groups(inputs, params, weight_decay=0.0)
    fused = {"fused": True} if params[0].is_cuda else {}
    sgd = torch.optim.SGD(groups, h.lr, h.momentum, weight_decay=h.weight_decay, **fused)
    _with_momentum(sgd, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    wrapped = larc(sgd, trust_coefficient=h.trust_coefficient, eps=h.eps)
    options = [
        o._replace(adapt=True, lr_in_momentum=False, trust_clip=True, decay_zero_norm=False)
        for o in inputs.options()
    ]
    return Variant(
        wrapped.step, lambda: params, lambda: torch._foreach_copy_(grads, inputs.g), options=options
    )


def apex_fused_lars(inputs: Inputs) -> Variant:
    """ROCm's apex only. Not compared with the reference: momentum differs in sign and unit."""
    _same_dtype(inputs, "apex FusedLARS")
    fused = importlib.import_module("apex.optimizers").FusedLARS
    params, h = _parameters(inputs), inputs.hyper
    optimizer = fused(
        _groups(inputs, params, weight_decay=0.0), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient,
    )  # fmt: skip
    return Variant(optimizer.step, lambda: params)


def optax_lars(inputs: Inputs) -> Variant:
    """`optax.lars` under jit with donated buffers.

    jax has its own streams, so several steps are chained in one program that the host waits for;
    the time of one step comes from the difference between two chain lengths.
    """
    if {t.dtype for t in [*inputs.w, *inputs.g, *inputs.v]} != {torch.float32}:
        raise RuntimeError("run in fp32 only: optax keeps the momentum in the gradients' dtype")
    _not_many(inputs)
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    wanted = "gpu" if inputs.w[0].is_cuda else "cpu"
    if jax.default_backend() not in (wanted, "cuda", "rocm"):
        raise RuntimeError(f"jax runs on {jax.default_backend()}")
    h, mask = inputs.hyper, list(inputs.adapt)
    lars = optax.lars(
        h.lr, h.weight_decay, weight_decay_mask=mask, trust_coefficient=h.trust_coefficient,
        eps=0.0, trust_ratio_mask=mask, momentum=h.momentum,
    )  # fmt: skip

    def take(tensors: list[Tensor]) -> list[Any]:
        return [jax.numpy.array(t.cpu().numpy()) for t in tensors]

    params, grads = take(inputs.w), take(inputs.g)
    # optax keeps −v: its updates are added.
    trace = optax.TraceState(trace=take([-t for t in inputs.v]))
    held = [
        params,
        jax.tree.map(
            lambda s: trace if isinstance(s, optax.TraceState) else s,
            lars.init(params),
            is_leaf=lambda s: isinstance(s, optax.TraceState),
        ),
    ]

    def one(_: Any, carry: Any) -> Any:
        weights, state, gradients = carry
        updates, state = lars.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, gradients

    def several(weights: Any, state: Any, gradients: Any, n: int) -> Any:
        return jax.lax.fori_loop(0, n, one, (weights, state, gradients))[:2]

    run = jax.jit(several, static_argnums=3, donate_argnums=(0, 1))

    def chained(n: int) -> None:
        held[:] = run(*held, grads, n)
        jax.block_until_ready(held)

    return Variant(
        lambda: chained(1),
        lambda: [torch.from_numpy(jax.device_get(w).copy()) for w in held[0]],
        chained=chained,
        options=inputs.options(denominator="decayed", eps=0.0),
    )


LADDER: dict[str, Callable[[Inputs], Variant]] = {
    FLOOR: sgd_fused,
    ONE: ours,
    TWO: lambda i: ours(i, launches=2),
}
EAGER: dict[str, Callable[[Inputs], Variant]] = {
    "foreach LARS": lambda i: plain(i, foreach=True),
    "eager LARS": plain,
}
COMPILED: dict[str, Callable[[Inputs], Variant]] = {
    "compiled foreach LARS": lambda i: plain(i, foreach=True, compiled=True),
    "compiled eager LARS": lambda i: plain(i, compiled=True),
}
PROJECTS: dict[str, Callable[[Inputs], Variant]] = {
    "timm Lars": timm_lars,
    "optax lars, jit": optax_lars,
    "apex LARC": apex_larc,
    "apex FusedLARS": apex_fused_lars,
}
CPU_PROJECTS: dict[str, Callable[[Inputs], Variant]] = {
    "timm Lars": timm_lars,
    "pytorch_optimizer LARS": kozistr_lars,
    "pytorch_optimizer LARS, foreach": lambda i: kozistr_lars(i, foreach=True),
    "torch_optimizer LARS": torch_optimizer_lars,
}
PORTABLE_LADDER: dict[str, Callable[[Inputs], Variant]] = {
    FLOOR: sgd_fused,
    "SGD(foreach=True)": lambda i: sgd_fused(i, foreach=True),
    PORTABLE: lambda i: ours(i, backend="torch"),
}
# Variants that run on a CPU, ours first.
CPU_LADDER: dict[str, Callable[[Inputs], Variant]] = {
    PORTABLE: PORTABLE_LADDER[PORTABLE],
    FLOOR: sgd_fused,
    "SGD(foreach=True)": PORTABLE_LADDER["SGD(foreach=True)"],
    **EAGER,
    "compiled foreach LARS": COMPILED["compiled foreach LARS"],
    **CPU_PROJECTS,
}
