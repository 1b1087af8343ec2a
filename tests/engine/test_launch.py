"""Which backend runs and why, and what a step that fails or is skipped leaves behind."""

import sys
import warnings

import pytest
import torch

from lars_fused import LARS, lars_step
from lars_fused._engine import portable
from lars_fused.reference import Options
from tests import internals, oracle
from tests.cases import TERMS, Spec, bits, marked, small_row, some
from tests.trial import Trial

cpu = pytest.mark.cpu
interpret = pytest.mark.interpret
everywhere = [cpu, interpret, pytest.mark.gpu]


@cpu
def test_without_the_interpreter_cpu_tensors_need_it():
    assert "set TRITON_INTERPRET=1 before Python starts" in internals.launch.why_not(
        torch.device("cpu")
    )


@cpu
def test_the_interpreter_must_be_on_before_the_kernels_are_imported(monkeypatch):
    pytest.importorskip("triton")
    assert not internals.launch.interpreting()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "after the kernels were imported" in internals.launch.why_not(torch.device("cpu"))
    internals.forget_warnings(monkeypatch)
    params = some()
    with pytest.warns(RuntimeWarning, match="after the kernels were imported"):
        LARS(params).step()
    with warnings.catch_warnings():  # once, and not for every optimizer
        warnings.simplefilter("error")
        LARS(params).step()


@cpu
def test_a_broken_triton_is_told_in_its_own_words(monkeypatch):
    def broken():
        raise ImportError("libtriton.so: not found")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(internals.launch, "functions", broken)
    reason = internals.launch.why_not(torch.device("cpu"))
    assert reason == "triton cannot be used (ImportError: libtriton.so: not found)"


@cpu
def test_a_triton_without_gluon_launches_all_that_rows_launch(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "lars_fused.kernels.lars_resident", None)
    monkeypatch.delattr(internals.kernels(), "lars_resident", raising=False)
    internals.launch.functions.cache_clear()
    assert internals.launch.why_not(torch.device("cuda")) is None
    with pytest.raises(ImportError):
        internals.launch.function("lars_resident")


@marked(cpu, interpret)
def test_there_are_no_kernels_for_other_devices():
    assert internals.launch.why_not(torch.device("meta")) == "there are no kernels for meta devices"


@interpret
def test_the_interpreter_excludes_gpus():
    assert "unset it" in internals.launch.why_not(torch.device("cuda"))
    assert internals.launch.why_not(torch.device("cpu")) is None


@marked(*everywhere)
def test_backend_says_what_runs(backend, device):
    params = some(device=device)
    assert LARS(params, backend=backend).backend == backend
    assert LARS(params).backend == backend  # auto: the kernels wherever they can run
    assert LARS(params, backend="torch").backend == "torch"


@cpu
def test_triton_on_cpu_tensors_without_the_interpreter_raises_and_changes_nothing():
    params = some()
    optimizer, before = LARS(params, backend="triton"), bits(params)
    with pytest.raises(
        RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\].*TRITON_INTERPRET=1"
    ):
        optimizer.step()
    assert bits(params) == before
    assert not optimizer.state


@interpret
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: torch.ones(4, dtype=torch.float64), "the kernels support float32, float16"),
        (lambda: torch.ones(8)[::2], "use a contiguous parameter"),
    ],
    ids=["float64", "gaps"],
)
def test_a_forced_backend_never_falls_back(launched, make, remedy):
    params = [*some(), torch.nn.Parameter(make())]
    params[-1].grad = torch.ones_like(params[-1])
    optimizer, before = LARS(params, backend="triton"), bits(params)
    with pytest.raises(RuntimeError, match=f"'params'.*3.*{remedy}.*backend='auto'"):
        optimizer.step()
    assert bits(params) == before
    assert launched == []
    assert not optimizer.state


@interpret
def test_other_gradient_strides_are_named_with_both(launched):
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(3, 2).T
    with pytest.raises(RuntimeError, match=r"has strides \(1, 2\), the tensor \(3, 1\)"):
        LARS([p], backend="triton").step()
    assert launched == []


@interpret
def test_auto_falls_back_once_and_says_so(monkeypatch, row):
    """The launch raises before any work: the step is done all the same, right, with one warning."""
    attempts = []

    def fail(name, *rest):
        attempts.append(name)
        raise OSError("no such device function")

    internals.replace_launch(monkeypatch, fail)
    trial = Trial([Spec("a", (5,)), Spec("b", (200,))], "auto", seeded=True)
    with pytest.warns(RuntimeWarning, match="OSError: no such device function") as caught:
        trial.step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial.step()
    trial.check()
    assert attempts == ["lars_step"] * 2  # a failed launch is tried once more


@interpret
def test_a_forced_backend_raises_when_the_launch_does(monkeypatch, row):
    trial = Trial([Spec("a", (5,))], "triton")
    trial.gradients()
    before = bits([trial.ones[0].p])

    def fail(*_):
        raise OSError("no such device function")

    with monkeypatch.context() as broken:
        internals.replace_launch(broken, fail)
        with pytest.raises(OSError, match="no such device function"):
            trial.optimizer.step()
    assert bits([trial.ones[0].p]) == before
    for _ in range(2):  # and it works as soon as the launch does; the first step is still the first
        trial.step()
        trial.check()


# Atomics of the two paths over four chunks. One launch draws twice, then by turns records a chunk's
# arrival and draws: 4 leaves a tensor half arrived. Two launches record three arrivals first.
@interpret
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(("launches", "at"), [(1, 2), (1, 4), (1, 9), (2, 4), (2, 6)])
def test_a_kernel_that_raises_midway_leaves_the_queue_reset(
    monkeypatch, row, launches, backend, at
):
    """Some work is done, so nothing may be done again in another way: the error is passed on. The
    counters are back at zero, and the next step is right for the state that it finds.
    """
    from triton.runtime import interpreter

    with internals.forced_launches(launches):
        trial = Trial([Spec("a", (3 * row.chunk,)), Spec("b", (9,))], backend)
        trial.step()
        trial.check()
        (work,) = trial.works()
        trial.gradients()
        done, builder = [], interpreter.InterpreterBuilder
        atomic = builder.create_atomic_rmw

        def fail(self, *args):
            done.append(args)
            if len(done) > at:
                raise RuntimeError("interrupted")
            return atomic(self, *args)

        with monkeypatch.context() as broken:
            broken.setattr(builder, "create_atomic_rmw", fail)
            with pytest.raises(Exception, match="interrupted"):
                trial.optimizer.step()
        assert work.memory.counter.item() == 2 << 32
        assert not work.memory.arrivals.any()
        for one in trial.ones:  # whatever has been done to them by now
            one.start = one.p.detach().double()
            one.truth, one.eager = one.start.clone(), one.p.detach().clone()
            one.v_eager = trial.optimizer.state[one.p]["momentum_buffer"].clone()
            one.v_truth = one.v_eager.double()
        trial.step()
        trial.check()


@interpret
def test_norms_alone_that_fail_are_not_work(monkeypatch, row):
    """Before the second launch nothing is written: `auto` may still take the other path."""
    from triton.runtime import interpreter

    def fail(*_):
        raise RuntimeError("interrupted")

    with internals.forced_launches(2):
        trial = Trial([Spec("a", (3 * row.chunk,))], "auto")
        with monkeypatch.context() as broken:
            broken.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", fail)
            with pytest.warns(RuntimeWarning, match="interrupted"):
                trial.step()
        trial.check()


@interpret
def test_recover_says_whether_work_was_done(row):
    trial = Trial([Spec("a", (5,))], "triton")
    trial.step()
    (work,) = trial.works()
    assert work.recover()
    work.memory.counter.add_(3)
    assert not work.recover()
    assert work.memory.counter.item() == 2 << 32


@marked(interpret, pytest.mark.gpu)
@pytest.mark.parametrize("launches", [1, 2])
def test_found_inf_skips_a_step_inside_the_kernel(monkeypatch, device, launches):
    """First: the tensor's next step is still its first, undampened one. Later: as if it had not
    been. No host reads the flag.
    """
    row = small_row(monkeypatch, device)
    w = [torch.randn(n, device=device) for n in (5, 2 * row.chunk + 3)]
    g = [torch.randn_like(x) for x in w]
    v = [torch.zeros_like(x) for x in w]
    options = {**TERMS, "dampening": 0.5}
    truth = oracle.Truth(w, **options)
    inf, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    with internals.forced_launches(launches):
        step, taken = internals.step_of(w, g, v, Options(**options))
    for flag in (inf, inf, zero, inf, zero):
        before = bits([*w, *v])
        step(flag)
        if flag is inf:
            assert bits([*w, *v]) == before
            continue
        truth.step(g)
        for got, want in zip([*w, *v], [*truth.weights, *truth.buffers], strict=True):
            torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-6)
    assert taken() == [2]


@marked(*everywhere)
def test_lars_step_takes_found_inf_and_grad_scale(backend, device):
    w, g = torch.randn(5, device=device), torch.randn(5, device=device)
    scaled, start, v = w.clone(), w.clone(), [None]
    on = {"device": device}
    lars_step([w], [g], [None], backend=backend, **TERMS)
    lars_step(
        [scaled], [g * 8], v, backend=backend, grad_scale=torch.full((1,), 8.0, **on), **TERMS
    )
    torch.testing.assert_close(scaled, w, rtol=1e-6, atol=1e-7)
    before = bits([w, v[0]])
    lars_step([w], [g], v, backend=backend, found_inf=torch.ones(1, **on), **TERMS)
    assert bits([w, v[0]]) == before
    assert not torch.equal(w, start)


@cpu
def test_portable_pieces_are_larger_where_each_costs_a_launch():
    shape = (1 << 21,)
    on_cpu = list(portable.pieces([torch.empty(shape), None], None))
    elsewhere = list(portable.pieces([torch.empty(shape, device="meta"), None], None))
    assert (len(on_cpu), len(elsewhere)) == (256, 2)
    assert sum(piece.numel() for piece, _ in elsewhere) == 1 << 21
