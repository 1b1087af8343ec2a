"""LARS of other projects, as variants; imported from wherever they are installed.

A project that is not installed, or does not support these tensors, raises and is then listed as
absent with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.variants import Inputs, Variant, groups, not_many, parameters, same_dtype, with_momentum


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
    same_dtype(inputs, "timm")
    not_many(inputs)
    with _without_its_package("timm", "timm.optim"):
        lars = importlib.import_module("timm.optim.lars").Lars
    params, h = parameters(inputs), inputs.hyper
    anew = _clones(inputs, params)  # up to 1.0.30 it writes to them
    optimizer = lars(
        groups(inputs, params, weight_decay=0.0), h.lr, h.momentum, weight_decay=h.weight_decay,
        trust_coeff=h.trust_coefficient, eps=h.eps,
    )  # fmt: skip
    with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False)
    return Variant(optimizer.step, lambda: params, anew, graph=True, options=options)


def kozistr_lars(inputs: Inputs, foreach: bool = False) -> Variant:
    """`pytorch_optimizer.LARS`: adapts tensors with more than one dimension; no eps."""
    same_dtype(inputs, "pytorch_optimizer")
    not_many(inputs)
    lars = importlib.import_module("pytorch_optimizer").LARS
    params, h = parameters(inputs), inputs.hyper
    anew = _clones(inputs, params)
    optimizer = lars(
        groups(inputs, params, weight_decay=0.0), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, foreach=foreach,
    )  # fmt: skip
    with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False, eps=0.0)
    return Variant(optimizer.step, lambda: params, anew, graph=True, options=options)


def torch_optimizer_lars(inputs: Inputs) -> Variant:
    """`torch_optimizer.LARS`: adapts tensors with weight decay."""
    same_dtype(inputs, "torch_optimizer")
    not_many(inputs)
    lars = importlib.import_module("torch_optimizer").LARS
    params, h = parameters(inputs), inputs.hyper
    optimizer = lars(
        groups(inputs, params, weight_decay=0.0), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps,
    )  # fmt: skip
    with_momentum(optimizer, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    options = inputs.options(lr_in_momentum=False)
    return Variant(optimizer.step, lambda: params, options=options)


def apex_larc(inputs: Inputs) -> Variant:
    """LARC scales `p.grad` in place, so gradients are reset before each step."""
    same_dtype(inputs, "apex LARC")
    not_many(inputs)
    larc = importlib.import_module("apex.parallel.LARC").LARC
    params, h = parameters(inputs), inputs.hyper
    grads = [g.clone() for g in inputs.g]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    given = groups(inputs, params, weight_decay=0.0)
    fused = {"fused": True} if params[0].is_cuda else {}
    sgd = torch.optim.SGD(given, h.lr, h.momentum, weight_decay=h.weight_decay, **fused)
    with_momentum(sgd, params, [v.to(inputs.w[0].dtype) for v in inputs.v])
    wrapped = larc(sgd, trust_coefficient=h.trust_coefficient, eps=h.eps)
    options = [
        o._replace(adapt=True, lr_in_momentum=False, trust_clip=True, decay_zero_norm=False)
        for o in inputs.options()
    ]
    return Variant(
        wrapped.step, lambda: params, lambda: torch._foreach_copy_(grads, inputs.g), options=options
    )


def apex_fused_lars(inputs: Inputs) -> Variant:
    """ROCm's apex only. Its buffer is what is added to the weights: −v."""
    same_dtype(inputs, "apex FusedLARS")
    fused = importlib.import_module("apex.optimizers").FusedLARS
    params, h = parameters(inputs), inputs.hyper
    optimizer = fused(
        groups(inputs, params, weight_decay=0.0, is_skipped=True), lr=h.lr, momentum=h.momentum,
        weight_decay=h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps,
    )  # fmt: skip
    with_momentum(optimizer, params, [-v.to(inputs.w[0].dtype) for v in inputs.v])
    return Variant(optimizer.step, lambda: params, options=inputs.options())


def optax_lars(inputs: Inputs) -> Variant:
    """`optax.lars` under jit with donated buffers.

    jax has its own streams, so several steps are chained in one program that the host waits for;
    the time of one step comes from the difference between two chain lengths.
    """
    if {t.dtype for t in [*inputs.w, *inputs.g, *inputs.v]} != {torch.float32}:
        raise RuntimeError("run in fp32 only: optax keeps the momentum in the gradients' dtype")
    not_many(inputs)
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
