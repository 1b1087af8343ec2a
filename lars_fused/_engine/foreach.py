"""The backend for devices that our kernels do not support: foreach operations, no readback.

Gradients are copied into one flat fp32 buffer D in which each tensor starts at a multiple of 256
elements. So D is both a list of tensors and a matrix whose rows can be scaled by one column: each
tensor's own factor, which stays on the device. A step is about 25 operations, regardless of the
number of tensors; each further set of hyper-parameters adds up to four. Besides parameters,
gradients and state it needs 4 bytes per parameter, plus 8 if `found_inf` is given.

Trust ratio times gradient must stay within fp32's range, 1e-38 to 3e38.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..options import Options
from ..reference import scalar
from . import validate
from .square_norms import PLAIN

ROW = 256
_Value = TypeVar("_Value")


def expressible(o: Options) -> bool:
    """Whether its operations can express the options."""
    return o.denominator != "decayed" or o.decay_zero_norm


def objection(
    w: Tensor, g: Tensor, v: Tensor | None, copy: Tensor | None, options: Options
) -> str | None:
    """Why this backend cannot update a tensor; None if it can."""
    for what, t in (
        ("the tensor", w), ("its gradient", g), ("its momentum", v), ("its copy", copy),
    ):  # fmt: skip
        if t is None:
            continue
        if type(t) not in PLAIN:
            return f"{what} is a {type(t).__name__}"
        if t.dtype not in validate.STORAGE_DTYPES:
            return f"{what} is {t.dtype}"
    if w.numel() == 0:
        return "it is empty"
    if v is not None and options.momentum == 0:
        return "it has a buffer but no momentum"
    if not expressible(options):
        return "whether it decays depends on N(g + βw)"
    return None


def _wide(device: torch.device) -> torch.dtype:
    """The dtype in which norms are accumulated. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Flat:
    """One flat fp32 buffer with one or more rows for each tensor."""

    def __init__(self, shapes: Sequence[torch.Size], device: torch.device) -> None:
        counts = [-(-shape.numel() // ROW) for shape in shapes]
        self.flat = torch.zeros(sum(counts) * ROW, dtype=torch.float32, device=device)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count * ROW)
        self.views = [
            self.flat[at : at + shape.numel()].view(shape)
            for at, shape in zip(starts, shapes, strict=False)
        ]
        self.rows = self.flat.view(-1, ROW)


class Layout:
    """The rows of D for tensors of these shapes, and the columns of constants on their device."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.shapes, self.device = [w.shape for w in weights], weights[0].device
        # Read in later steps, which may run outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            counts = torch.tensor([-(-s.numel() // ROW) for s in self.shapes], device="cpu")
            owners = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
            self.owners = owners.to(self.device)
        self._constants: dict[tuple[tuple[float, ...], torch.dtype], Tensor] = {}

    def column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """A column on the device. Each is uploaded once, as long as it is among the last 32."""
        key = (tuple(values), dtype)
        if key not in self._constants:
            while len(self._constants) >= 32:
                del self._constants[next(iter(self._constants))]
            here = torch.tensor(values, dtype=dtype, device="cpu")
            self._constants[key] = here.to(self.device)
        return self._constants[key]


def readable(t: Tensor) -> bool:
    """Whether `norms` supports a tensor."""
    return type(t) in PLAIN and t.numel() > 0


def norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms [n] of tensors of one device, over the whole range of their dtypes."""
    wide = _wide(tensors[0].device)
    if wide == torch.float64:
        return torch.stack(torch._foreach_norm(tensors, 2, wide))
    # Scaled by each tensor's largest element, so that no square leaves the range.
    top = torch.stack(torch._foreach_norm(tensors, float("inf"), wide))
    units = torch.where((top > 0) & top.isfinite(), top, 1.0)
    scaled = [t.to(wide) / unit for t, unit in zip(tensors, units.unbind(), strict=True)]
    return torch.stack(torch._foreach_norm(scaled, 2, wide)) * units


def _by(values: Iterable[_Value]) -> dict[_Value, list[int]]:
    """Where each of the distinct values stands."""
    found: dict[_Value, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(value, []).append(i)
    return found


def _decayed(
    d: _Flat, weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: float | Tensor, measure: bool,
) -> list[Tensor]:  # fmt: skip
    """D ← ±g/scale + βw; N(w), N(g) and N(d) if asked for."""
    torch._foreach_copy_(d.views, list(grads))
    if isinstance(scale, Tensor) or scale != 1.0:
        d.flat.div_(scale.to(d.flat) if isinstance(scale, Tensor) else scale)
    found: list[Tensor] = []
    if measure and weights[0].dtype == torch.float32:
        found = [*norms([*weights, *d.views]).view(2, -1).unbind()]
    elif measure:
        found = [norms(list(weights)), norms(d.views)]
    turned = [d.views[i] for i, o in enumerate(options) if o.maximize]
    if turned:
        torch._foreach_neg_(turned)
    for decay, index in _by(o.weight_decay for o in options).items():
        if decay:
            some = [d.views[i] for i in index], [weights[i] for i in index]
            torch._foreach_add_(*some, alpha=decay)
    return [*found, norms(d.views)] if measure else []


def square_sums_of(
    weights: Sequence[Tensor], grads: Sequence[Tensor], options: Sequence[Options],
    scale: float | Tensor, layout: Layout,
) -> Tensor:  # fmt: skip
    """`reference.square_sums`, one row per tensor."""
    d = _Flat(layout.shapes, layout.device)
    return torch.stack(_decayed(d, weights, grads, options, scale, True), 1).square()


def learning_rates(
    options: Sequence[Options], like: Tensor, column: Callable[[list[float], torch.dtype], Tensor]
) -> Tensor:
    """The learning rate of each tensor, in the dtype and on the device of `like`.

    Each distinct tensor among them is read once, on the device. `column`: puts numbers there.
    """
    distinct = {id(o.lr): o.lr for o in options}
    if not any(isinstance(lr, Tensor) for lr in distinct.values()):
        return column([float(o.lr) for o in options], like.dtype)
    at = {key: k for k, key in enumerate(distinct)}
    values = torch.stack([scalar(lr, like) for lr in distinct.values()])
    return values[column([at[id(o.lr)] for o in options], torch.int64)]


def _ratios(
    norms: list[Tensor], options: Sequence[Options], lr: Tensor, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """Trust ratios; and a mask where d must be g (which is zero there), if that can occur."""
    w_norm, g_norm, d_norm = norms

    def column(values: list[float]) -> Tensor:
        return layout.column(values, w_norm.dtype)

    def mask(values: list[bool]) -> Tensor:
        return layout.column(values, torch.bool)

    kinds = {o.denominator for o in options}
    norm = d_norm if kinds == {"decayed"} else g_norm
    if "decayed" in kinds and len(kinds) > 1:
        norm = torch.where(mask([o.denominator == "decayed" for o in options]), d_norm, g_norm)
    below = column([o.eps for o in options])
    if "sum" in kinds:
        below = torch.addcmul(below, column([o.weight_decay for o in options]), w_norm)
        if len(kinds) > 1:
            summed = mask([o.denominator == "sum" for o in options])
            below = torch.where(summed, below, column([o.eps for o in options]))
    q = column([o.trust_coefficient for o in options]) * w_norm / (below + norm)
    if any(o.trust_clip for o in options):
        clipped = torch.where(lr == 0, 1.0, (q / lr).clamp(max=1.0))
        q = torch.where(mask([o.trust_clip for o in options]), clipped, q)
    adapted = torch.minimum(w_norm, norm) != 0
    if not all(o.adapt for o in options):
        adapted = adapted & mask([o.adapt for o in options])
    raw = None
    if not all(o.decay_zero_norm for o in options):
        # N(w) = 0 leaves nothing to decay; the remaining case is N(g) = 0, where d = g = 0.
        raw = mask([o.adapt and not o.decay_zero_norm for o in options]) & (norm == 0)
    return torch.where(adapted, q, 1.0), raw


def step_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    scale: float | Tensor, sums: Tensor | None, found_inf: Tensor | None, layout: Layout,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step on a list of tensors of one device; see `torch_step.step_`."""
    d = _Flat(layout.shapes, layout.device)
    measured = _decayed(d, weights, grads, options, scale, sums is None)
    if sums is None:
        sums = torch.stack(measured, 1).square()
        found = measured
    else:
        found = [*sums.sqrt().unbind(1)]
    lr = learning_rates(options, sums, layout.column)
    ratios, raw = _ratios(found, options, lr, layout)
    outside = [0.0 if o.lr_in_momentum else 1.0 for o in options]
    factor = ratios
    if not all(outside):
        inside = layout.column(outside, sums.dtype) == 0
        factor = factor * (torch.where(inside, lr, 1.0) if any(outside) else lr)
    if any(o.dampening for o in options):
        factor = factor * layout.column(
            [1.0 if f or v is None else 1.0 - o.dampening
             for o, f, v in zip(options, first, buffers, strict=True)], sums.dtype)  # fmt: skip
    if raw is not None:
        factor = torch.where(raw, 0.0, factor)
    d.rows.mul_(factor.to(torch.float32).index_select(0, layout.owners).unsqueeze(1))
    skipped = None if found_inf is None else found_inf.to(layout.device).reshape(()) != 0
    outs = None
    if any(outside):
        outs = torch.where(layout.column(outside, sums.dtype) != 0, lr, 1.0)
    _write(d, layout, weights, buffers, copies, options, first, outs, skipped)
    return sums, ratios


def _write(
    d: _Flat, layout: Layout, weights: Sequence[Tensor], buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None], options: Sequence[Options], first: Sequence[bool],
    outs: Tensor | None, skipped: Tensor | None,
) -> None:  # fmt: skip
    """From D = u: v ← μv + u, w ← w − out·v, each rounded once; if skipped, both as they were."""
    v = {i: t for i, t in enumerate(buffers) if t is not None}
    held = list(v)
    later = [i for i in held if not first[i]]
    momenta = list(v.values())
    nesterov = [i for i in held if options[i].nesterov]
    u = [d.views[i].clone() for i in nesterov]
    for momentum, index in _by(options[i].momentum for i in later).items():
        some = [later[k] for k in index]
        torch._foreach_add_([d.views[i] for i in some], [v[i] for i in some], alpha=momentum)
    if held:
        _store(d, layout, held, momenta, skipped)
    for momentum, index in _by(options[i].momentum for i in nesterov).items():
        views = [d.views[nesterov[k]] for k in index]
        torch._foreach_mul_(views, momentum)
        torch._foreach_add_(views, [u[k] for k in index])
    if outs is not None:
        d.rows.mul_(outs.to(torch.float32).index_select(0, layout.owners).unsqueeze(1))
    new = [(c, w) for c, w in zip(copies, weights, strict=True) if c is not None]
    if skipped is not None:
        d.flat.masked_fill_(skipped, 0.0)  # w − 0 has the bits of w, even for −0
    torch._foreach_sub_(list(weights), d.views)
    if new:
        torch._foreach_copy_([c for c, _ in new], [w for _, w in new])


def _store(
    d: _Flat, layout: Layout, held: list[int], momenta: list[Tensor], skipped: Tensor | None
) -> None:
    """Copy D into the momentum buffers, or leave them as they were."""
    views = [d.views[i] for i in held]
    if skipped is None:
        torch._foreach_copy_(momenta, views)
        return
    new = _Flat(layout.shapes, layout.device)
    chosen = [new.views[i] for i in held]
    torch._foreach_copy_(chosen, momenta)
    torch.where(skipped, new.flat, d.flat, out=new.flat)
    torch._foreach_copy_(momenta, chosen)
