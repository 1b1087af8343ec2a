"""Which backend takes which tensor, and why: pure data in, pure data out."""

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine import partition
from lars_fused._engine.tensors import StepTensors

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


def tensors(*dtypes, momentum=True, master=()):
    weights = [torch.ones(3, dtype=d) for d in dtypes]
    buffers = [torch.zeros(3) if momentum else None for _ in dtypes]
    copies = [torch.ones(3, dtype=BF16) if i in master else None for i in range(len(dtypes))]
    return StepTensors(weights, [torch.ones_like(w) for w in weights], buffers, copies, True)


def everywhere(device):
    return None


def divide(ts, backend="auto", unavailable=everywhere):
    return partition.divide(ts, backend, unavailable)


def test_one_launch_for_each_dtype_combination():
    found = divide(tensors(FP32, BF16, FP32, FP32, master={3}))
    assert {tuple(key[1]): index for key, index in found.launches.items()} == {
        (FP32, FP32, FP32, None): [0, 2],
        (BF16, BF16, FP32, None): [1],
        (FP32, FP32, FP32, BF16): [3],
    }
    assert found.rest == {}
    assert found.reasons == {}


def test_what_the_kernels_do_not_take_says_why():
    ts = tensors(torch.float64, FP32, FP32, FP32)
    ts.weights[1] = torch.ones(6)[::2]
    ts.weights[2] = torch.ones(2, 3)
    ts.grads[2] = torch.ones(3, 2).T
    ts.buffers[2] = torch.zeros(2, 3)
    found = divide(ts)
    assert found.rest == {CPU: [0, 1, 2]}
    assert [sorted(index) for index in found.launches.values()] == [[3]]
    for i, words in enumerate(("float64", "not adjacent", "strides (1, 2)")):
        assert words in found.reasons[i]


def test_a_device_without_kernels_is_named_for_every_tensor():
    found = divide(tensors(FP32, BF16), unavailable=lambda device: f"nothing on {device}")
    assert found.launches == {}
    assert found.reasons == {0: "nothing on cpu", 1: "nothing on cpu"}


def test_the_torch_backend_asks_no_device():
    def never(device):
        raise AssertionError("asked")

    assert divide(tensors(FP32), "torch", never).rest == {CPU: [0]}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tensors_without_momentum_join_a_launch_that_exists(order):
    ts = tensors(FP32, FP32)
    ts.buffers[0] = ts.buffers[0].bfloat16()
    ts.buffers[1] = None
    ts = ts.select(order)
    (index,) = divide(ts).launches.values()
    assert index == [0, 1]


def test_tensors_without_momentum_join_no_launch_of_other_dtypes():
    ts = tensors(FP32, BF16)
    ts.buffers[1] = None
    assert sorted(divide(ts).launches.values()) == [[0], [1]]


def test_dividing_changes_nothing():
    ts = tensors(FP32, BF16, torch.float64)
    before = [t.clone() for t in (*ts.weights, *ts.grads, *ts.buffers)]
    versions = [t._version for t in (*ts.weights, *ts.grads, *ts.buffers)]
    divide(ts)
    after = [*ts.weights, *ts.grads, *ts.buffers]
    assert all(map(torch.equal, before, after))
    assert [t._version for t in after] == versions


def mixed(backend="auto"):
    """An optimizer of three ordinary tensors, one whose gradient is turned, and a float64 one."""
    params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(4)]
    params.append(torch.nn.Parameter(torch.ones(5, dtype=torch.float64)))
    for p in params:
        p.grad = torch.ones_like(p)
    params[3].grad = torch.ones(4, 3).T
    return LARS([(f"layer{i}", p) for i, p in enumerate(params)], backend=backend)


def report_of(optimizer):
    return optimizer.backend_report().splitlines()


def test_before_a_step_nothing_is_said_of_tensors():
    assert report_of(mixed()) == []


def test_it_says_which_backend_of_torch_took_what_and_why():
    optimizer = mixed("torch")
    optimizer.step()
    asked = "not triton, since backend='torch' was requested"
    assert report_of(optimizer) == [
        f"fused: 4 tensors (layer0, layer1, layer2, ...); {asked}",
        f"reference: 1 tensor (layer3); {asked}; not fused, since its gradient has strides (1, 3), "
        "the tensor (4, 1)",
    ]


def test_a_report_of_very_many_reasons_ends():
    choices = {i: partition.Choice("reference", (("triton", f"reason {i}"),)) for i in range(100)}
    lines = partition.report(choices, str)
    assert len(lines) == 9
    assert lines[-1] == "and 92 more such lines"
