"""What type checkers see: the real modules of kernels/, and classes at the engine's seams."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "typings" / "lars_fused" / "kernels"


def test_type_checkers_are_led_to_every_module_of_kernels():
    """Or they would take all that comes from it for Any."""
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    stubs = {path.stem: path.read_text(encoding="utf-8") for path in STUBS.glob("*.pyi")}
    assert len(modules) > 8
    assert set(stubs) == modules
    for name, text in stubs.items():
        if name != "__init__":
            assert text == f"from kernels.{name} import *\n", "repeats what the module says"
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.mypy]")[1]
    assert "lars_fused.kernels" not in settings.split("\n[tool.")[1]  # may not be missing


# Whoever adds to these says why no type can be named. mypy is strict about all others.
_GROUPS = "param_groups and what is given to add_param_group, as torch types them"
ANY = {
    "members.NamedParameter.__getattr__": "an attribute of a parameter, whichever it is",
    "members.NamedParameter.__torch_function__": "any torch function, as torch types the protocol",
    "members.NamedParameter.__reduce__": "as the protocol of pickle is typed",
    "members._bare": "an argument of any torch function",
    "members.tensors_of": "what a caller gave for tensors, before anything is checked",
    "members.list_of_tensors": "the same",
    "members.named_alike": _GROUPS,
    "members.adopt": _GROUPS,
    "members.Layers.note": _GROUPS,
    "members.Layers.check": _GROUPS,
    "parameters.Groups": _GROUPS,
    "validate.check_members": _GROUPS,
    "new_state.State": "Optimizer.state, as torch types it",
    "new_state.Held": "the same of one parameter",
    "portable.pieces": "which entries are None follows from which tensors were given",
}


def uses_of_any(tree, inside):
    """The dotted names of the functions, classes and assignments that mention `Any`."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{inside}.{node.name}"
        elif isinstance(node, ast.Assign) and isinstance(tree, ast.Module):
            name = f"{inside}.{ast.unparse(node.targets[0])}"
        if isinstance(node, ast.Name) and node.id == "Any":
            yield inside
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            continue  # documentation
        else:
            yield from uses_of_any(node, name)


def engine():
    for path in sorted((ROOT / "lars_fused" / "_engine").glob("*.py")):
        yield path.stem, ast.parse(path.read_text(encoding="utf-8"))


def test_the_engine_says_any_where_no_type_can_be_named_and_nowhere_else():
    found = {use for name, tree in engine() for use in uses_of_any(tree, name)}
    assert found - set(ANY) == set(), "name the type"
    assert set(ANY) - found == set(), "delete what is not used any more"


def test_uses_of_any_are_found():
    source = """
Alias = dict[str, Any]
class A:
    def f(self, x: Any) -> None:
        y: list[Any] = []
"""
    assert set(uses_of_any(ast.parse(source), "m")) == {"m.Alias", "m.A.f"}


def attributes(node):
    """What the methods of a class assign to `self`. Records, which have none, are documentation."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }


def test_no_class_of_the_engine_has_more_than_a_dozen_attributes():
    counts = {
        f"{name}.{node.name}": attributes(node)
        for name, tree in engine()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {"settings", "prepared", "last"} <= counts["engine.Engine"]
    assert {name: found for name, found in counts.items() if len(found) > 12} == {}
