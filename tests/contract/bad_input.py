"""How to make everything that must be refused, by what it is called in `tests/refusals.txt`.

Here: what reaches an optimizer or `lars_step`. `bad_arguments.py`: the other functions.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lars_fused import LARS, lars_step
from lars_fused.options import Options
from tests.cases import bits


class World:
    """Two parameters that have been stepped once, and everything about them that may not change."""

    def __init__(self, backend: str = "torch"):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (3,))]
        self.grads = [torch.randn_like(p) for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.buffers: list[Tensor | None] = [torch.randn_like(p) for p in self.params]
        self.backend = backend
        self.optimizer = LARS(self.params, lr=0.5, weight_decay=0.1, backend=backend)
        self.optimizer.step()

    def lars_step(self, **options: Any) -> None:
        options = {"backend": self.backend, **options}
        lars_step(self.params, self.grads, self.buffers, **options)

    def facts(self) -> list[Any]:
        tensors = [*self.params, *self.grads, *self.buffers]
        tensors += [p.grad for p in self.params if p.grad is not None]
        tensors += [x for s in self.optimizer.state.values() for x in s.values()]
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        real = [t for t in tensors if t.layout == torch.strided and not t.is_meta]
        groups = [{**g, "params": list(map(id, g["params"]))} for g in self.optimizer.param_groups]
        state = [(id(p), list(s)) for p, s in self.optimizer.state.items()]
        versions = [t._version for t in tensors if not t.is_inference()]
        return [bits(real), versions, repr(groups), state, dict(self.optimizer.defaults)]


# Puts the bad thing into a world and returns the call that must refuse it.
Prepare = Callable[[World], Callable[[], Any]]

NUMBERS = {
    "lr": "a finite number >= 0", "momentum": "in [0, 1]", "weight_decay": "a finite number >= 0",
    "trust_coefficient": "a finite number >= 0", "eps": "a finite number >= 0",
    "dampening": "in [0, 1]",
}  # fmt: skip
FLAGS = ("nesterov", "lr_in_momentum", "trust_clip", "decay_zero_norm", "adapt", "maximize")
CHOICES = {"denominator": "one of ['sum', 'decayed', 'gradient']"}
ENTRIES = {
    "LARS: ": lambda world, o: LARS(world.params, **o),
    "LARS: param_groups[1]: ": lambda world, o: world.optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2))], **o}
    ),
    "lars_step: ": lambda world, o: world.lars_step(**o),
}


def stepping(change: Callable[[World], Any]) -> Prepare:
    """Change the world, then `optimizer.step()`."""

    def prepare(world: World) -> Callable[[], Any]:
        change(world)
        return world.optimizer.step

    return prepare


def calling(call: Callable[[World], Any]) -> Prepare:
    return lambda world: lambda: call(world)


def a_group_option(**options: Any) -> Callable[[World], Any]:
    return lambda world: world.optimizer.param_groups[0].update(options)


def gradient(make: Callable[[Tensor], Tensor]) -> Callable[[World], Any]:
    """Give parameter 1 the gradient `make(p)`, whatever its dtype, shape or layout."""

    def change(world: World) -> None:
        p = world.params[1]
        world.grads[1] = make(p)
        p.grad_dtype = None
        p.grad = world.grads[1]

    return change


def another_shape(world: World) -> None:
    """Torch refuses to assign such a gradient, but not to change the parameter under it."""
    world.params[1].data = torch.ones(2)


def parameter(make: Callable[[], Tensor]) -> Callable[[World], Any]:
    """Let a new parameter be updated by `lars_step`, in the place of parameter 1."""

    def call(world: World) -> Callable[[], Any]:
        world.params[1] = make()
        return world.lars_step

    return call


def sparse(t: Tensor) -> Tensor:
    return t.detach().to_sparse()


def state(key: str, value: Any) -> Callable[[World], Any]:
    return lambda world: world.optimizer.state[world.params[1]].update({key: value})


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def loading(change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Load a checkpoint in which something was changed."""

    def prepare(world: World) -> Callable[[], Any]:
        saved = copy.deepcopy(world.optimizer.state_dict())
        change(saved)
        return lambda: world.optimizer.load_state_dict(saved)

    return prepare


def saved_state(**held: Any) -> Prepare:
    return loading(lambda saved: saved["state"].update({1: held}))


def of_another(**options: Any) -> Callable[[dict[str, Any]], Any]:
    """Make the checkpoint one whose groups have the options of another optimizer."""

    def change(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            for name in Options._fields:
                if name not in ("lr", "momentum", "weight_decay", "dampening", "nesterov"):
                    del group[name]
            group.update(options)

    return change


CASES: dict[str, Prepare] = {
    "hyper-parameters without their names": calling(lambda w: LARS(w.params, 0.1, 0.9, 0, 1e-4)),
    "negative lr": calling(lambda w: LARS(w.params, lr=-0.1)),
    "NaN lr in a group, found by `step()`": stepping(a_group_option(lr=math.nan)),
    "lr that is no number": calling(lambda w: LARS(w.params, lr="0.1")),
    "lr tensor of two elements": calling(lambda w: LARS(w.params, lr=torch.ones(2))),
    "lr tensor of two elements, found by `step()`": stepping(a_group_option(lr=torch.ones(2))),
    "lr tensor on the meta device": calling(
        lambda w: LARS(w.params, lr=torch.tensor(0.1, device="meta"))
    ),
    "lr beyond the floats": calling(lambda w: LARS(w.params, lr=10**400)),
    "a group without an option, found by `step()`": stepping(
        lambda w: w.optimizer.param_groups[0].pop("eps")
    ),
    "lr tensor of integers": calling(lambda w: LARS(w.params, lr=torch.tensor(1))),
    "momentum above 1": calling(lambda w: LARS(w.params, momentum=1.1)),
    "negative weight_decay in a new group": calling(
        lambda w: ENTRIES["LARS: param_groups[1]: "](w, {"weight_decay": -1e-4})
    ),
    "NaN trust_coefficient": calling(lambda w: w.lars_step(trust_coefficient=math.nan)),
    "infinite eps": calling(lambda w: LARS(w.params, eps=math.inf)),
    "nesterov with dampening": calling(lambda w: LARS(w.params, nesterov=True, dampening=0.1)),
    "nesterov without momentum, found by `step()`": stepping(
        a_group_option(nesterov=True, momentum=0.0)
    ),
    "a flag that is neither True nor False": calling(lambda w: LARS(w.params, adapt=1)),
    "unknown denominator": calling(lambda w: LARS(w.params, denominator="max")),
    "unknown backend": calling(lambda w: LARS(w.params, backend="cuda")),
    "unknown momentum_dtype": calling(lambda w: LARS(w.params, momentum_dtype=torch.int8)),
    "an option of the whole optimizer in a group": calling(
        lambda w: ENTRIES["LARS: param_groups[1]: "](w, {"master_weights": True})
    ),
    "integer parameter": parameter(lambda: torch.ones(3, dtype=torch.int32)),
    "complex parameter": parameter(lambda: torch.ones(3, dtype=torch.complex64)),
    "sparse parameter": parameter(lambda: sparse(torch.ones(3))),
    "expanded parameter": parameter(lambda: torch.ones(1).expand(3)),
    "parameter on the meta device": parameter(lambda: torch.ones(3, device="meta")),
    "integer gradient": stepping(gradient(lambda p: torch.ones(3, dtype=torch.int64))),
    "complex gradient": stepping(gradient(lambda p: torch.ones(3, dtype=torch.complex64))),
    "sparse gradient": stepping(gradient(sparse)),
    "gradient on another device": calling(
        lambda w: lars_step(w.params[:1], [w.grads[0].to("meta")], [None])
    ),
    "gradient of another shape": stepping(another_shape),
    "momentum of another shape": stepping(
        lambda w: w.optimizer.state[w.params[1]].update(momentum_buffer=torch.ones(4))
    ),
    "lists of different lengths": calling(lambda w: lars_step(w.params, w.grads[:1], w.buffers)),
    "duplicate parameter in a group, found by `step()`": stepping(
        lambda w: w.optimizer.param_groups[0]["params"].append(w.params[1])
    ),
    "duplicate parameter in two groups": calling(
        lambda w: w.optimizer.add_param_group({"params": iter(w.params[1:])})
    ),
    "duplicate parameter in `lars_step`": calling(
        lambda w: lars_step([w.params[1]] * 2, [w.grads[1]] * 2, [None] * 2)
    ),
    "a tensor in the place of `lars_step`'s list": calling(
        lambda w: lars_step(w.params[0], w.grads, w.buffers)
    ),
    "gradient that is None in `lars_step`": calling(
        lambda w: lars_step(w.params, [w.grads[0], None], w.buffers)
    ),
    "parameter that is no tensor": calling(
        lambda w: lars_step([w.params[0], 3.0], w.grads, w.buffers)
    ),
    "momentum that is no tensor in `lars_step`": calling(
        lambda w: lars_step(w.params, w.grads, [w.buffers[0], 0.0])
    ),
    "momentum of another shape in `lars_step`": calling(
        lambda w: lars_step(w.params, w.grads, [w.buffers[0], torch.ones(4)])
    ),
    "a tuple of buffers": calling(lambda w: lars_step(w.params, w.grads, (None, None))),
    "a buffer of two parameters": calling(
        lambda w: lars_step([w.params[1], torch.ones(3)], [w.grads[1]] * 2, [w.buffers[1]] * 2)
    ),
    "a buffer that is a gradient": calling(
        lambda w: lars_step(w.params, w.grads, [w.buffers[0], w.grads[1].view(3)])
    ),
    "grad_scale that is no tensor": calling(lambda w: w.lars_step(grad_scale=2.0)),
    "found_inf of two elements": calling(lambda w: w.lars_step(found_inf=torch.zeros(2))),
    "non-leaf tensor": calling(lambda w: LARS([("head", w.params[1] * 2)])),
    "non-leaf tensor in `lars_step`": calling(
        lambda w: lars_step([w.params[1] * 2], [w.grads[1]], [None])
    ),
    "momentum that is no tensor": stepping(state("momentum_buffer", 3.0)),
    "momentum of integers": stepping(state("momentum_buffer", torch.ones(3, dtype=torch.int64))),
    "freed parameter": parameter(lambda: freed(torch.ones(3))),
    "freed gradient": stepping(lambda w: freed(w.params[1].grad)),
    "freed momentum": stepping(state("momentum_buffer", freed(torch.ones(3)))),
    "parameter made in inference mode": parameter(in_inference_mode),
    "master_weights that is neither True nor False": calling(
        lambda w: LARS(w.params, master_weights=1)
    ),
    "checkpoint that is no dict": calling(lambda w: w.optimizer.load_state_dict(3)),
    "checkpoint without its parts": loading(dict.clear),
    "checkpoint of other groups": loading(lambda saved: saved["param_groups"][0]["params"].pop()),
    "checkpoint with a bad option": loading(lambda saved: saved["param_groups"][0].update(lr=-1.0)),
    "checkpoint with a momentum of integers": saved_state(momentum_buffer=torch.tensor([1, 2, 3])),
    "checkpoint with a momentum of another shape": saved_state(momentum_buffer=torch.ones(4)),
    "checkpoint of another optimizer": saved_state(exp_avg=torch.ones(3), step=1),
    "checkpoint of `torch.optim.SGD`, whose momentum is free of lr": loading(of_another()),
    "checkpoint whose momentum nothing explains": loading(
        lambda saved: [
            group.pop(name)
            for group in saved["param_groups"]
            for name in Options._fields
            if name != "momentum"
        ]
    ),
    "a closure that is no function": calling(lambda w: w.optimizer.step(3)),
    "checkpoint of another LARS with the same key": loading(of_another(is_skipped=False)),
}

# Where the kernels cannot run at all.
WITHOUT_KERNELS: dict[str, Prepare] = {
    '`backend="triton"` on CPU tensors without the interpreter': calling(
        lambda w: w.lars_step(backend="triton")
    ),
}
