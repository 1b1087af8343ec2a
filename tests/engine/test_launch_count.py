"""How many kernels a step launches, counted where Triton launches them, not by our own counter."""

import pytest
import torch

from bench.models import adapted, resnet50
from lars_fused import LARS, param_groups
from lars_fused._engine.plan import unpack_items
from tests import internals
from tests.cases import OPTIONS, TERMS, Spec, small_row
from tests.trial import Trial

pytestmark = [pytest.mark.interpret, pytest.mark.floor]

SHAPES = resnet50()


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched, as they happen. `launched.execute` False counts only."""
    from triton.runtime import interpreter

    class Launched(list):
        execute = True

    names, call = Launched(), interpreter.GridExecutor.__call__

    def count(executor, *args, **kwargs):
        names.append(executor.fn.__name__)
        if names.execute:
            call(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    return names


class Holder(torch.nn.Module):
    """ResNet-50's parameter tensors under their names; pages that no one touches cost nothing."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES:
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.empty(shape)))


def test_resnet50_is_one_launch_a_step(launched):
    """161 tensors of full size in two groups: launches are counted and their 25.6M elements' worth
    of work is left out; the next test runs a narrow network for real.
    """
    launched.execute = False
    model = Holder()
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    groups = param_groups(model, 5e-4)
    assert [len(g["params"]) for g in groups] == [54, 107]
    optimizer = LARS(groups, lr=1.0, backend="triton")
    optimizer.step()
    assert launched == ["lars_step"]
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1 / (1 + step)
        optimizer.step()
        assert launched == ["lars_step"] * (2 + step)
    for p in model.parameters():  # zero_grad(set_to_none=True) and a backward give new gradients
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert launched == ["lars_step"] * 5

    (work,) = internals.launches(optimizer)
    _, tensors, _ = unpack_items(work.schedule.plan.items)
    assert sorted(set(tensors.tolist())) == list(range(161))
    assert internals.element_counts(work).sum() == 25_557_032


def test_a_narrow_resnet50_is_right_in_one_launch(launched, monkeypatch):
    """All 161 tensors at a sixteenth of their widths, against the float64 reference."""
    small_row(monkeypatch, "cpu", chunk=2048, block=1024, threads=64, window=1 << 16)
    specs = [Spec(name, tuple(n // 16 if n > 15 else n for n in shape)) for name, shape in SHAPES]
    trial = Trial(
        specs, "triton", groups=[{}, OPTIONS["not adapted"] | {"weight_decay": 0.0}],
        group_of=lambda i: int(not adapted(*SHAPES[i])),
    )  # fmt: skip
    assert len(specs) == 161
    trial.step()
    assert launched == ["lars_step"]
    trial.check()


@pytest.fixture
def tensors(launched):
    """Makes optimizers over small tensors of given dtypes, with gradients; nothing is executed."""
    launched.execute = False

    def make(groups, **options):
        rows = []
        for dtype, group in groups:
            p = torch.nn.Parameter(torch.ones(5, dtype=dtype))
            p.grad = torch.ones_like(p)
            rows.append({"params": [p], **group})
        return LARS(rows, backend="triton", **options)

    return make


def test_all_options_share_one_launch(launched, tensors):
    optimizer = tensors([(torch.float32, {**TERMS, **o}) for o in OPTIONS.values()])
    optimizer.step()
    assert launched == ["lars_step"]


def test_a_group_without_momentum_shares_the_launch_of_any_momentum_dtype(launched, tensors):
    groups = [(torch.float32, {"momentum": 0.0}), (torch.float32, {})]
    tensors(groups, momentum_dtype=torch.bfloat16).step()
    assert launched == ["lars_step"]


def test_one_launch_a_dtype_combination(launched, tensors):
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 2
    optimizer = tensors([(dtype, {}) for dtype in dtypes])
    optimizer.step()
    assert launched == ["lars_step"] * 3


def test_nothing_to_do_launches_nothing(launched, tensors):
    optimizer = tensors([(torch.float32, {})])
    optimizer.zero_grad()
    optimizer.step()
    empty = torch.nn.Parameter(torch.ones(0))
    empty.grad = torch.ones(0)
    LARS([empty], backend="triton").step()
    assert launched == []


def test_the_second_path_is_two_launches(launched, tensors):
    with internals.forced_launches(2):
        optimizer = tensors([(torch.float32, {}), (torch.float32, {"adapt": False})])
        optimizer.step()
    assert launched == ["l2norm", "lars_update"]


def test_the_portable_backend_launches_nothing(launched):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = LARS([p], backend="torch")
    optimizer.step()
    assert launched == []
    assert optimizer.backend == "torch"
