"""The kernel that holds w and g in shared memory: its lists, and the same bits as two launches."""

import contextlib
import math
import os

import pytest
import torch

from bench.models import MODELS, adapted
from lars_fused import LARS
from lars_fused._engine import launch_schedule
from lars_fused._engine.launch import Dtypes, bytes_per_element
from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import BOTH, NORM, UPDATE, item_word
from tests import internals
from tests.cases import OPTIONS, TERMS, Spec, bits, regimes
from tests.gpu.test_gpu_graphs import CAPTURABLE, captured, fill
from tests.ptx.machine import Fault
from tests.tools import copies, same_bits, twins
from tests.trial import Trial, assert_skipped_steps_do_not_count

ROW = tuning.RESIDENT_ROWS["sm_9"]
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
def test_finishers_take_tensors_in_the_order_of_their_last_sums():
    """Of several chunks: one that is adapted and two that are not, between tensors of one chunk."""
    numels, adapt = [5, 100_000, 3_000, 9_000, 70_000, 0], [True, True, False, True, False, True]
    plan = planned(numels, adapt, programs=3, held_steps=4)
    kinds, tensors, _ = (x.tolist() for x in unpack_items(plan.items))
    last = {t: at for at, (k, t) in enumerate(zip(kinds, tensors, strict=True)) if k & NORM}
    assert unpack_items(plan.finishes)[1].tolist() == sorted({1, 2, 3, 4}, key=last.get)
    assert unpack_items(plan.finishes)[0].all(), "no item of the list is its end"


@pytest.mark.cpu
def test_finishers_know_the_group_of_each_tensor():
    plan = make_plan(
        [5000, 7, 9000], [True] * 3, [2, 0, 1], chunk=2048, window=0, lag=0, bytes_per_element=8,
        order="resident", span=100,
    )  # fmt: skip
    assert plan.finishes.tolist() == [item_word(BOTH, 0, 2), item_word(BOTH, 2, 1)]


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


# ------------------------------------------------------------------------------- the choice

FP32, MIXED = Dtypes(F32, F32, F32), Dtypes(F32, BF16, F32)
LOW = Dtypes(BF16, BF16, F32)
# One H200, of 264 programs: bench/results/tuning/lists.csv.
FASTER = [
    (FP32, "ResNet-50"), (FP32, "ViT-B/16"), (FP32, "GoogLeNet"), (FP32, "BERT-large"),
    (MIXED, "ResNet-50"), (MIXED, "ViT-B/16"), (MIXED, "BERT-large"),
    (LOW, "ResNet-50"), (LOW, "ViT-B/16"), (LOW, "BERT-large"),
]  # fmt: skip
SLOWER = [
    (FP32, "AlexNet"), (FP32, "AlexNet-BN"), (FP32, "10,000 tiny tensors"),
    (FP32, "one 100M tensor"), (MIXED, "AlexNet"), (MIXED, "GoogLeNet"),
    (LOW, "AlexNet"), (LOW, "GoogLeNet"),
]  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("dtypes", "model", "faster"),
    [(*case, True) for case in FASTER] + [(*case, False) for case in SLOWER],
)
def test_lists_that_were_faster_are_chosen(dtypes, model, faster):
    numels = [math.prod(shape) for _, shape in MODELS[model]()]
    assert tuning.suits_rings(numels, ROW, 264 - ROW.finishers, bytes_per_element(dtypes)) == faster


@pytest.mark.cpu
def test_an_empty_list_suits_no_ring():
    assert not tuning.suits_rings([], ROW, 260, 8)
    assert not tuning.suits_rings([0, 0], ROW, 260, 8)


@pytest.mark.cpu
class TestTheKernelOfAStep:
    """By the device's architecture, the list and LARS_FUSED_KERNEL."""

    LONG, SHORT = (1_000_000,) * 20, (1000,) * 20

    @pytest.fixture(autouse=True)
    def _no_choice(self, monkeypatch):
        monkeypatch.delenv("LARS_FUSED_KERNEL", raising=False)

    @pytest.fixture
    def of(self, monkeypatch):
        def of(name, numels, alone=True):
            monkeypatch.setattr(
                internals.launch, "architecture", lambda device: (name, 132, 60 << 20)
            )
            n = len(numels)
            never = (False,) * n
            contents = launch_schedule.Contents(numels, (True,) * n, (0,) * n, never, 1)
            return launch_schedule.schedule(torch.device("cpu"), FP32, contents, alone)

        return of

    @pytest.mark.parametrize(
        ("name", "numels", "kernel"),
        [
            ("sm_90", LONG, "lars_resident"), ("sm_90", SHORT, "lars_step"),
            ("sm_100", LONG, "lars_step"), ("sm_80", LONG, "lars_step"),
            ("gfx942", LONG, "lars_step"),
        ],
    )  # fmt: skip
    def test_by_itself(self, of, name, numels, kernel):
        made = of(name, numels)
        assert made.target.kernel == kernel
        assert (made.items().numel() > made.plan.items.numel()) == (kernel == "lars_resident")

    @pytest.mark.parametrize("kernel", ["lars_step", "lars_resident"])
    @pytest.mark.parametrize("numels", [LONG, SHORT])
    def test_as_it_was_asked_for(self, of, numels, kernel):
        with launch_schedule.forced_kernel(kernel):
            assert of("sm_90", numels).target.kernel == kernel
        assert "LARS_FUSED_KERNEL" not in os.environ

    def test_not_beside_other_kernels(self, of):
        assert of("sm_90", self.LONG, alone=False).target.row == tuning.row_for("sm_90")
        with launch_schedule.forced_kernel("lars_resident"):
            assert of("sm_90", self.LONG, alone=False).target.kernel == "lars_step"

    def test_what_is_not_there_is_refused(self, of, monkeypatch):
        monkeypatch.setenv("LARS_FUSED_KERNEL", "lars_resident")
        with pytest.raises(ValueError, match=r"LARS_FUSED_KERNEL=lars_resident.*sm_100"):
            of("sm_100", self.LONG)
        monkeypatch.setenv("LARS_FUSED_KERNEL", "resident")
        with pytest.raises(ValueError, match=r"LARS_FUSED_KERNEL=resident.*lars_step or"):
            of("sm_90", self.LONG)

    def test_without_gluon_it_is_lars_step(self, of, monkeypatch):
        monkeypatch.setattr(internals.launch, "function", {}.__getitem__)
        internals.launch._has_resident.cache_clear()
        with pytest.warns(RuntimeWarning, match="KeyError: 'lars_resident'"):
            assert of("sm_90", self.LONG).target.kernel == "lars_step"
        internals.launch._has_resident.cache_clear()

    def test_programs_without_an_item_are_not_started(self, of):
        with launch_schedule.forced_kernel("lars_resident"):
            assert of("sm_90", (5000,)).programs == 3 + ROW.finishers
            assert of("sm_90", self.LONG).programs == 264


# ------------------------------------------------------------------------------- the kernel


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
    held = planned([24 * row.chunk], [True], work.programs, 100, row.chunk)
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
