"""What must be refused, and in which words. See `test_bad_input.py`.

The table "Bad input" in `README.md` is made from these cases: `python -m tests.bad_input` writes it
anew.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_fused import LARS, lars_step
from lars_fused.checks import DENOMINATORS
from tests.cases import bits

README = Path(__file__).with_name("README.md")


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
        real = [t for t in tensors if t is not None and t.layout == torch.strided and not t.is_meta]
        groups = [{**g, "params": list(map(id, g["params"]))} for g in self.optimizer.param_groups]
        state = [(id(p), list(s)) for p, s in self.optimizer.state.items()]
        versions = [t._version for t in tensors if t is not None]
        return [bits(real), versions, repr(groups), state, dict(self.optimizer.defaults)]


class Bad(NamedTuple):
    """`prepare` puts the bad thing into a world and returns the call that must refuse it."""

    what: str
    prepare: Callable[[World], Callable[[], Any]]
    error: type[Exception]
    text: str  # of the message, all of it


NUMBERS = {
    "lr": "a finite number >= 0", "momentum": "in [0, 1]", "weight_decay": "a finite number >= 0",
    "trust_coefficient": "a finite number >= 0", "eps": "a finite number >= 0",
    "dampening": "in [0, 1]",
}  # fmt: skip
ENTRIES = {
    "LARS: ": lambda world, o: LARS(world.params, **o),
    "LARS: param_groups[1]: ": lambda world, o: world.optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2))], **o}
    ),
    "lars_step: ": lambda world, o: world.lars_step(**o),
}


def stepping(change: Callable[[World], Any]) -> Callable[[World], Callable[[], Any]]:
    """Change the world, then `optimizer.step()`."""

    def prepare(world: World) -> Callable[[], Any]:
        change(world)
        return world.optimizer.step

    return prepare


def calling(call: Callable[[World], Any]) -> Callable[[World], Callable[[], Any]]:
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


# How the second of the two parameters is called in a message.
ONE = "LARS: param_groups[0]['params'][1] (shape (3,), torch.float32, cpu): "
OF_STEP = "LARS: params[1] (shape (3,), {}, cpu): "
CASES = [
    Bad(
        "negative lr", calling(lambda w: LARS(w.params, lr=-0.1)), ValueError,
        "LARS: lr=-0.1 is not allowed; must be a finite number >= 0",
    ),
    Bad(
        "NaN lr in a group, found by `step()`", stepping(a_group_option(lr=math.nan)), ValueError,
        "LARS: param_groups[0]: lr=nan is not allowed; must be a finite number >= 0",
    ),
    Bad(
        "lr that is no number", calling(lambda w: LARS(w.params, lr="0.1")), TypeError,
        "LARS: lr='0.1' is a str; must be a number or a 1-element tensor",
    ),
    Bad(
        "lr tensor of two elements", calling(lambda w: LARS(w.params, lr=torch.ones(2))),
        ValueError, "Tensor lr must be 1-element",
    ),
    Bad(
        "lr tensor of integers", calling(lambda w: LARS(w.params, lr=torch.tensor(1))), TypeError,
        "LARS: lr is a tensor of torch.int64; must be a floating-point tensor",
    ),
    Bad(
        "momentum above 1", calling(lambda w: LARS(w.params, momentum=1.1)), ValueError,
        "LARS: momentum=1.1 is not allowed; must be in [0, 1]",
    ),
    Bad(
        "negative weight_decay in a new group",
        calling(lambda w: ENTRIES["LARS: param_groups[1]: "](w, {"weight_decay": -1e-4})),
        ValueError,
        "LARS: param_groups[1]: weight_decay=-0.0001 is not allowed; must be a finite number >= 0",
    ),
    Bad(
        "NaN trust_coefficient", calling(lambda w: w.lars_step(trust_coefficient=math.nan)),
        ValueError, "lars_step: trust_coefficient=nan is not allowed; must be a finite number >= 0",
    ),
    Bad(
        "infinite eps", calling(lambda w: LARS(w.params, eps=math.inf)), ValueError,
        "LARS: eps=inf is not allowed; must be a finite number >= 0",
    ),
    Bad(
        "nesterov with dampening",
        calling(lambda w: LARS(w.params, nesterov=True, dampening=0.1)), ValueError,
        "LARS: nesterov=True requires a momentum and zero dampening; "
        "got momentum=0.9, dampening=0.1",
    ),
    Bad(
        "nesterov without momentum, found by `step()`",
        stepping(a_group_option(nesterov=True, momentum=0.0)), ValueError,
        "LARS: param_groups[0]: nesterov=True requires a momentum and zero dampening; "
        "got momentum=0.0, dampening=0.0",
    ),
    Bad(
        "a flag that is neither True nor False", calling(lambda w: LARS(w.params, adapt=1)),
        TypeError, "LARS: adapt=1 is not allowed; must be True or False",
    ),
    Bad(
        "unknown denominator", calling(lambda w: LARS(w.params, denominator="max")), ValueError,
        f"LARS: denominator='max' is not allowed; must be one of {list(DENOMINATORS)}",
    ),
    Bad(
        "unknown backend", calling(lambda w: LARS(w.params, backend="cuda")), ValueError,
        "LARS: backend='cuda' is not allowed; must be one of ['auto', 'torch', 'triton']",
    ),
    Bad(
        "unknown momentum_dtype", calling(lambda w: LARS(w.params, momentum_dtype=torch.int8)),
        ValueError,
        "LARS: momentum_dtype=torch.int8 is not allowed; must be one of "
        "[torch.float32, torch.bfloat16, torch.float16, torch.float64]",
    ),
    Bad(
        "an option of the whole optimizer in a group",
        calling(lambda w: ENTRIES["LARS: param_groups[1]: "](w, {"master_weights": True})),
        ValueError, "LARS: param_groups[1]: master_weights=True is not a per-group option; "
        "the optimizer has master_weights=False",
    ),
    Bad(
        "integer parameter", parameter(lambda: torch.ones(3, dtype=torch.int32)), RuntimeError,
        OF_STEP.format("torch.int32") + "dtype torch.int32 is not supported; "
        "supported: float32, float16, bfloat16, float64",
    ),
    Bad(
        "complex parameter", parameter(lambda: torch.ones(3, dtype=torch.complex64)), RuntimeError,
        OF_STEP.format("torch.complex64")
        + "complex parameters are not supported; use torch.view_as_real(p)",
    ),
    Bad(
        "sparse parameter", parameter(lambda: sparse(torch.ones(3))), RuntimeError,
        OF_STEP.format("torch.float32")
        + "sparse parameters (torch.sparse_coo) are not supported; use dense ones",
    ),
    Bad(
        "expanded parameter", parameter(lambda: torch.ones(1).expand(3)), RuntimeError,
        OF_STEP.format("torch.float32")
        + "elements share memory (an expanded tensor); use p.contiguous()",
    ),
    Bad(
        "parameter on the meta device", parameter(lambda: torch.ones(3, device="meta")),
        RuntimeError, "LARS: params[1] (shape (3,), torch.float32, meta): "
        "is on the meta device; materialise it with to_empty() first",
    ),
    Bad(
        "integer gradient", stepping(gradient(lambda p: torch.ones(3, dtype=torch.int64))),
        RuntimeError,
        ONE + "its gradient has dtype torch.int64; must be a floating-point dtype",
    ),
    Bad(
        "complex gradient", stepping(gradient(lambda p: torch.ones(3, dtype=torch.complex64))),
        RuntimeError,
        ONE + "its gradient has dtype torch.complex64; must be a floating-point dtype",
    ),
    Bad(
        "sparse gradient", stepping(gradient(sparse)), RuntimeError,
        ONE + "its gradient is sparse (torch.sparse_coo); LARS needs dense gradients, "
        "e.g. Embedding(sparse=False)",
    ),
    Bad(
        "gradient on another device",
        calling(lambda w: lars_step(w.params[:1], [w.grads[0].to("meta")], [None])), RuntimeError,
        "LARS: params[0] (shape (2, 3), torch.float32, cpu): "
        "its gradient is on meta; must be on cpu as the parameter",
    ),
    Bad(
        "gradient of another shape", stepping(another_shape), RuntimeError,
        ONE.replace("(3,)", "(2,)") + "its gradient has shape (3,); must be (2,)",
    ),
    Bad(
        "momentum of another shape",
        stepping(lambda w: w.optimizer.state[w.params[1]].update(momentum_buffer=torch.ones(4))),
        RuntimeError,
        ONE + "state 'momentum_buffer' has shape (4,); must be (3,); delete it to start afresh",
    ),
    Bad(
        "lists of different lengths",
        calling(lambda w: lars_step(w.params, w.grads[:1], w.buffers)), ValueError,
        "lars_step: 2 params, 1 grads and 2 momentum_buffers; must be equally many",
    ),
    Bad(
        "duplicate parameter in a group, found by `step()`",
        stepping(lambda w: w.optimizer.param_groups[0]["params"].append(w.params[1])), ValueError,
        "LARS: parameter 2 (shape (3,), torch.float32, cpu): is a duplicate; "
        "each parameter may stand once in param_groups",
    ),
    Bad(
        "duplicate parameter in two groups",
        calling(lambda w: w.optimizer.add_param_group({"params": iter(w.params[1:])})), ValueError,
        ONE.replace("[0]['params'][1]", "[1]['params'][0]")
        + "is a duplicate of param_groups[0]['params'][1]; "
        "some parameters appear in more than one parameter group",
    ),
    Bad(
        "duplicate parameter in `lars_step`",
        calling(lambda w: lars_step([w.params[1]] * 2, [w.grads[1]] * 2, [None] * 2)), ValueError,
        OF_STEP.format("torch.float32")
        + "is a duplicate of params[0]; a parameter may stand there once",
    ),
    Bad(
        "non-leaf tensor", calling(lambda w: LARS([("head", w.params[1] * 2)])), ValueError,
        "LARS: param_groups[0]['params'][0] ('head', shape (3,), torch.float32, cpu): "
        "is a non-leaf tensor, the result of an operation; "
        "pass the parameter that it comes from, or detach() it",
    ),
    Bad(
        "non-leaf tensor in `lars_step`",
        calling(lambda w: lars_step([w.params[1] * 2], [w.grads[1]], [None])), ValueError,
        "LARS: params[0] (shape (3,), torch.float32, cpu): "
        "is a non-leaf tensor, the result of an operation; "
        "pass the parameter that it comes from, or detach() it",
    ),
]  # fmt: skip

# Where the kernels cannot run at all.
WITHOUT_KERNELS = Bad(
    '`backend="triton"` on CPU tensors without the interpreter',
    calling(lambda w: w.lars_step(backend="triton")), RuntimeError,
    "LARS: params[0] (shape (2, 3), torch.float32, cpu): backend='triton' cannot update it: "
    "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts; "
    "or use backend='auto'",
)  # fmt: skip


def table() -> str:
    """The README's table."""
    rows = [f"| {c.what} | `{c.error.__name__}` | {c.text} |" for c in (*CASES, WITHOUT_KERNELS)]
    return "\n".join(["| input | error | text |", "|---|---|---|", *rows])


SECTION = re.compile(r"(?<=## Bad input\n).*?(?=\n## |\Z)", re.DOTALL)
INTRODUCTION = """
Each of these raises before anything is changed: parameters, gradients and state keep their bits
and their version counters. Written by `python -m tests.bad_input`, and held against the real texts.

"""


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if not SECTION.search(text):
        text += "\n## Bad input\n"
    README.write_text(SECTION.sub(lambda _: INTRODUCTION + table() + "\n", text), encoding="utf-8")
