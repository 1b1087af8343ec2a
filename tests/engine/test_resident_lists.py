"""The lists of `lars_resident`: what its workers and finishers do, and when it is chosen."""

import csv
import math
import os

import pytest
import torch

from bench.cases import DTYPES, model_case, sweep_case
from bench.environment import RESULTS
from bench.models import MODELS, adapted
from lars_fused._engine import launch_schedule
from lars_fused._engine.launch import Dtypes, bytes_per_element
from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels import tuning
from lars_fused.kernels.layout import BOTH, NORM, UPDATE, item_word
from tests import internals

pytestmark = pytest.mark.cpu

ROW = tuning.RESIDENT_ROWS["sm_9"]
BF16, F32 = torch.bfloat16, torch.float32


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


def test_finishers_take_tensors_in_the_order_of_their_last_sums():
    """Of several chunks: one that is adapted and two that are not, between tensors of one chunk."""
    numels, adapt = [5, 100_000, 3_000, 9_000, 70_000, 0], [True, True, False, True, False, True]
    plan = planned(numels, adapt, programs=3, held_steps=4)
    kinds, tensors, _ = (x.tolist() for x in unpack_items(plan.items))
    last = {t: at for at, (k, t) in enumerate(zip(kinds, tensors, strict=True)) if k & NORM}
    assert unpack_items(plan.finishes)[1].tolist() == sorted({1, 2, 3, 4}, key=last.get)
    assert unpack_items(plan.finishes)[0].all(), "no item of the list is its end"


def test_finishers_know_the_group_of_each_tensor():
    plan = make_plan(
        [5000, 7, 9000], [True] * 3, [2, 0, 1], chunk=2048, window=0, lag=0, bytes_per_element=8,
        order="resident", span=100,
    )  # fmt: skip
    assert plan.finishes.tolist() == [item_word(BOTH, 0, 2), item_word(BOTH, 2, 1)]


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

FP32 = Dtypes(F32, F32, F32)


def measured():
    """Of each list that an H200 ran with both kernels: name, dtypes, whether rings were faster."""
    with (RESULTS / "tuning" / "lists.csv").open(newline="") as file:
        for line in csv.DictReader(x for x in file if not x.startswith("#")):
            yield line["list"], line["dtypes"], float(line["lars_resident / lars_step"]) < 1
    yield "ViT-B/16", "fp32", True  # resident.csv


@pytest.mark.parametrize(("name", "dtypes", "faster"), [*measured()])
def test_lists_that_were_faster_are_chosen(name, dtypes, faster):
    if name in MODELS:
        case = model_case(name, dtypes)
    else:
        case = sweep_case(int(name.removesuffix(" parameters").replace(",", "")), dtypes)
    numels = [math.prod(shape) for _, shape in case.shapes]
    width = bytes_per_element(Dtypes(*DTYPES[dtypes]))
    assert tuning.suits_rings(numels, ROW, 264 - ROW.finishers, width) == faster


def test_an_empty_list_suits_no_ring():
    assert not tuning.suits_rings([], ROW, 260, 8)
    assert not tuning.suits_rings([0, 0], ROW, 260, 8)


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
