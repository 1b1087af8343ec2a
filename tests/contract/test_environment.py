"""What surrounds a step: compilers, threads, a missing Triton, interruptions, global defaults."""

import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch

from lars_fused import LARS, multi_tensor_l2norm
from tests import internals
from tests.oracle import Truth, assert_true
from tests.tools import (
    BOTH,
    STRONG,
    copies,
    make_grads,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = BOTH

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(3, 2), (4,)]
OPTIONS = {**STRONG, "dampening": 0.4}  # shows a first step that is taken for one again


# ------------------------------------------------------------------ row 45: torch.compile


@pytest.mark.row(45)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_opaque_and_compiles_once(compiler, backend, device):
    import torch._dynamo.testing

    if compiler == "inductor" and not can_compile(device):
        pytest.skip("inductor finds no working C++ compiler")
    (compiled, a), (plain, b) = twins(SHAPES, device, backend, **OPTIONS)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    @torch.compile(backend=counter)
    def train(scale):
        loss = sum((p * scale).square().sum() for p in compiled)
        loss.backward()
        a.step()
        a.zero_grad()

    frames = []
    for step in range(4):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.5 / (1 + step)
        train(torch.ones((), device=device))
        sum(p.square().sum() for p in plain).backward()
        b.step()
        b.zero_grad()
        frames.append(counter.frame_count)
    for p, q in zip(compiled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert frames[0] == frames[-1] or frames[1] == frames[-1], f"compiled again: {frames}"


def can_compile(device):
    if device != "cpu":
        return True
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        get_cpp_compiler()
        return bool(pick_vec_isa()) or True
    except Exception:  # inductor raises what its compiler search raises
        return False


@pytest.mark.row(45)
def test_compiling_the_bound_method(backend, device):
    (compiled, a), (plain, b) = twins(SHAPES, device, backend, **OPTIONS)
    step = torch.compile(a.step, backend="eager")
    for i in range(2):
        set_grads(compiled, i)
        set_grads(plain, i)
        step()
        b.step()
    assert same_bits(copies(compiled), copies(plain))


# ------------------------------------------------------------------ row 46: threads


@pytest.mark.row(46)
def test_two_threads_with_an_optimizer_each(backend, device):
    pairs = twins(SHAPES, device, backend, count=3, **OPTIONS)
    failures, start = [], threading.Barrier(2)

    def work(params, optimizer):
        try:
            start.wait()
            run(optimizer, params, 5)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=pair) for pair in pairs[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    run(pairs[2][1], pairs[2][0], 5)
    for params, _ in pairs[:2]:
        assert same_bits(copies(params), copies(pairs[2][0]))


# ------------------------------------------------------------------ rows 54 and 55: Triton

STEP = """
import sys, warnings
import torch
sys.path.insert(0, {root!r})
{before}
from tests.oracle import Truth, assert_true
from tests.tools import STRONG, make_params, run
from lars_fused import LARS
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        params = make_params([(3, 2), (4,)])
        truth = Truth(params, **STRONG)
        optimizer = LARS(params, **STRONG)
        {middle}
        for step in range(3):
            run(optimizer, params, 1, first=step)
            truth.step([p.grad for p in params])
        assert_true(params, truth, steps=3)
assert optimizer.backend == "torch", optimizer.backend
told = [str(w.message) for w in caught if "LARS" in str(w.message)]
print("warned", len(told), *told)
try:
    LARS(params, backend="triton").step()
except RuntimeError as error:
    print("refused", error)
"""
BLOCKER = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocker())
"""


def python(text, **environment):
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(before="", middle="pass"):
    return textwrap.dedent(STEP).format(root=str(ROOT), before=before, middle=middle)


def only_in_the_cpu_tier(tier):
    if tier != "cpu":
        pytest.skip("starts a process with an environment of its own: once is enough")


@pytest.mark.row(54)
def test_without_triton_the_portable_path_runs_with_one_warning(tier):
    only_in_the_cpu_tier(tier)
    out = python(script(before=BLOCKER), TRITON_INTERPRET="1")
    assert "warned 1 LARS: falling back to the portable path: triton cannot be used" in out
    assert "No module named 'triton'" in out
    assert "refused LARS: param_groups[0]['params'][0]" in out


@pytest.mark.row(55)
def test_triton_interpret_set_after_the_import(tier):
    only_in_the_cpu_tier(tier)
    late = "import os; from tests.internals import kernels; kernels(); "
    out = python(script(middle=late + "os.environ['TRITON_INTERPRET'] = '1'"))
    assert "warned 1 LARS" in out
    assert "TRITON_INTERPRET=1 was set after" in out
    assert "refused LARS" in out


@pytest.mark.row(54, 55)
def test_nothing_asked_for_triton_on_a_cpu(tier):
    only_in_the_cpu_tier(tier)
    out = python(script(before=BLOCKER))
    assert "warned 0" in out
    assert "set TRITON_INTERPRET=1 before Python starts" in out


class Broken(Exception):
    """What a failing compiler or driver raises."""


def break_launches(monkeypatch, error, after=0):
    """Every launch but the first `after` raises."""
    launches = []

    def run_or_raise(*args):
        launches.append(1)
        if len(launches) > after:
            raise error
        return real(*args)

    real = internals.replace_launch(monkeypatch, run_or_raise)
    internals.forget_warnings(monkeypatch)


@pytest.mark.row(54)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failing_launch_falls_back_exactly_with_one_warning(after, tier, device, monkeypatch):
    if tier == "cpu":
        pytest.skip("needs launches")
    (hit, a), (clean, _) = twins(SHAPES, device, "auto", **OPTIONS)
    truth = Truth(clean, **OPTIONS)
    break_launches(monkeypatch, Broken("out of resource: shared memory"), after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            set_grads(hit, step)
            if step == 3:
                hit[1].grad = None  # other tables, which would try again
            a.step()
            truth.step([p.grad for p in hit])
    assert_true(hit, truth, steps=4)
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert "out of resource: shared memory" in messages[0]


@pytest.mark.row(54, 59)
@pytest.mark.parametrize("error", [Broken("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_launch_that_raises_leaves_everything_consistent(error, after, tier, device, monkeypatch):
    if tier == "cpu":
        pytest.skip("needs launches")
    (hit, a), (clean, b) = twins(SHAPES, device, "triton", **OPTIONS)
    run(b, clean, 3)
    break_launches(monkeypatch, error, after)
    run(a, hit, after)
    before = copies(hit)
    set_grads(hit, after)
    with pytest.raises(type(error)):
        a.step()
    assert same_bits(copies(hit), before)
    assert set(map(type, momenta(a, hit))) == {torch.Tensor if after else type(None)}
    monkeypatch.undo()
    run(a, hit, 3 - after, first=after)
    assert same_bits(copies(hit), copies(clean))


@pytest.mark.row(59)
def test_interrupted_between_two_tensors(tier, backend, device, monkeypatch):
    """The tensors done are done, the others are not begun; the next step goes on from there."""
    if tier == "gpu":
        pytest.skip("a kernel on a GPU is not interrupted by the host")
    # On a CPU small tensors are one call of torch's kernel: those of different widths are not.
    params = make_params([(3,), (40,), (500,)], device=device)
    optimizer, truth = LARS(params, **STRONG, backend=backend), Truth(params, **STRONG)
    for step in range(4):
        grads = make_grads(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if step != 2:
            optimizer.step()
            truth.step(grads)
            continue
        before = copies(params)
        with monkeypatch.context() as patch:
            interrupt_second_tensor(patch, backend)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        done = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
        assert sum(done) == 1
        truth.step([g if d else None for g, d in zip(grads, done, strict=True)])
    assert_true(params, truth, steps=4)


def interrupt_second_tensor(patch, backend):
    from lars_fused._engine import sgd_kernel

    calls = []

    def second(real):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    if backend == "torch":
        patch.setattr(sgd_kernel, "run", second(sgd_kernel.run))
        return
    from lars_fused.kernels import lars_step

    patch.setattr(lars_step.update_chunk, "fn", lars_step.update_chunk.fn, raising=False)
    patch.setitem(
        lars_step.lars_step.fn.__globals__, "update_chunk", second(lars_step.update_chunk)
    )


# ------------------------------------------------------------------ row 56: global defaults


@pytest.mark.row(56)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_default_dtype_has_no_influence(dtype, backend, device):
    (under, a), (plain, b) = twins(SHAPES, device, backend, **OPTIONS)
    run(b, plain, 2)
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        run(a, under, 2)
        stats = a.layer_stats()
        norms = multi_tensor_l2norm(under, backend=backend)
    finally:
        torch.set_default_dtype(old)
    assert same_bits(copies(under), copies(plain))
    assert stats == b.layer_stats()
    assert torch.equal(norms, multi_tensor_l2norm(plain, backend=backend))


@pytest.mark.row(56)
def test_default_device_has_no_influence(backend, device):
    (under, a), (plain, b) = twins(SHAPES, device, backend, **OPTIONS)
    rate = torch.tensor(0.5, dtype=torch.float64)
    for optimizer in (a, b):
        optimizer.param_groups[0]["lr"] = rate
    gradients = [make_grads(under, step) for step in range(2)]
    run(b, plain, 2)
    internals.forget_plans()
    torch.set_default_device("meta")
    try:
        for grads in gradients:
            for p, g in zip(under, grads, strict=True):
                p.grad = g
            a.step()
        a.load_state_dict(a.state_dict())
        stats, norms = b.layer_stats(), multi_tensor_l2norm(under, backend=backend)
        empty = multi_tensor_l2norm([], backend=backend)
    finally:
        torch.set_default_device(None)
    assert same_bits(copies(under), copies(plain))
    assert len(stats) == 2
    assert torch.equal(norms, multi_tensor_l2norm(plain, backend=backend))
    assert empty.device.type == "cpu"
