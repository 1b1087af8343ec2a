"""How to make what functions beside the optimizer must refuse, by its name in `refusals.txt`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lars_fused import (
    LARS,
    WarmupPolynomialLR,
    clip_grad_norm_,
    convert_state_dict,
    multi_tensor_l2norm,
    param_groups,
    scaled_lr,
)
from lars_fused.distributed import NoiseScale, overlap_with_backward
from lars_fused.monitor import Monitor

W = torch.ones(2, 3)


def sgd(**group: Any) -> dict[str, Any]:
    """A checkpoint of torch.optim.SGD: two parameters, the second without state."""
    params = [nn.Parameter(W.clone()), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    params[0].grad = W.clone()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(group)
    return saved


def mae(*dims: int) -> dict[str, Any]:
    """A checkpoint of MAE's LARS: tensors of these numbers of dimensions, then one unknown."""
    state = {i: {"mu": torch.ones([2] * n)} for i, n in enumerate(dims)}
    group = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.001}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(dims) + 1))}]}


def rocm(**group: Any) -> dict[str, Any]:
    """A checkpoint of ROCm's FusedLARS, whose buffer holds the learning rate."""
    options = {"trust_coefficient": 0.001, "eps": 0.0, "is_skipped": False}
    return sgd(**options, **group)


def without(saved: dict[str, Any], name: str) -> dict[str, Any]:
    del saved["param_groups"][0][name]
    return saved


def infinite_gradient() -> list[nn.Parameter]:
    p = nn.Parameter(W.clone())
    p.grad = torch.full_like(p, math.inf)
    return [p]


def sparse_gradient() -> list[nn.Parameter]:
    params = [nn.Parameter(W.clone()) for _ in range(2)]
    params[1].grad = W.to_sparse()
    return params


def schedule(**changes: Any) -> Any:
    optimizer = LARS([nn.Parameter(W.clone())], 0.1)
    return WarmupPolynomialLR(optimizer, **{"total_steps": 10, "warmup_steps": 2, **changes})


def both_ways() -> None:
    noise = NoiseScale(1)
    noise._small = [torch.ones(())]  # what a bucket of DDP adds
    noise.micro_batch([])


def one_micro_batch() -> None:
    noise, p = NoiseScale(1), nn.Parameter(W.clone())
    p.grad = W.clone()
    noise.micro_batch([p])
    noise.update()


def replaced_by_another_shape() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    groups = param_groups(model, 0.1)
    model[0] = nn.Linear(2, 3)
    LARS(groups)


def replaced_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = LARS(param_groups(model, 0.1))
    model[0] = nn.Linear(2, 2)
    optimizer.step()


LINEAR = nn.Linear(2, 2)
CASES: dict[str, Callable[[], Any]] = {
    "param_groups: negative weight_decay": lambda: param_groups(LINEAR, -1.0),
    "param_groups: exclude_ndim below -1": lambda: param_groups(LINEAR, 0.1, exclude_ndim=-2),
    "param_groups: no pair": lambda: param_groups([W], 0.1),
    "param_groups: lazy parameter": lambda: param_groups(nn.LazyLinear(2), 0.1),
    "param_groups: one name twice": lambda: param_groups([("w", W), ("w", W.clone())], 0.1),
    "param_groups: no parameters": lambda: param_groups([], 0.1),
    "param_groups: pattern that matches nothing": lambda: param_groups(LINEAR, 0.1, exclude="bia"),
    "param_groups: rule that is no rule": lambda: param_groups(LINEAR, 0.1, exclude=[3]),
    "param_groups: exclude that is no rule": lambda: param_groups(LINEAR, 0.1, exclude=3),
    "param_groups: no model": lambda: param_groups(3, 0.1),
    "param_groups: weight_decay beyond the floats": lambda: param_groups(LINEAR, 10**400),
    "param_groups: strict that is no flag": lambda: param_groups(LINEAR, 0.1, strict=1),
    "param_groups: a name that the model does not have, strict": lambda: param_groups(
        LINEAR, 0.1, exclude=["weight", "pos_embed"], strict=True
    ),
    "LARS: a layer replaced by one of another shape": replaced_by_another_shape,
    "LARS: a layer replaced after the optimizer was made": replaced_afterwards,
    "LARS: exclude_ndim below -1": lambda: LARS([nn.Parameter(W.clone())], exclude_ndim=-2),
    "Monitor: no LARS": lambda: Monitor(torch.optim.SGD([nn.Parameter(W.clone())], 0.1)),
    "Monitor: every 0": lambda: Monitor(LARS([nn.Parameter(W.clone())]), every=0),
    "Monitor: writer that cannot write": lambda: Monitor(LARS([nn.Parameter(W.clone())]), 3),
    "Monitor: nothing to draw": lambda: Monitor(LARS([nn.Parameter(W.clone())])).picture(),
    "scaled_lr: unknown rule": lambda: scaled_lr(0.1, 256, rule="cubic"),
    "scaled_lr: base_lr beyond the floats": lambda: scaled_lr(10**400, 256),
    "scaled_lr: batch_size beyond the floats": lambda: scaled_lr(0.1, 10**400),
    "scaled_lr: a result beyond the floats": lambda: scaled_lr(1e308, 10**5),
    "scaled_lr: batch_size 0": lambda: scaled_lr(0.1, 0),
    "WarmupPolynomialLR: total_steps 0": lambda: schedule(total_steps=0),
    "WarmupPolynomialLR: end_lr beyond the floats": lambda: schedule(end_lr=10**400),
    "WarmupPolynomialLR: negative power": lambda: schedule(power=-1.0),
    "convert_state_dict: unknown source": lambda: convert_state_dict(sgd(), "adam"),
    "convert_state_dict: unknown option": lambda: convert_state_dict(sgd(), "sgd", speed=1),
    "convert_state_dict: no state dict": lambda: convert_state_dict({}, "sgd"),
    "convert_state_dict: state of another optimizer": lambda: convert_state_dict(sgd(), "mae"),
    "convert_state_dict: too few params": lambda: convert_state_dict(sgd(), "sgd", params=[W]),
    "convert_state_dict: unknown dimensions": lambda: convert_state_dict(mae(2, 1), "mae"),
    "convert_state_dict: group without lr": lambda: convert_state_dict(without(sgd(), "lr"), "sgd"),
    "convert_state_dict: bad lr": lambda: convert_state_dict(sgd(lr=-1.0), "sgd"),
    "convert_state_dict: lr 0 inside the momentum": lambda: convert_state_dict(
        rocm(lr=0.0), "rocm_fused_lars", lr_in_momentum=False
    ),
    "multi_tensor_l2norm: no tensor": lambda: multi_tensor_l2norm([3.0]),
    "multi_tensor_l2norm: integers": lambda: multi_tensor_l2norm([torch.tensor([1, 2])]),
    "multi_tensor_l2norm: a tensor in the place of the list": lambda: multi_tensor_l2norm(W),
    "multi_tensor_l2norm: per_tensor that is no flag": lambda: multi_tensor_l2norm(
        [W], per_tensor="torch"
    ),
    "multi_tensor_l2norm: sparse": lambda: multi_tensor_l2norm([W.to_sparse()]),
    "multi_tensor_l2norm: unknown backend": lambda: multi_tensor_l2norm([W], backend="cuda"),
    "multi_tensor_l2norm: forced kernels": lambda: multi_tensor_l2norm(
        [W.double().t()], backend="triton"
    ),
    "clip_grad_norm_: negative max_norm": lambda: clip_grad_norm_([], -1.0),
    "clip_grad_norm_: NaN tensor as max_norm": lambda: clip_grad_norm_([], torch.tensor(math.nan)),
    "clip_grad_norm_: max_norm of two": lambda: clip_grad_norm_([], torch.ones(2)),
    "clip_grad_norm_: a model": lambda: clip_grad_norm_(LINEAR, 1.0),
    "clip_grad_norm_: parameters that are no tensors": lambda: clip_grad_norm_(["weight"], 1.0),
    "clip_grad_norm_: sparse gradient": lambda: clip_grad_norm_(sparse_gradient(), 1.0),
    "clip_grad_norm_: infinite norm": lambda: clip_grad_norm_(
        infinite_gradient(), 1.0, error_if_nonfinite=True
    ),
    "overlap_with_backward: no DDP": lambda: overlap_with_backward(
        LINEAR, LARS(LINEAR.parameters(), 0.1)
    ),
    "NoiseScale: batch_size 0": lambda: NoiseScale(0),
    "NoiseScale: decay 1": lambda: NoiseScale(1, decay=1.0),
    "NoiseScale: decay that is no number": lambda: NoiseScale(1, decay="0.9"),
    "NoiseScale: attached to what is no DDP": lambda: NoiseScale(1).attach(LINEAR),
    "NoiseScale: nothing measured": lambda: NoiseScale(1).update(),
    "NoiseScale: attached and by micro-batches": both_ways,
    "NoiseScale: micro-batches of a model": lambda: NoiseScale(1).micro_batch(LINEAR),
    "NoiseScale: one batch size": one_micro_batch,
}
