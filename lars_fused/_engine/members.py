"""Names of parameters, the models that they came from, and what took their place there.

`fully_shard`, tensor parallelism, `to_empty` and plain assignment put other parameters into a
model. An optimizer that holds the old ones silently trains nothing. Where the model is known
(`param_groups(model, ...)` leaves a trace in its groups), the new ones are found by name.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .validate import describe

Model = weakref.ref[nn.Module]


_BIAS_NAME = re.compile(r"(^|_)bias(_|$)")


def is_bias(name: str) -> bool:
    """Whether the last part of a name says so: `bias`, `bias_k`, `in_proj_bias`, `bias_ih_l0`."""
    return _BIAS_NAME.search(name.rpartition(".")[2]) is not None


class NamedParameter(tuple[str, Tensor]):
    """(name, parameter), which answers as the parameter for those who expect a bare one.

    `torch.optim.Optimizer` takes the pair apart. What stands before it, such as
    ZeroRedundancyOptimizer, may look at `device`, `numel()` or `requires_grad` of a group's
    parameters, set them, or hand them to torch functions. Copies and pickles are plain pairs.
    """

    model: Model | None

    def __new__(cls, name: str, parameter: Tensor, model: Model | None = None) -> NamedParameter:
        """The pair, and the model that it was found in."""
        pair = super().__new__(cls, (name, parameter))
        pair.model = model
        return pair

    def __getattr__(self, attribute: str) -> Any:
        # Protocols such as __deepcopy__ are about the pair.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self[1], attribute)

    def __setattr__(self, attribute: str, value: object) -> None:
        if attribute == "model":  # the pair's own
            super().__setattr__(attribute, value)
        else:
            setattr(self[1], attribute, value)

    def __delattr__(self, attribute: str) -> None:
        delattr(self[1], attribute)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch functions see the parameter."""
        return function(*map(_bare, args), **{k: _bare(v) for k, v in (kwargs or {}).items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


def _bare(value: Any) -> Any:
    if isinstance(value, NamedParameter):
        return value[1]
    return type(value)(map(_bare, value)) if type(value) in (list, tuple) else value


def tensors_of(given: object) -> list[Any] | None:
    """The elements of what can be iterated over, pairs as their parameters; None of anything else.

    Not `isinstance(given, Iterable)`, which does not know sequences with `__getitem__` alone.
    """
    try:
        # What cannot be iterated over is asked for here, and answered below.
        elements = iter(given)  # type: ignore[call-overload]
    except TypeError:
        return None
    return [t[1] if isinstance(t, NamedParameter) else t for t in elements]


def list_of_tensors(caller: str, name: str, given: object) -> list[Any]:
    """`tensors_of`; TypeError for anything else, and for a tensor, which it would take apart."""
    listed = None if isinstance(given, Tensor) else tensors_of(given)
    if listed is None:
        raise TypeError(
            f"{caller}: {name} is a {type(given).__name__}; must be a list of tensors, "
            f"such as [{name[:-1]}]"
        )
    return listed


def successor(model: nn.Module, name: str, p: Tensor) -> Tensor | None:
    """The parameter that took the place of `p`; None where `p` is in place, or nothing is there."""
    if any(p is held for held in model.parameters()):
        return None
    owner: object = model
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step, None)
    found = getattr(owner, last, None)
    return found if isinstance(found, nn.Parameter) else None


def follow(members: Sequence[object], label: Callable[[int, Tensor, str], str]) -> list[object]:
    """The members of a new group, each the one that its model holds now.

    Raises:
        ValueError: for a parameter that was replaced by one of another shape.
    """
    found: list[object] = []
    for i, member in enumerate(members):
        if not isinstance(member, NamedParameter):
            found.append(member)
            continue
        name, p = member
        model = member.model() if member.model else None
        new = None if model is None else successor(model, name, p)
        if new is not None and new.shape != p.shape:
            raise ValueError(
                f"{label(i, p, name)}: was replaced in the model by a parameter of "
                f"shape {tuple(new.shape)} after param_groups; call param_groups again"
            )
        found.append(member if new is None else NamedParameter(name, new, member.model))
    return found


class _Origin(NamedTuple):
    parameter: Tensor
    """Held, so that its id is not given to another one."""
    name: str
    model: Model


class Origins:
    """Which model and name each parameter of an optimizer came from, as far as it is known."""

    def __init__(self) -> None:
        self._of: dict[int, _Origin] = {}

    def note(self, members: Sequence[object]) -> None:
        """Remember the members of a new group."""
        for m in members:
            if isinstance(m, NamedParameter) and m.model is not None:
                self._of[id(m[1])] = _Origin(m[1], m[0], m.model)

    def keep(self, params: Sequence[Tensor]) -> None:
        """Forget all others."""
        if self._of:
            held = set(map(id, params))
            self._of = {key: origin for key, origin in self._of.items() if key in held}

    def names(self) -> dict[int, str]:
        """By `id`, the name of every parameter of the models that are known."""
        models = {id(m): m for o in self._of.values() if (m := o.model()) is not None}
        return {id(p): name for m in models.values() for name, p in m.named_parameters()}

    def replaced(self, params: Sequence[Tensor]) -> dict[int, Tensor]:
        """By its `id`, what took the place of a parameter, unless that is among `params`, too."""
        held = set(map(id, params))
        live: dict[int, set[int]] = {}
        found = {}
        for key, (p, name, ref) in self._of.items():
            model = ref()
            if model is None:
                continue
            if id(model) not in live:
                live[id(model)] = set(map(id, model.parameters()))
            if key in live[id(model)]:
                continue
            new = successor(model, name, p)
            if new is not None and id(new) not in held and new.shape == p.shape:
                found[key] = new
        return found

    def refuse_replaced(self, params: Sequence[Tensor], label: Callable[[int], str]) -> None:
        """Raise where a model has put another parameter in the place of one without a gradient.

        Raises:
            RuntimeError: names the first such parameter, by `label` of its position.
        """
        replaced = self.replaced(params)
        for i, p in enumerate(params):
            if p.grad is None and id(p) in replaced:
                raise RuntimeError(
                    f"{label(i)}: gets no gradient, because the model holds another "
                    f"{type(replaced[id(p)].data).__name__} under this name; what shards, moves or "
                    "replaces parameters must come before the optimizer is made"
                )


def named_alike(
    group: dict[str, Any], groups: Sequence[Mapping[str, Any]], known: Mapping[int, str]
) -> dict[str, Any]:
    """A new group, with names or without, as the others of its optimizer: torch wants all alike.

    Names that come beside bare parameters are dropped: who divides a group among ranks
    (ZeroRedundancyOptimizer) copies the whole list with each part. A wrong name is worse than none.

    Args:
        group: its `params` is a list of parameters, or of (name, parameter).
        groups: those that the optimizer has.
        known: names by `id` of the parameter.
    """
    members = group["params"]
    bare = [m for m in members if not isinstance(m, tuple)]
    group = {key: value for key, value in group.items() if key != "param_names"}
    if not groups or (bare and len(bare) < len(members)):  # torch refuses a mixed group itself
        return group
    if "param_names" not in groups[0]:
        return {**group, "params": [m[1] if isinstance(m, tuple) else m for m in members]}
    if not bare:
        return group
    taken = {name for other in groups for name in other["param_names"]}
    pairs = []
    for i, p in enumerate(members):
        name = known.get(id(p), f"param_groups[{len(groups)}].{i}")
        pairs.append((name if name not in taken else f"param_groups[{len(groups)}].{i}", p))
    return {**group, "params": pairs}


def adopt(
    group: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    origins: Origins,
    *,
    alike: bool,
) -> dict[str, Any]:
    """A new group with the parameters that their model holds now, and names as the others have.

    Args:
        group: what was given to `add_param_group`.
        groups: those that the optimizer has.
        origins: of all parameters; those of the new group are noted.
        alike: False while the optimizer is made: groups given together must agree, as torch has it.
    """
    params = group.get("params")
    if not isinstance(params, (list, tuple)):
        return group  # one parameter, or what torch refuses
    where = f"param_groups[{len(groups)}]['params']"
    followed = follow(params, lambda i, p, name: describe(f"{where}[{i}]", p, name))
    origins.note(followed)
    # Names beside bare parameters are not believed: they may be those of other parameters.
    group = {k: v for k, v in group.items() if k != "param_names"} | {"params": followed}
    return named_alike(group, groups, origins.names()) if alike else group


class Layers:
    """What each group was made of, to know pieces of flat buffers that are put in its place."""

    def __init__(self) -> None:
        self._made: list[tuple[set[int], int, int]] = []

    def note(self, group: Mapping[str, Any]) -> None:
        """Remember a new group: its parameters by `id`, their number and most dimensions."""
        params = group["params"]
        most = max((p.dim() for p in params), default=0)
        self._made.append((set(map(id, params)), len(params), most))

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise where a group's layers were exchanged for partitions of flat buffers.

        ZeRO of DeepSpeed does so: what it hands over has one dimension and holds parts of several
        layers, or of one. Norms of such pieces are not those of layers.
        """
        for g, group in enumerate(groups):
            params, names = group["params"], group.get("param_names")
            if names is not None and len(names) != len(params):
                raise RuntimeError(
                    f"LARS: param_groups[{g}] has {len(params)} parameters and {len(names)} names; "
                    f"change 'params' and 'param_names' together. {_FLAT}"
                )
            if g >= len(self._made) or not params or not group.get("adapt", True):
                continue
            made, count, most = self._made[g]
            new = made.isdisjoint(map(id, params))
            if new and all(p.dim() == 1 for p in params) and (most > 1 or len(params) < count):
                raise RuntimeError(
                    f"LARS: param_groups[{g}]: its {count} parameters were exchanged for "
                    f"{len(params)} of one dimension, which are not layers. {_FLAT}"
                )


_FLAT = (
    "Partitions of flat buffers, as ZeRO of DeepSpeed hands them to its optimizer, have no layer "
    "norms; use DDP, ZeroRedundancyOptimizer or torch.distributed.fsdp.fully_shard"
)
