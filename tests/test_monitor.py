"""`lars_fused.monitor`: the numbers of `layer_stats` without waiting, drawn, and watched."""

import sys
import warnings

import pytest
import torch
from torch import nn

from lars_fused import LARS, param_groups
from lars_fused.monitor import Monitor
from tests import internals

# The kernels give a Monitor its numbers; what it makes of them on the host needs no kernel.
pytestmark = [pytest.mark.cpu, pytest.mark.gpu]


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


def network(device):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)


def optimizer_of(model, backend, **options):
    options = {"lr": 2.0, "trust_coefficient": 0.05, "backend": backend, **options}
    return LARS(param_groups(model, 0.1), **options)


def train(model, optimizer, steps, begin=0):
    """Steps with gradients of their own; gives what `layer_stats` says after each."""
    found = {}
    for step in range(begin, begin + steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 + step + i)
        optimizer.step()
        found[step + 1] = optimizer.layer_stats()
    return found


@pytest.mark.interpret
def test_records_are_the_layer_stats_of_their_steps(backend, device):
    model = network(device)
    optimizer = optimizer_of(model, backend)
    written = []
    with Monitor(optimizer, lambda *record: written.append(record), every=2, keep=2) as monitor:
        expected = train(model, optimizer, 7)
        assert [step for step, _ in written] == [2, 4]  # the third is kept
    assert written == [(step, expected[step]) for step in (2, 4, 6)]
    assert monitor.history == written
    train(model, optimizer, 2, begin=7)
    assert len(written) == 3


def test_tensorboard_gets_four_numbers_a_layer(backend, device):
    model = network(device)
    optimizer = optimizer_of(model, backend)
    writer = Writer()
    with Monitor(optimizer, writer, every=3, tag="mine", step=10):
        expected = train(model, optimizer, 2)[2]  # steps 11 and 12
    found = {tag: (value, step) for tag, value, step in writer.scalars}
    assert len(found) == len(writer.scalars) == 16
    for layer, row in expected.items():
        for name in ("weight_norm", "gradient_norm", "trust_ratio", "effective_lr"):
            assert found[f"mine/{name}/{layer}"] == (getattr(row, name), 12)


def test_a_real_summary_writer_takes_it(backend, device, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is missing")
    model = network(device)
    optimizer = optimizer_of(model, backend)
    writer = tensorboard.SummaryWriter(str(tmp_path))
    with Monitor(optimizer, writer, every=1):
        train(model, optimizer, 2)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    rates = events.Scalars("lars/effective_lr/0.weight")
    assert [event.step for event in rates] == [1, 2]


@pytest.mark.interpret
def test_nothing_comes_to_the_host_before_it_is_asked_for(backend, device, monkeypatch):
    model = network(device)
    optimizer = optimizer_of(model, backend)
    monitor = Monitor(optimizer, every=1, keep=100)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    copies = []

    def count(name):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, **k: (copies.append(name), real(*a, **k))[1]
        )

    for name in ("cpu", "tolist"):
        count(name)
    for _ in range(5):
        optimizer.step()
    seen = copies[:]
    monitor.flush()
    assert "cpu" not in seen
    assert copies[len(seen) :].count("cpu") == 1
    assert [step for step, _ in monitor.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.interpret
def test_later_steps_do_not_change_what_was_set_aside(backend, device):
    model = network(device)
    optimizer = optimizer_of(model, backend)
    monitor = Monitor(optimizer, every=1, keep=100)
    expected = train(model, optimizer, 4)
    monitor.flush()
    assert dict(monitor.history) == expected


def test_an_optimizer_inside_wrappers_and_arguments(backend, device):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = optimizer_of(network(device), backend)
    Monitor(Wrapper(Wrapper(optimizer)))
    with pytest.raises(TypeError, match="optimizer must be a LARS, not SGD"):
        Monitor(torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    for name in ("every", "keep"):
        with pytest.raises(ValueError, match=f"{name}=0 is not allowed; must be an int >= 1"):
            Monitor(optimizer, **{name: 0})
    with pytest.raises(ValueError, match=r"patience=0.5 is not allowed; must be an int >= 0"):
        Monitor(optimizer, patience=0.5)
    with pytest.raises(TypeError, match="not int"):
        Monitor(optimizer, 3)


def test_a_picture_of_the_training(backend, device, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = network(device)
    optimizer = optimizer_of(model, backend)
    monitor = Monitor(optimizer, every=1)
    with pytest.raises(ValueError, match="no record to draw yet"):
        monitor.picture()
    expected = train(model, optimizer, 3)
    figure = monitor.picture(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == ["N(w)", "N(g)", "trust ratio q", "effective lr γq"]
    lines = figure.axes[2].get_lines()
    assert [line.get_label() for line in lines] == list(dict(monitor.history)[1])
    assert list(lines[0].get_ydata()) == [s[lines[0].get_label()].trust_ratio
                                          for s in expected.values()]  # fmt: skip
    assert len(monitor.picture(layers=["1.weight"]).axes[0].get_lines()) == 1
    with pytest.raises(ValueError, match="no record of layer 'head'"):
        monitor.picture(layers=["head"])


def test_matplotlib_is_imported_by_the_picture_alone(monkeypatch, backend, device):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = network(device)
    optimizer = optimizer_of(model, backend)
    monitor = Monitor(optimizer, every=1)
    train(model, optimizer, 1)
    with pytest.raises(ImportError, match=r"picture\(\) needs matplotlib.*pip install matplotlib"):
        monitor.picture()


def off(kind, device):
    """A model, its optimizer's options, and a factor for the gradient of the layer that is off."""
    model, options, factor = network(device), {}, 1.0
    if kind == "zero weight":
        nn.init.zeros_(model[0].weight)
        options["lr"] = 0.0
    if kind == "zero gradient":
        factor = 0.0
    if kind == "clipped":
        options = {"trust_clip": True, "lr": 1e-6}
    if kind == "infinite":
        factor = float("nan")
    return model, options, factor


@pytest.mark.parametrize("kind", ["zero weight", "zero gradient", "clipped", "infinite"])
def test_what_is_off_all_along_is_said_once(kind, backend, device):
    texts = {
        "zero weight": "weights have had a zero norm",
        "zero gradient": "gradients have had a zero norm",
        "clipped": "trust_clip has clipped",
        "infinite": "NaN or infinite",
    }
    model, options, factor = off(kind, device)
    optimizer = optimizer_of(model, backend, **options)
    monitor = Monitor(optimizer, every=1, keep=1, patience=3)
    said = []
    for _ in range(8):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[0].weight.grad *= factor
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        said.append([str(w.message) for w in seen])
    (when,) = [i for i, messages in enumerate(said) if messages]
    (message,) = said[when]
    assert texts[kind] in message
    assert "'0.weight'" in message
    assert when == (0 if kind == "infinite" else 3)
    monitor.close()


@pytest.mark.parametrize("kind", ["zero gradient", "clipped", "infinite"])
def test_the_warnings_can_be_switched_off_and_need_patience(kind, backend, device):
    for how in ({"warn": False, "patience": 0}, {"patience": 100}):
        if kind == "infinite" and "warn" not in how:
            continue
        model, options, factor = off(kind, device)
        optimizer = optimizer_of(model, backend, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Monitor(optimizer, every=1, keep=1, **how):
                for _ in range(5):
                    for p in model.parameters():
                        p.grad = torch.ones_like(p)
                    model[0].weight.grad *= factor
                    optimizer.step()


@pytest.mark.parametrize("denominator", ["sum", "decayed", "gradient"])
def test_a_nan_in_a_gradient_that_is_not_adapted_is_said(denominator, backend, device):
    """Its ratio is 1 whatever its gradient, but the weights are lost all the same."""
    model = network(device)
    optimizer = optimizer_of(model, backend, denominator=denominator)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].bias.grad[0] = float("nan")
    monitor = Monitor(optimizer, every=1, keep=1)
    with pytest.warns(RuntimeWarning, match=r"layers '1.bias': a norm .* is NaN or infinite"):
        optimizer.step()
    monitor.close()


def test_steps_that_did_nothing_have_no_record(backend, device):
    """Of a step that GradScaler skipped, or without gradients, the last figures would be old."""
    model = network(device)
    optimizer = optimizer_of(model, backend)
    with Monitor(optimizer, every=1, keep=100) as monitor:
        train(model, optimizer, 2)
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
        optimizer.found_inf = torch.zeros((), device=device)
        expected = optimizer.layer_stats()
        train(model, optimizer, 1)
        del optimizer.found_inf
        optimizer.zero_grad()
        optimizer.step()
        train(model, optimizer, 1)
    assert [step for step, _ in monitor.history] == [1, 2, 4, 6]
    assert monitor.history[1] == (2, expected)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_skip_that_the_host_does_not_know_is_dropped_later(
    found_inf, backend, device, monkeypatch
):
    internals.keep_found_inf_from_the_host(monkeypatch)
    model = network(device)
    optimizer = optimizer_of(model, backend)
    with Monitor(optimizer, every=1, keep=100) as monitor:
        optimizer.found_inf = torch.zeros((), device=device)
        train(model, optimizer, 1)
        optimizer.found_inf.fill_(found_inf)
        train(model, optimizer, 1)
    assert [step for step, _ in monitor.history] == ([1] if found_inf else [1, 2])


def test_ordinary_training_is_silent(backend, device):
    """Zero biases are not adapted; a gradient of zero now and then is nothing."""
    model = network(device)
    nn.init.zeros_(model[0].bias)
    optimizer = optimizer_of(model, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(optimizer, every=1, keep=1, patience=2):
            for step in range(6):
                for p in model.parameters():
                    p.grad = torch.full_like(p, float(step % 3 > 0))
                optimizer.step()
