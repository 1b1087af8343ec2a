"""The parameters of an optimizer's groups, in one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from . import validate
from .members import is_bias

Groups = Sequence[dict[str, Any]]
"""`param_groups`, as torch has it."""


@dataclass(frozen=True)
class Parameters:
    """Every parameter by its place in the list of all, and where its options are."""

    flat: list[Tensor]
    sizes: list[int]
    """How many each group has."""
    group_of: list[int]
    row_of: list[int]
    """The options of each: those of its group, or, that many groups further, of what is excluded.
    """

    def label(self, i: int, groups: Groups) -> str:
        """The prefix of a message about one parameter."""
        where, name = self._place(i, groups)
        return validate.describe(where, self.flat[i], name)

    def name(self, i: int, groups: Groups) -> str:
        """What it is called where all are reported; without names, its place."""
        key = keys(groups)[i]
        return key if isinstance(key, str) else self._place(i, groups)[0]

    def _place(self, i: int, groups: Groups) -> tuple[str, str | None]:
        g = self.group_of[i]
        at = i - self.group_of.index(g)
        names = groups[g].get("param_names")
        return f"param_groups[{g}]['params'][{at}]", names[at] if names else None


NONE = Parameters([], [], [], [])


def keys(groups: Groups) -> Sequence[str | int]:
    """What each parameter is called where all are reported: its name, or its index without names.

    The first of several parameters of one name keeps it; the others' begin with their group.
    """
    named = [(g, name) for g, group in enumerate(groups) for name in group.get("param_names", ())]
    if not named:
        return range(sum(len(group["params"]) for group in groups))
    given = {name for _, name in named}
    if len(given) == len(named):
        return [name for _, name in named]
    found: dict[str, None] = {}
    for g, name in named:
        key = name
        while key in found or (key in given and key != name):
            key = f"param_groups[{g}].{key}"
        found[key] = None
    return list(found)


def parameters(groups: Groups, exclude_ndim: int) -> Parameters:
    """The parameters of some groups.

    Args:
        groups: in order.
        exclude_ndim: tensors of at most so many dimensions are excluded; from 1 on also biases.

    Raises:
        ValueError: for one that appears twice.
    """
    members = [group["params"] for group in groups]
    sizes, flat = list(map(len, members)), list(chain.from_iterable(members))
    first: dict[int, int] = {}
    for i, p in enumerate(flat):
        if first.setdefault(id(p), i) != i:
            raise ValueError(
                f"{validate.describe(f'parameter {i}', p)}: is a duplicate; "
                "each parameter may appear only once in param_groups"
            )
    names = [n for g in groups for n in g.get("param_names", ())]
    group_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    row_of = list(group_of)
    for i, p in enumerate(flat):
        if p.dim() <= exclude_ndim or (exclude_ndim >= 1 and names and is_bias(names[i])):
            row_of[i] += len(sizes)
    return Parameters(flat, sizes, group_of, row_of)
