"""What a GPU run begins with sees a wrong step."""

from __future__ import annotations

import pytest
import torch

from bench import small_step
from bench.test_step_host import stubbed_launches
from lars_fused import LARS
from lars_fused._engine import launch
from lars_fused._engine.plan import unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import BOTH, NORM, UPDATE
from tests import internals


@pytest.fixture
def resident(monkeypatch, machine):
    """The row of `lars_resident` with chunks that suit the machine."""
    row = tuning.RESIDENT_ROWS["sm_9"]
    small = row._replace(chunk=1024, block=1024, ring=3 * 1024 * 8, finishers=1)
    monkeypatch.setitem(tuning.RESIDENT_ROWS, "sm_90", small)
    return small


@pytest.mark.interpret
def test_it_agrees_with_the_portable_path(row, capsys):
    small_step.main("cpu")
    assert capsys.readouterr().out.count("agree") == 1


@pytest.mark.ptx
def test_where_there_are_two_kernels_both_are_run(resident, machine, capsys):
    small_step.main("cpu")
    assert capsys.readouterr().out.count("agree") == 2
    n = small_step.STEPS
    for i, kernel in enumerate(("lars_step", "lars_resident")):
        launched = machine.launches[3 * n * i : 3 * n * (i + 1)]
        assert launched == [kernel] * n + ["l2norm", "lars_update"] * n
    assert len(machine.launches) == 6 * n


@pytest.mark.cpu
def test_every_ring_of_an_h200_comes_round_and_one_tensor_is_more_than_all_hold(monkeypatch):
    pytest.importorskip("triton")
    made = []

    def kept(groups, **options):
        made.append(LARS(groups, **options))
        return made[-1]

    monkeypatch.setattr(launch, "architecture", lambda device: ("sm_90", 132, 0))
    monkeypatch.setattr(small_step, "LARS", kept)
    target = launch.resident_target(torch.device("cpu"))
    with stubbed_launches():
        small_step.after_steps("cpu", "triton", 1, target)
    (work,) = internals.launches(made[0])
    assert work.schedule.target == target
    kinds, tensors, _ = unpack_items(work.schedule.plan.items)
    assert len(kinds) > target.workers * (tuning.slots(target.row, 8) + 1)
    numels = internals.element_counts(work)
    assert {*kinds[tensors == numels.argmax()].tolist()} == {NORM, BOTH, UPDATE}


@pytest.mark.cpu
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("kernel", ["lars_step", "lars_resident"])
def test_a_wrong_step_of_either_kernel_is_seen(monkeypatch, kernel, launches):
    wrong = "triton", launches, kernel

    def after_steps(device, backend, launches, target):
        return torch.full((3,), 1e-5 * ((backend, launches, target.kernel) == wrong))

    monkeypatch.setattr(launch, "architecture", lambda device: ("sm_90", 132, 0))
    monkeypatch.setattr(small_step, "after_steps", after_steps)
    with pytest.raises(AssertionError, match=r"not (close|equal)"):
        small_step.main("cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("wrong", [{"weight_decay": 0.1001}, {"trust_coefficient": 0.1001}])
def test_a_step_that_is_a_thousandth_off_is_seen(row, monkeypatch, wrong):
    def made(groups, *, backend, **options):
        return LARS(groups, backend=backend, **options | (wrong if backend == "triton" else {}))

    monkeypatch.setattr(small_step, "LARS", made)
    monkeypatch.setattr(small_step, "sizes", lambda target: [target.row.chunk + 1])
    with pytest.raises(AssertionError, match="not close"):
        small_step.main("cpu")


@pytest.mark.interpret
def test_it_has_tensors_of_one_chunk_of_several_and_off_a_boundary(row):
    sizes = small_step.sizes(launch.target(torch.device("cpu")))
    assert min(sizes) == 1
    assert max(sizes) >= 4 * row.chunk
    assert {row.chunk - 1, row.chunk, row.chunk + 1} <= set(sizes)
    assert any(n % 2 == 0 and n % row.chunk for n in sizes)  # aligned, with a tail
    assert any(n % 2 == 1 and n > 2 * row.chunk for n in sizes)  # misaligned, several chunks
