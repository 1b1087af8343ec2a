"""Bad input: what every refusal says, word for word, and that it changes nothing."""

import ast
import math
from pathlib import Path

import pytest
import torch

import lars_fused
from lars_fused import LARS
from tests import refusals
from tests.contract.bad_input import (
    CHOICES,
    ENTRIES,
    FLAGS,
    NUMBERS,
    World,
    a_group_option,
    calling,
    gradient,
    sparse,
    stepping,
)

pytestmark = [pytest.mark.cpu, pytest.mark.interpret]


def refused(prepare, world):
    """The error, after checking that nothing but the error came of it."""
    act = prepare(world)
    before = world.facts()
    error = refusals.error_of(act)
    assert world.facts() == before
    return error


@pytest.mark.parametrize("what", refusals.CASES)
def test_is_refused_with_a_text_that_helps_and_changes_nothing(what, backend, tier):
    if tier != "cpu" and (what in refusals.WITHOUT_KERNELS or what in refusals.ALONE):
        pytest.skip("cannot happen where the kernels run, or has nothing to do with them")
    error = refused(refusals.CASES[what], World(backend))
    assert refusals.text_of(error) == refusals.read()[what]


def test_the_golden_file_has_these_texts_and_no_other():
    assert list(refusals.read()) == list(refusals.CASES)


# No texts: protocols of Python, whose errors nobody reads.
SILENT = {("_engine/members.py", "__getattr__")}
PACKAGE = Path(lars_fused.__file__).parent


def texts_in(path):
    """Every error and warning of a module: the function around it, its first and last line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for node in ast.walk(tree):
        error = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        warning = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
        if error or warning:
            around = [f.name for f in functions if f.lineno <= node.lineno <= f.end_lineno]
            yield around[-1] if around else "", node.lineno, node.end_lineno


def test_every_refusal_and_warning_of_the_package_has_its_text_here(tier):
    if tier != "cpu":
        pytest.skip("the same in every tier")
    met = set()
    for prepare in refusals.CASES.values():
        at = refusals.error_of(prepare(World())).__traceback__
        while at is not None:
            met.add((at.tb_frame.f_code.co_filename, at.tb_lineno))
            at = at.tb_next
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("study/"):
            continue
        for function, first, last in texts_in(path):
            reached = any((str(path), line) in met for line in range(first, last + 1))
            if not reached and (name, function) not in SILENT:
                missing.append(f"{name}:{first}, in {function}")
    assert not missing, "add cases to contract/bad_*.py: " + str(missing)


NO_NUMBERS = ("0.1", None, True, [0.1], 1j)


def out_of_range():
    for name in NUMBERS:
        yield from ((name, value) for value in (-0.1, -1e-9, math.nan, math.inf, -math.inf))
    yield from (("momentum", 1.5), ("dampening", 1.5))
    yield from ((name, value) for name in CHOICES for value in ("other", None))


def of_another_kind():
    yield from ((name, value) for name in NUMBERS for value in NO_NUMBERS)
    yield from ((name, value) for name in FLAGS for value in (2, None))


@pytest.mark.row(3)
@pytest.mark.parametrize("where", ENTRIES)
@pytest.mark.parametrize(("name", "value"), out_of_range())
def test_every_value_out_of_range_at_every_entry(where, name, value, tier):
    only_once(tier)
    text = refusals.text_of(refused(calling(lambda w: ENTRIES[where](w, {name: value})), World()))
    allowed = {**NUMBERS, **CHOICES}[name]
    assert text == f"ValueError: {where}{name}={value!r} is not allowed; must be {allowed}"


@pytest.mark.row(3)
@pytest.mark.parametrize("where", ENTRIES)
@pytest.mark.parametrize(("name", "value"), of_another_kind())
def test_every_value_of_another_kind_at_every_entry(where, name, value, tier):
    only_once(tier)
    text = refusals.text_of(refused(calling(lambda w: ENTRIES[where](w, {name: value})), World()))
    assert text.startswith(f"TypeError: {where}{name}={value!r} is ")


@pytest.mark.row(3)
@pytest.mark.parametrize(("name", "value"), [*out_of_range(), *of_another_kind()])
def test_every_value_that_stands_in_a_group_when_it_steps(name, value, tier):
    """Found before the first step too, which then leaves no state behind."""
    only_once(tier)
    world = World()
    text = refusals.text_of(refused(stepping(a_group_option(**{name: value})), world))
    assert text.split(": ", 1)[1].startswith(f"LARS: param_groups[0]: {name}={value!r} is ")
    first = LARS(world.params)
    first.param_groups[0][name] = value
    assert refusals.text_of(refused(lambda _: first.step, world)) == text
    assert not first.state
    world.optimizer.param_groups[0][name] = world.optimizer.defaults[name]
    world.optimizer.step()  # and it goes on once the value is allowed again


def only_once(tier):
    if tier != "cpu":
        pytest.skip("refused before there is a backend: once is enough")


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_every_range_are_allowed(name):
    for value in (0, 0.0, 1):
        LARS(World().params, **{name: value}).step()


def test_nothing_is_stepped_when_the_last_tensor_is_bad():
    """Everything is checked before the first write: the first tensor keeps its bits too, and the
    first step of a new tensor leaves no state behind.
    """
    world = World()
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    world.optimizer.add_param_group({"params": [new]})
    gradient(sparse)(world)
    assert type(refused(lambda w: w.optimizer.step, world)) is RuntimeError
    assert new not in world.optimizer.state
