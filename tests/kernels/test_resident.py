"""The kernel that holds w and g in shared memory: its plan, and the same bits as two launches."""

import math

import pytest
import torch

from bench.models import MODELS, adapted
from lars_fused import LARS
from lars_fused._engine.launch import Dtypes, bytes_per_element
from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import BOTH, NORM, UPDATE
from tests import internals
from tests.cases import OPTIONS, TERMS, Spec, bits, regimes
from tests.ptx.machine import Fault
from tests.trial import Trial, assert_skipped_steps_do_not_count

pytestmark = pytest.mark.candidate

ROW = tuning.CANDIDATES["sm_9"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


# ------------------------------------------------------------------------------- the plan


def planned(numels, adapt, programs, held_steps, chunk=2048):
    return make_plan(
        numels, adapt, chunk=chunk, window=0, lag=0, bytes_per_element=8, order="resident",
        span=held_steps * programs,
    )  # fmt: skip


def assert_nobody_waits_for_a_step_to_come(plan, adapt, programs, slots):
    """What the kernel's text promises: a tensor is summed in steps before it is updated in any."""
    kinds, tensors, _ = (x.tolist() for x in unpack_items(plan.items))
    last_norm, first_update = {}, {}
    for place, (kind, tensor) in enumerate(zip(kinds, tensors, strict=True)):
        step = place // programs
        if kind & NORM:
            last_norm[tensor] = step
        if kind & UPDATE:
            first_update.setdefault(tensor, step + slots - 1)
    assert last_norm.keys() == first_update.keys()
    for tensor, step in last_norm.items():
        assert not adapt[tensor] or step < first_update[tensor]


@pytest.mark.cpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("programs", [1, 2, 7, 264])
def test_no_item_waits_for_its_own_step_or_a_later_one(model, programs):
    shapes = MODELS[model]()
    if programs < 100:  # the same sizes, not as many chunks
        shapes = shapes[:20]
    numels = [math.prod(shape) for _, shape in shapes]
    adapt = [adapted(name, shape) for name, shape in shapes]
    for slots in (3, 7):
        plan = planned(numels, adapt, programs, slots - 2)
        assert_nobody_waits_for_a_step_to_come(plan, adapt, programs, slots)


@pytest.mark.cpu
def test_every_chunk_is_summed_once_and_updated_once():
    numels, adapt = [5, 100_000, 3_000, 9_000, 70_000, 0], [True, True, True, False, False, True]
    plan = planned(numels, adapt, programs=3, held_steps=4)
    kinds, tensors, chunks = (x.tolist() for x in unpack_items(plan.items))
    items = list(zip(kinds, tensors, chunks, strict=True))
    for kind in (NORM, UPDATE):
        done = sorted((t, c) for k, t, c in items if k & kind)
        assert done == [(t, c) for t, n in enumerate(numels) for c in range(-(-n // 2048))]
    assert [k for k, t, _ in items if t == 1].count(BOTH) == 12, "what three programs can hold"
    assert [k for k, t, _ in items if t == 2].count(BOTH) == 2
    assert {k for k, t, _ in items if t in (3, 4)} == {BOTH}, "their updates wait for no norm"


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("dtypes", "slots"),
    [(Dtypes(F32, F32, F32), 7), (Dtypes(F32, BF16, F32), 9), (Dtypes(BF16, BF16, F32), 14)],
)
def test_the_ring_holds_what_fits(dtypes, slots):
    width = bytes_per_element(dtypes)
    assert tuning.slots(ROW, width) == slots
    assert tuning.held_steps(ROW, width) == slots - 2
    # 1 KB of a multiprocessor's 228 goes to each program, and a little to reductions.
    assert ROW.programs * (slots * ROW.chunk * width + 1024 + 256) <= 228 * 1024


# ------------------------------------------------------------------------------- the kernel


@pytest.fixture
def row(monkeypatch, device):
    """The candidate with chunks and a ring that small tensors fill; skips where it cannot run."""
    name = internals.launch.architecture(torch.device(device))[0]
    if not name.startswith("sm_9"):  # its ring is as large as sm_90's shared memory
        pytest.skip(f"no row for {name} waits to be measured")
    small = ROW._replace(chunk=1024, block=1024, ring=5 * 1024 * 8, programs=2)
    monkeypatch.setitem(tuning.ROWS, name, small)
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
def test_a_tensor_that_the_rings_cannot_hold_would_never_end(row, machine):
    """What `span` is for: with every chunk of it held, all programs wait for its last norm."""
    params = [torch.nn.Parameter(torch.randn(24 * row.chunk))]
    params[0].grad = torch.randn_like(params[0])
    optimizer = LARS(params, backend="triton", **TERMS)
    optimizer.step()
    (work,) = internals.launches(optimizer)
    held = planned([24 * row.chunk], [True], work.programs, 100, row.chunk)
    assert {*unpack_items(held.items)[0].tolist()} == {BOTH}
    internals.replace_items(work, held.items)
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
