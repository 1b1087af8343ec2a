"""Bad input: the error names the parameter, its value and what is allowed, and changes nothing."""

import math

import pytest
import torch

from lars_fused import LARS
from tests.bad_input import (
    CASES,
    ENTRIES,
    INTRODUCTION,
    NUMBERS,
    README,
    SECTION,
    WITHOUT_KERNELS,
    Bad,
    World,
    a_group_option,
    calling,
    gradient,
    sparse,
    stepping,
    table,
)

pytestmark = [pytest.mark.cpu, pytest.mark.interpret]


def refused(case: Bad, world: World) -> str:
    """The message, after checking that nothing but the message came of it."""
    act = case.prepare(world)
    before = world.facts()
    with pytest.raises(case.error) as caught:
        act()
    assert type(caught.value) is case.error
    assert world.facts() == before
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.what)
def test_is_refused_with_a_text_that_helps_and_changes_nothing(case, backend):
    assert refused(case, World(backend)) == case.text


@pytest.mark.parametrize("where", ENTRIES)
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf])
def test_every_number_at_every_entry(where, name, value):
    world = World()
    case = Bad(
        "", calling(lambda w: ENTRIES[where](w, {name: value})), ValueError,
        f"{where}{name}={value!r} is not allowed; must be {NUMBERS[name]}",
    )  # fmt: skip
    assert refused(case, world) == case.text


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1e-9, math.nan, "0.1", None, True])
def test_every_number_changed_between_steps(name, value):
    world = World()
    kind = ValueError if isinstance(value, float) else TypeError
    message = refused(Bad("", stepping(a_group_option(**{name: value})), kind, ""), world)
    assert message.startswith(f"LARS: param_groups[0]: {name}={value!r} is ")
    world.optimizer.param_groups[0][name] = world.optimizer.defaults[name]
    world.optimizer.step()  # and it goes on once the value is allowed again


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_every_range_are_allowed(name):
    for value in (0, 0.0, 1):
        LARS(World().params, **{name: value}).step()


def test_without_the_interpreter_the_kernels_need_a_gpu(tier):
    if tier != "cpu":
        pytest.skip("the kernels run here")
    assert refused(WITHOUT_KERNELS, World()) == WITHOUT_KERNELS.text


def test_nothing_is_stepped_when_the_last_tensor_is_bad():
    """Everything is checked before the first write: the first tensor keeps its bits too, and the
    first step of a new tensor leaves no state behind.
    """
    world = World()
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    world.optimizer.add_param_group({"params": [new]})
    gradient(sparse)(world)
    refused(Bad("", lambda w: w.optimizer.step, RuntimeError, ""), world)
    assert new not in world.optimizer.state


def test_the_readme_has_the_texts():
    found = SECTION.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group().strip() == (INTRODUCTION + table()).strip()
