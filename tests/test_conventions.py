import copy
import inspect
import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from lars_fused import LARS, conventions

pytestmark = pytest.mark.cpu

# What every source fixes. Learning rate and weight decay are always the caller's.
FIXED = {
    "trust_coefficient",
    "eps",
    "denominator",
    "lr_in_momentum",
    "trust_clip",
    "decay_zero_norm",
}


def convention(name):
    return getattr(conventions, name)


def one_step(name, *, w, g, lr, weight_decay, steps=1, **options):
    """The weight after `steps` steps with the same gradient, in float64 on the portable backend."""
    p = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
    options = {"weight_decay": weight_decay, "backend": "torch", **convention(name), **options}
    optimizer = LARS([p], lr, **options)
    for _ in range(steps):
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", conventions.__all__)
def test_states_what_its_source_fixes_and_nothing_of_the_callers(name):
    assert set(convention(name)) == FIXED


@pytest.mark.parametrize("name", conventions.__all__)
def test_documents_its_equations_and_what_it_does_not_reproduce(name):
    text = Path(conventions.__file__).read_text(encoding="utf-8")
    documented = re.search(rf'^{name}: dict\[str, Any\]\n"""(.*?)"""', text, re.M | re.S)
    assert documented, f"conventions.{name} has no docstring"
    words = " ".join(documented[1].split())
    assert "q = " in words or "The equations are those of" in words
    assert "emaining differences" in words


@pytest.mark.parametrize("name", conventions.__all__)
def test_a_change_of_what_was_given_out_changes_no_convention(name):
    before = dict(convention(name))
    given = convention(name)
    given["eps"] = 1.0
    given.clear()
    assert convention(name) == before
    assert before["eps"] != 1.0
    assert (convention(name) | {"eps": 2.0})["eps"] == 2.0


@pytest.mark.parametrize("name", conventions.__all__)
def test_is_plain_data_that_any_configuration_takes(name):
    given = convention(name)
    assert type(given) is dict
    assert pickle.loads(pickle.dumps(given)) == copy.deepcopy(given) == given
    assert json.loads(json.dumps(given)) == given
    file = io.BytesIO()
    torch.save({"options": given}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"options": given}
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    config = omegaconf.OmegaConf.create({"options": given})
    assert omegaconf.OmegaConf.to_container(config)["options"] == given


def test_the_module_shows_its_conventions_and_nothing_else():
    assert dir(conventions) == sorted(conventions.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LARC'"):
        conventions.LARC  # noqa: B018


@pytest.mark.parametrize("name", conventions.__all__)
def test_sets_the_options_of_an_optimizer(name):
    optimizer = LARS([torch.nn.Parameter(torch.ones(2, 2))], 0.5, **convention(name))
    for option, value in convention(name).items():
        assert optimizer.param_groups[0][option] == value
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_paper_is_the_defaults():
    signature = inspect.signature(LARS)
    assert dict(conventions.PAPER) == {
        option: signature.parameters[option].default for option in conventions.PAPER
    }


def test_an_option_is_changed_by_merging():
    merged = conventions.APEX_LARC | {"trust_clip": False}
    assert merged["trust_clip"] is False
    assert conventions.APEX_LARC["trust_clip"] is True


# Worked by hand: w = (3, 4), so N(w) = 5; g = (0, 2), so N(g) = 2; β = 0.5, so d = g + βw = (1.5,
# 4), N(d) = √18.25 = 4.272001872658765; γ = 2. One step from no momentum: w − γqd.
BY_HAND = {
    "PAPER": 0.001 * 5 / (2 + 0.5 * 5 + 1e-8),
    "TORCHLARS": 0.001 * 5 / (2 + 0.5 * 5 + 1e-8),
    "TIMM": 0.001 * 5 / (2 + 0.5 * 5 + 1e-8),
    "APEX_LARC": 0.02 * 5 / (2 + 0.5 * 5 + 1e-8) / 2,  # min(q/γ, 1) = q/γ
    "MAE": 0.001 * 5 / 4.272001872658765,
    "SIMCLR": 0.001 * 5 / 4.272001872658765,
}


@pytest.mark.parametrize("name", conventions.__all__)
def test_first_step_worked_by_hand(name):
    got = one_step(name, w=[3.0, 4.0], g=[0.0, 2.0], lr=2.0, weight_decay=0.5)
    q = BY_HAND[name]
    expected = torch.tensor([3 - 2 * q * 1.5, 4 - 2 * q * 4.0], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_larc_clips_at_the_learning_rate():
    # q = 0.02 · 5 / (0.001 + ε) = 100; q/γ = 50, clipped to 1: plain SGD, w − γg.
    got = one_step("APEX_LARC", w=[3.0, 4.0], g=[0.0, 1e-3], lr=2.0, weight_decay=0.0)
    expected = torch.tensor([3.0, 4.0 - 2e-3], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", conventions.__all__)
def test_a_zero_gradient_still_decays_except_in_larc(name):
    got = one_step(name, w=[3.0, 4.0], g=[0.0, 0.0], lr=0.1, weight_decay=0.5)
    # N(g) = 0 gives q = 1: w − 0.1 · 0.5 · w. The decayed denominator sees N(d) = 2.5, and adapts.
    factor = {"APEX_LARC": 1.0, "MAE": 1 - 0.1 * 0.001 * 5 / 2.5 * 0.5}
    factor["SIMCLR"] = factor["MAE"]
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64) * factor.get(name, 0.95)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", conventions.__all__)
def test_where_the_learning_rate_enters(name):
    """Two steps, the second with γ = 0: the learning rate in the buffer still moves the weight."""
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    options = {**convention(name), "momentum": 0.5}
    optimizer = LARS([p], 1.0, backend="torch", **options)
    p.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()
    after_one = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    moved = not torch.equal(p.detach(), after_one)
    assert moved == (name in {"PAPER", "SIMCLR"})
