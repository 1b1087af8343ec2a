"""The graph tests of the gpu tier without a GPU: captures record, replays run interpreted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bench import timers
from bench.variants import Variant
from lars_fused import LARS
from tests import internals
from tests.emulated_gpu import OnGpu, emulated_gpu

pytestmark = pytest.mark.interpret


def graph_tests():
    path = Path(__file__).with_name("test_gpu_graphs.py")
    spec = importlib.util.spec_from_file_location("graphs_of_the_gpu_tier", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [test for name, test in vars(module).items() if name.startswith("test_")]


@pytest.fixture
def gpu():
    with emulated_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("test", graph_tests(), ids=lambda test: test.__name__)
def test_graphs(test, gpu):
    test()
    assert "lars_step" in gpu.launches


def stepped(capturable=True):
    p = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = LARS([p], backend="triton", capturable=capturable)
    optimizer.step()
    return p, optimizer


def test_a_capture_does_nothing_and_a_replay_does_it(gpu):
    p, optimizer = stepped()
    assert isinstance(p, OnGpu)
    assert p.is_cuda
    before, graph = p.detach().clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert torch.equal(p, before)
    assert len(graph.recorded) >= 2  # uploads and a launch
    graph.replay()
    assert not torch.equal(p, before)


def test_to_wait_breaks_a_capture_and_leaves_its_stream(gpu):
    p, _ = stepped()
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="capture_end"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        p[0].item()
    assert torch.cuda.current_stream() is not stream


class Timer(timers.CudaTimer):
    def __init__(self):
        self.device = torch.device("cuda")


def test_the_timer_gives_up_a_capture_and_its_stream(gpu):
    """What waits for the GPU is timed without a graph, on the stream that was current before."""
    p, optimizer = stepped()
    stream = torch.cuda.current_stream()
    waits = Variant(lambda: p[0].item(), list, graph=True)
    assert Timer()._captured(waits) is None
    assert torch.cuda.current_stream() is stream
    replay = Timer()._captured(Variant(optimizer.step, list, graph=True))
    before = p.detach().clone()
    replay()
    assert not torch.equal(p, before)
    assert torch.cuda.current_stream() is stream


@pytest.mark.parametrize("launches", [1, 2])
def test_a_captured_step_has_every_table_before_the_capture(gpu, launches):
    """Norms and updates in two launches have tables of their own, which no capture can upload."""
    with internals.forced_launches(launches):
        p, optimizer = stepped()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        twin, plain = stepped(capturable=False)
        for _ in range(2):
            p.grad.mul_(0.5)
            twin.grad.mul_(0.5)
            graph.replay()
            plain.step()
            assert torch.equal(p, twin)


def test_a_failed_launch_in_a_capture_raises_instead_of_falling_back(gpu, monkeypatch):
    """To fall back the host would have to ask the device how many steps were taken."""
    p = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = LARS([p], backend="auto", capturable=True)
    optimizer.step()

    def fail(*_):
        raise OSError("no such device function")

    with monkeypatch.context() as patch:
        internals.replace_launch(patch, fail)
        with pytest.raises(OSError, match="no such"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


def test_a_spare_made_in_inference_mode_serves_a_capture_outside_of_it(gpu):
    p, optimizer = stepped()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()  # takes the spare tables
    with torch.inference_mode():
        optimizer.step()  # makes others
    graph, before = torch.cuda.CUDAGraph(), p.detach().clone()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert not torch.equal(p, before)


def test_a_launch_that_failed_before_a_capture_is_no_part_of_it(gpu, monkeypatch):
    """The spare tables of the step are those of the launches that are left."""
    internals.forget_warnings(monkeypatch)
    params = [torch.nn.Parameter(torch.ones(40, device="cuda")) for _ in range(2)]
    params[1].data = params[1].data.bfloat16()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = LARS(params, backend="auto", capturable=True)
    optimizer.step()
    assert len(internals.spare_launches(optimizer)) == 2

    def fail(name, grid, args, dtypes, row, device):
        if dtypes.w == torch.bfloat16:
            raise OSError("no such device function")
        real(name, grid, args, dtypes, row, device)

    with monkeypatch.context() as patch:
        real = internals.replace_launch(patch, fail)
        with pytest.warns(RuntimeWarning, match="could not be launched"):
            optimizer.step()
    left = [tables.schedule.dtypes for tables in internals.spare_launches(optimizer)]
    assert left == [tables.schedule.dtypes for tables in internals.launches(optimizer)]
    assert [dtypes.w for dtypes in left] == [torch.float32]
