"""The one table of hyper-parameters, and everything that must agree with it."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import lars_fused
from lars_fused import LARS, conventions, lars_step, options
from lars_fused.checkpoints import convert
from lars_fused.kernels import layout
from lars_fused.options import TABLE, Options, Settings
from tests import test_reference
from tests.cases import OPTIONS, TERMS
from tests.contract import bad_input, test_options

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]


# In the order of the steps in CONTRIBUTING.md: with -x, the first failure is the next step.


def test_each_option_has_a_word_or_a_bit_of_its_own_in_the_group_row():
    words = [kind.word for kind in TABLE.values() if kind.word != layout.SWITCHES]
    words += [layout.LR_AT, layout.SWITCHES]
    assert sorted(words) == list(range(len(words))), "each word once, without a gap"
    assert len(words) <= layout.GROUP_WORDS, "raise GROUP_WORDS, a power of two"
    flags = [name for name, value in Options._field_defaults.items() if isinstance(value, bool)]
    bits = [int(TABLE[name].encode(True)) for name in flags]
    bits += [layout.LR_IS_FP64, *filter(None, layout.DENOMINATORS.values())]
    assert sorted(bits) == [1 << n for n in range(len(bits))], "each bit once, without a gap"


@pytest.mark.parametrize("function", [LARS, lars_step], ids=["LARS", "lars_step"])
def test_signatures_list_the_options_with_their_defaults(function):
    parameters = inspect.signature(function).parameters
    shared = [name for name in parameters if name in Options._fields]
    missing = [name for name in Options._fields if name not in shared]
    assert not missing, f"add {missing} to the signature of {function.__name__}"
    assert shared == list(Options._fields), "not in the order of the table"
    for name, default in Options._field_defaults.items():
        assert parameters[name].default == default, name
        keyword = inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].kind == keyword or name == "lr"


def test_the_settings_of_the_optimizer_are_its_last_arguments():
    parameters = inspect.signature(LARS).parameters
    assert list(parameters)[-len(Settings._fields) :] == list(Settings._fields)
    for name, default in Settings._field_defaults.items():
        assert parameters[name].default == default, name


@pytest.mark.parametrize("name", TABLE)
def test_the_docstring_documents_every_option_and_its_symbol(name):
    for documented in (LARS, lars_step):
        lines = re.findall(rf"^        {name}: (.*)$", documented.__doc__, re.MULTILINE)
        assert len(lines) == 1, f"add {name} to the docstring of {documented.__name__}"
    (line,) = re.findall(rf"^        {name}: (.*)$", LARS.__doc__, re.MULTILINE)
    symbol = TABLE[name].symbol
    equations = LARS.__doc__.split("    Source: ")[0].partition("d = g")[2]
    assert symbol in equations, f"the equations in the docstring of LARS lack {symbol} ({name})"
    if symbol and name != "denominator":
        assert line.startswith(symbol), line
    if bounded := re.fullmatch("0 to (.*)", TABLE[name].allowed):
        assert f"in [0, {bounded[1]}]" in line


def test_the_documentation_has_the_table():
    page = (ROOT / "docs" / "options.md").read_text("utf-8")
    lacking = [line for line in options.documentation_table().splitlines() if line not in page]
    assert not lacking, f"paste options.documentation_table() into docs/options.md: {lacking}"
    assert options.documentation_table() in page, "docs/options.md has more than the table"
    _, whole = page.split("Options of the whole optimizer only: ")
    assert re.findall(r"`(\w+)` \(", whole) == list(options.Settings._fields)


def other_value(name):
    """A value of an option that is allowed and is not its default."""
    default = Options._field_defaults[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return TABLE[name].allowed.split('"')[-2]
    return default / 2 if default else 0.25


def test_the_group_row_encodes_every_option():
    device = torch.device("cpu")
    plain, integers = options.group_row(Options(), device)
    for name, kind in TABLE.items():
        row, changed = options.group_row(Options(**{name: other_value(name)}), device)
        assert changed[layout.LR_AT] == 0
        differ = [n for n, (a, b) in enumerate(zip(row, plain, strict=True)) if a != b]
        toggled = changed[layout.SWITCHES] ^ integers[layout.SWITCHES]
        if kind.word == layout.SWITCHES:
            code = kind.encode(other_value(name)) ^ kind.encode(Options._field_defaults[name])
            assert (differ, toggled) == ([], code), name
        else:
            assert (differ, toggled) == ([kind.word], 0), name
    row, changed = options.group_row(
        Options(dampening=0.25, maximize=True, denominator="gradient"), device
    )
    assert row[layout.KEEP] == 1.0 - 0.25
    assert changed[layout.SWITCHES] & layout.MAXIMIZE
    assert changed[layout.SWITCHES] & layout.DENOMINATORS["gradient"]


@pytest.mark.parametrize(
    "cases",
    [
        [test_reference.HAND, *(case.options for case in test_reference.CASES)],
        [TERMS, *OPTIONS.values()],
        test_options.CHANGES,
    ],
    ids=["test_reference.CASES", "cases.OPTIONS", "contract/test_options.CHANGES"],
)
def test_every_option_has_a_case_by_hand_and_on_every_backend(cases):
    """A reference that misses an option fails in the first, a backend in the others."""
    changed = {
        name
        for case in cases
        for name, value in case.items()
        if name in Options._fields and value != Options._field_defaults[name]
    }
    missing = set(Options._fields) - changed
    assert not missing, f"add a case that changes {missing}"


def test_a_converted_checkpoint_has_every_option():
    """Each option that no convention sets has its default in `checkpoints/convert.py`."""
    for name in conventions.__all__:
        given = {"lr", "momentum", *convert._DEFAULTS, *getattr(conventions, name)}
        missing = set(Options._fields) - given
        assert not missing, f"add {missing} to convert._DEFAULTS, or to conventions.{name}"


def test_every_option_is_refused_where_it_is_bad():
    listed = {*bad_input.NUMBERS, *bad_input.FLAGS, *bad_input.CHOICES}
    missing = set(Options._fields) - listed
    assert not missing, f"add {missing} to NUMBERS, FLAGS or CHOICES in contract/bad_input.py"


def test_defaults_and_groups_hold_the_options_and_nothing_else():
    """Torch's contract: every key of `defaults` stands in every group."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([p], master_weights=True, momentum_dtype=torch.bfloat16)
    assert set(optimizer.defaults) == set(Options._fields)
    assert set(optimizer.param_groups[0]) == {"params", *Options._fields}
    assert optimizer.master_weights
    assert optimizer.momentum_dtype == torch.bfloat16
    assert not optimizer.capturable


def test_print_says_what_runs_and_what_holds_for_the_whole_optimizer():
    shown = repr(LARS([torch.nn.Parameter(torch.ones(2))], backend="torch"))
    assert "backend: torch" in shown
    for name in (*Options._fields, *Settings._fields):
        assert f" {name}: " in shown


def test_a_positional_call_is_answered_with_the_keyword_form():
    """The third argument is momentum here, momentum in SGD, and something else elsewhere."""
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"\(0.9, 0, 0.0001\).*by keyword.*momentum=0.9, weight"):
        LARS([p], 0.1, 0.9, 0, 1e-4)
    LARS([p], 0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        LARS([p], momentun=0.9)


def test_only_public_names_are_shown():
    assert sorted(dir(lars_fused)) == sorted([*lars_fused.__all__, "__version__"])
    public = {name for name in vars(LARS) if not name.startswith("_")}
    own = {"add_param_group", "backend", "capturable", "layer_stats", "load_state_dict"}
    own |= {"exclude_ndim", "master_weights", "momentum_dtype", "state_dict", "step"}
    assert public == own | {"backend_report"}
