"""The kernel that holds w and g in shared memory: the same bits as two launches."""

import contextlib
import math

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine import launch_schedule
from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import BOTH
from tests import internals
from tests.cases import OPTIONS, TERMS, Spec, bits, regimes
from tests.gpu.test_gpu_graphs import CAPTURABLE, captured, fill
from tests.ptx.machine import Fault
from tests.tools import copies, same_bits, twins
from tests.trial import Trial, assert_skipped_steps_do_not_count

ROW = tuning.RESIDENT_ROWS["sm_9"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def row(monkeypatch, device):
    """Its row with chunks and a ring that small tensors fill; skips where it cannot run."""
    name = internals.launch.architecture(torch.device(device))[0]
    if tuning.resident_row_for(name) is None:
        pytest.skip(f"lars_resident has no row for {name}")
    small = ROW._replace(chunk=1024, block=1024, ring=5 * 1024 * 8, finishers=2)
    monkeypatch.setitem(tuning.RESIDENT_ROWS, name, small)
    monkeypatch.setenv("LARS_FUSED_KERNEL", "lars_resident")
    return small


def stepped(device, launches, specs, steps=2, **more):
    """Bits of weights and momentum after some steps of one launch each, or two."""
    with internals.forced_launches(launches):
        trial = Trial(specs, "triton", device, seeded=True, **more)
        for _ in range(steps):
            trial.step()
        if "magnitudes" not in more:
            trial.check()
    state = trial.optimizer.state
    momenta = [state[one.p].get("momentum_buffer") for one in trial.ones]
    return bits([one.p for one in trial.ones] + [v for v in momenta if v is not None])


def sizes(row):
    """Of no whole chunk, of some, and of more than all programs hold."""
    numels = (1, 130, row.chunk, row.chunk + 1, 5 * row.chunk, 24 * row.chunk + 77)
    return [Spec(f"{n} elements", (n,)) for n in numels]


@pytest.mark.ptx
@pytest.mark.gpu
def test_the_same_bits_as_two_launches(row, device):
    assert stepped(device, 1, sizes(row)) == stepped(device, 2, sizes(row))


@pytest.mark.ptx
def test_any_schedule_gives_the_same_bits(row, machine):
    """Programs in random turns, warps apart, copies that arrive at once or when waited for."""
    expected = stepped("cpu", 2, sizes(row), steps=1)
    for seed in range(3):
        machine.schedule = {"seed": seed, "by_warp": seed > 0, "early_copies": seed == 2}
        assert stepped("cpu", 1, sizes(row), steps=1) == expected, machine.schedule
    assert machine.launches[-1] == "lars_resident"


@pytest.mark.ptx
@pytest.mark.gpu
def test_every_option(row, device):
    """Numbers whose squares leave the range of fp32 too: such chunks are summed twice."""
    names = list(OPTIONS)
    specs = [Spec(f"{name}, {n}", (n,)) for n in (9, 2 * row.chunk + 5) for name in names]
    magnitudes = [((1.0, 1.0), (1e-40, 1e-30), (1e15, 3e19))[i % 3] for i in range(len(specs))]
    more = {
        "groups": list(OPTIONS.values()), "group_of": lambda i: i % len(names),
        "magnitudes": magnitudes,
    }  # fmt: skip
    assert stepped(device, 1, specs, **more) == stepped(device, 2, specs, **more)


@pytest.mark.ptx
@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])  # of either tag
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_tensor_with_nan_is_finished(row, device, bad, steps):
    """Its sums may be NaN of either sign, and a sign is what a finisher waits for."""
    found = []
    for launches in (1, 2):
        torch.manual_seed(5)
        params = [torch.nn.Parameter(torch.randn(n).to(device)) for n in (5 * row.chunk, 3000, 7)]
        with internals.forced_launches(launches):
            optimizer = LARS(params, backend="triton", **TERMS)
            for step in range(steps):
                for p in params:
                    p.grad = torch.randn(p.shape).to(device)
                if step == steps - 1:
                    for p in params[::2]:
                        p.grad[3] = bad
                optimizer.step()
        found.append([p.detach().cpu() for p in params])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.isnan(), two.isnan())
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
    assert not found[0][1].isnan().any(), "no other tensor is poisoned"


@pytest.mark.ptx
@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param({"g_dtype": BF16}, id="bf16 gradients", marks=pytest.mark.slow),
        pytest.param({"w_dtype": BF16, "g_dtype": BF16, "v_dtype": BF16}, id="bf16"),
        pytest.param(
            {"w_dtype": F16, "g_dtype": F16, "v_dtype": F32},
            id="fp16 beside fp32 momentum",
            marks=pytest.mark.slow,
        ),
        pytest.param({"w_dtype": BF16, "g_dtype": BF16, "master": True}, id="master weights"),
    ],
)
def test_every_dtype(row, device, dtypes):
    specs = [Spec(f"{n} elements", (n,)) for n in (130, 3 * row.chunk + 7)]
    assert stepped(device, 1, specs, **dtypes) == stepped(device, 2, specs, **dtypes)


@pytest.mark.ptx
@pytest.mark.gpu
def test_a_skipped_step_writes_nothing_and_does_not_count(row, device):
    assert_skipped_steps_do_not_count(device)


@pytest.mark.ptx
@pytest.mark.gpu
def test_its_statistics_are_those_of_two_launches(row, device):
    found = []
    for launches in (1, 2):
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(n).to(device)) for n in (9, 3000, 30_000)]
        with internals.forced_launches(launches):
            optimizer = LARS(params, backend="triton", **TERMS)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape).to(device)
                optimizer.step()
        found.append([repr(stats) for stats in optimizer.layer_stats()])
    assert found[0] == found[1]


@pytest.mark.ptx
def test_a_slot_of_the_step_before_is_waited_for(row, machine):
    """Every sum changes from step to step, and readers come early: the tag alone tells them so."""
    specs = [Spec("of several chunks", (7 * row.chunk,))]
    expected = stepped("cpu", 2, specs, steps=4)
    machine.schedule = {"seed": 1, "by_warp": True}
    assert stepped("cpu", 1, specs, steps=4) == expected


@pytest.mark.ptx
@pytest.mark.gpu
def test_a_step_beside_other_kernels_does_not_ask_for_the_whole_device(row, device):
    """As within a backward pass (`overlap_with_backward`)."""
    params = [torch.nn.Parameter(torch.randn(5 * row.chunk).to(device))]
    params[0].grad = torch.randn_like(params[0])
    optimizer = LARS(params, backend="triton", **TERMS)
    for alone, kernel in ((True, "lars_resident"), (False, "lars_step")):
        optimizer._engine.prepared.alone = alone
        optimizer._engine.prepared.clear()
        optimizer.step()
        (work,) = internals.launches(optimizer)
        assert work.schedule.target.kernel == kernel


@pytest.mark.gpu
def test_replays_of_a_captured_step_are_steps(row, device):
    """A cooperative launch in a graph, with steps between replays: the epoch goes on."""
    (a, graphed), (b, plain) = twins([(24 * row.chunk,), (300,)], device, "triton", **CAPTURABLE)
    for params in (a, b):
        for p in params:
            p.grad = torch.zeros_like(p)
        fill(params, 0)
    graph = captured(graphed, a)
    plain.step()
    for step in range(1, 7):
        fill(a, step)
        fill(b, step)
        if step % 3:
            graph.replay()
        else:
            graphed.step()
        plain.step()
        assert same_bits(copies(a), copies(b)), f"after step {step}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [{}, {"w_dtype": BF16, "g_dtype": BF16, "v_dtype": F32}])
def test_long_lists_take_it_and_agree_with_lars_step(device, dtypes, monkeypatch):
    """With the row that is launched, on a list that fills all rings: to rounding, chunks differ."""
    name = internals.launch.architecture(torch.device(device))[0]
    if tuning.resident_row_for(name) is None:
        pytest.skip(f"lars_resident has no row for {name}")
    monkeypatch.delenv("LARS_FUSED_KERNEL", raising=False)
    numels = [3 * 512 * 512, 4_000_000, 2048, 130, 2_000_001] * 2 + [2_000_000]
    specs = [Spec(f"{n} elements", (n,)) for n in numels]
    trials = []
    for kernel in (None, "lars_step"):
        with launch_schedule.forced_kernel(kernel) if kernel else contextlib.nullcontext():
            trial = Trial(specs, "triton", device, seeded=True, **dtypes)
            for _ in range(2):
                trial.step()
            trial.check()
        (work,) = internals.launches(trial.optimizer)
        assert work.schedule.target.kernel == (kernel or "lars_resident")
        trials.append(trial)
    for one, other in zip(trials[0].ones, trials[1].ones, strict=True):
        torch.testing.assert_close(one.p, other.p)


@pytest.mark.ptx
def test_a_tensor_that_the_rings_cannot_hold_would_never_end(row, machine):
    """What `span` is for: with every chunk of it held, all programs wait for its last norm."""
    params = [torch.nn.Parameter(torch.randn(24 * row.chunk))]
    params[0].grad = torch.randn_like(params[0])
    optimizer = LARS(params, backend="triton", **TERMS)
    optimizer.step()
    (work,) = internals.launches(optimizer)
    held = make_plan(
        [24 * row.chunk], [True], chunk=row.chunk, window=0, lag=0, bytes_per_element=8,
        order="resident", span=100 * work.programs,
    )  # fmt: skip
    assert {*unpack_items(held.items)[0].tolist()} == {BOTH}
    items = torch.cat([held.items, held.finishes, torch.zeros(row.finishers, dtype=torch.int64)])
    internals.replace_items(work, items, n_items=held.items.numel(), programs=work.programs)
    machine.schedule = {"most_turns": 20_000}
    with pytest.raises(Fault, match="wait for each other"):
        internals.run(work)


@pytest.mark.ptx
@pytest.mark.gpu
def test_every_regime(row, device):
    """Misaligned, strided, empty, of one element, around every size where a loop changes."""
    with internals.forced_launches(1):
        trial = Trial(regimes(row), "triton", device)
        for _ in range(2):
            trial.step()
            trial.check()
