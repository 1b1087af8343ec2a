"""The compiled kernels, executed from their PTX: schedules, launch constants, nothing twice.

The contract tests that carry the marker `ptx` run there too; what is here only this tier can show.
"""

import pytest
import torch

from lars_fused import LARS
from tests import internals
from tests.cases import TERMS, bits, regimes, small_row
from tests.ptx.driver import pretended_gpu
from tests.ptx.machine import Fault
from tests.trial import Trial, assert_skipped_steps_do_not_count

pytestmark = pytest.mark.ptx


def stepped(steps=2, numels=(1, 130, 1024, 2049, 5000), **options):
    """Bits of weights and momentum after some steps; the values depend on the sizes alone."""
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(n)) for n in numels]
    optimizer = LARS(params, backend="triton", **{**TERMS, **options})
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return bits([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])


def test_any_schedule_gives_the_same_bits(machine, monkeypatch):
    """Programs in random turns, few or many resident, warps together or apart."""
    small_row(monkeypatch, "cpu", programs=3)
    expected = stepped()
    for seed, resident in enumerate((1, 2, 3, 6)):
        machine.schedule = {"seed": seed, "resident": resident, "by_warp": seed % 2 == 1}
        assert stepped() == expected, machine.schedule


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launches", [1, 2])
def test_every_regime_with_the_constants_that_are_launched(capability, launches):
    with pretended_gpu(capability):
        row = internals.kernels().tuning.row_for(f"sm_{capability}")
        specs = [s for s in regimes(row) if s.shape != (3 * row.chunk + 1,)]
        with internals.forced_launches(launches):
            trial = Trial(specs, "triton", "cpu")
            trial.step()
            trial.check()


def test_a_step_is_one_launch_and_compiles_nothing_new(monkeypatch):
    with pretended_gpu(fresh=True) as machine:
        small_row(monkeypatch, "cpu")
        stepped(steps=1)
        assert machine.launches == machine.compiled == ["lars_step"]
        for count, options in enumerate(({"lr": 0.1}, {"momentum": 0.5}, {"weight_decay": 0.0}), 1):
            flat = torch.zeros(count * 1000 + 64)
            starts = [1001 * i for i in range(count)]
            params = [torch.nn.Parameter(flat[i : i + 17 + i // 9]) for i in starts]
            optimizer = LARS(params, backend="triton", **{**TERMS, **options})
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert machine.launches == ["lars_step"] * 4
        assert machine.compiled == ["lars_step"]


def test_a_skipped_step_writes_nothing_and_does_not_count(machine, monkeypatch):
    small_row(monkeypatch, "cpu")
    assert_skipped_steps_do_not_count("cpu")
    assert len(machine.launches) == 3


def test_a_wrong_promise_of_alignment_is_a_fault(machine, monkeypatch):
    """What a GPU answers with an illegal address: a 128-bit access to a misaligned tensor."""
    small_row(monkeypatch, "cpu")
    params = [torch.nn.Parameter(torch.randn(3001)[1:])]
    params[0].grad = torch.randn_like(params[0])
    optimizer = LARS(params, backend="triton", **TERMS)
    optimizer.step()
    (work,) = internals.launches(optimizer)
    internals.promise_alignment(work)
    with pytest.raises(Fault, match="misaligned"):
        internals.run(work)


def test_items_in_an_order_that_waits_for_itself_never_end(machine, monkeypatch):
    """The machine would show a deadlock: here updates come before the norms they wait for."""
    small_row(monkeypatch, "cpu", programs=1)
    params = [torch.nn.Parameter(torch.randn(5000))]
    params[0].grad = torch.randn_like(params[0])
    optimizer = LARS(params, backend="triton", **TERMS)
    optimizer.step()
    (work,) = internals.launches(optimizer)
    internals.replace_items(work, work.arguments.items.flip(0).contiguous())
    machine.schedule = {"most_turns": 5_000}
    with pytest.raises(Fault, match="wait for each other"):
        internals.run(work)
