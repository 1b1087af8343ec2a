"""The CPU backend: what torch's fused kernel gets wrong never reaches it; its price."""

import pytest
import torch

from lars_fused._engine import (
    fused,
    portable,
    sgd_kernel,
    torch_step,
)
from lars_fused.reference import Options
from tests.cases import TERMS, bits
from tests.engine.test_torch_step import BF16, F16, F32, F64, SHAPES, check, clones, lists, truth_of

pytestmark = pytest.mark.cpu


def prepare(w, g, v, o):
    n = len(w)
    return torch_step.prepare(w, g, v, [None] * n, [o] * n)


def step(w, g, v, o, first=None, **more):
    n = len(w)
    return torch_step.step_(w, g, v, [None] * n, [o] * n, first or [False] * n, **more)


def test_by_the_public_function_too(monkeypatch):
    """The private operator may go; the public function beside it then does the same."""
    found = []
    for private in (sgd_kernel._private, None):
        monkeypatch.setattr(sgd_kernel, "_private", private)
        w, g, v = lists(SHAPES)
        for o in (Options(**TERMS), Options(**TERMS | {"nesterov": True, "maximize": True})):
            step(w, g, v, o)
        step(w, g, [None] * len(w), Options(**TERMS | {"momentum": 0.0}))
        found.append((bits(w), bits(v)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sixteen_bits_never_reach_the_kernel(calls, dtype):
    """pytorch/pytorch#191763: whole vectors of them would not be updated."""
    w, g, v = lists(SHAPES, dtype, dtype, dtype)
    step(w, g, v, Options(**TERMS))
    assert calls
    assert {t.dtype for call in calls for tensors in call[:3] for t in tensors} == {F32}


def test_the_kernel_is_tried_before_it_is_trusted(monkeypatch):
    assert sgd_kernel.trusted(F32)
    assert sgd_kernel.trusted(F64)
    w, g, v = lists([(4, 3)])
    assert fused.objection(w[0], g[0], v[0], None) is None
    monkeypatch.setattr(sgd_kernel, "_private", lambda *_, **__: None)  # changes nothing
    sgd_kernel.trusted.cache_clear()
    try:
        assert not sgd_kernel.trusted(F32)
        assert "fused SGD kernel is wrong" in fused.objection(w[0], g[0], v[0], None)
        before = bits(w)
        step(w, g, v, Options(**TERMS))
        assert bits(w) != before
    finally:
        sgd_kernel.trusted.cache_clear()


def test_layouts_that_the_kernel_would_walk_wrongly_do_not_reach_it(calls):
    column, wide = torch.randn(3, 40, 2)[..., 0], torch.randn(8, 10)
    for w, g, v in (
        column.unbind(),  # strided alike: the sibling column would be written
        (wide, torch.randn(10, 8).t(), torch.zeros(8, 10)),  # other strides: wrong numbers
        (wide, torch.randn(8, 10), torch.zeros(10, 8).t()),
        (wide.view(4, 2, 5, 2), torch.randn(4, 2, 5, 2).to(memory_format=torch.channels_last),
         torch.zeros(4, 2, 5, 2)),
    ):  # fmt: skip
        step([w], [g], [v], Options(**TERMS))
    assert calls == []
    w, g = (torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last) for _ in range(2))
    v = torch.zeros_like(w)
    true, _, _ = truth_of([w], [g], [v], [None], [Options(**TERMS)], [False])
    old = w.clone()
    step([w], [g], [v], Options(**TERMS))
    check([w], true, [old])
    assert len(calls) == 1


@pytest.mark.parametrize("shapes", [SHAPES[:5], SHAPES[5:]], ids=["small", "large"])
def test_a_first_step_reads_nothing_of_its_buffer(calls, shapes):
    """A skipped first step leaves torch's buffer unwritten, and NaN from then on."""
    w, g, v = lists(shapes)
    for t in v:
        t.fill_(torch.nan)
    n = len(w)
    o, first, zeros = Options(**TERMS), [True] * n, [torch.zeros_like(t) for t in v]
    true_w, true_v, _ = truth_of(w, g, zeros, [None] * n, [o] * n, first)
    old = clones(w)
    step(w, g, v, o, first)
    check(w, true_w, old)
    check(v, true_v, old)
    assert all("is_first_step" not in options for *_, options in calls)


def test_small_factors_are_not_rounded_away(calls):
    """1 − (1 − 1e-12) is off by 1e-4."""
    for dtype, shapes in ((F32, SHAPES), (F64, SHAPES)):
        w, g, v = lists(shapes, dtype, dtype, dtype)
        for t in v:
            t.mul_(1e-12)
        o = Options(**TERMS | {"lr": 1e-12, "adapt": False})
        n = len(w)
        _, true_v, _ = truth_of(w, g, v, [None] * n, [o] * n, [False] * n)
        step(w, g, v, o)
        for a, b in zip(v, true_v, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4 if dtype == F32 else 1e-13,
                                       atol=1e-18)  # fmt: skip
    assert calls


def test_extreme_magnitudes_take_the_reference(monkeypatch):
    taken, real = [], portable.step_
    monkeypatch.setattr(portable, "step_", lambda w, *a: (taken.extend(w), real(w, *a))[1])
    for size in (10, 100_000):
        for scale in (1e-30, 1e-17, 1.0, 1e25):
            w, g, v = lists([(size,)])
            w[0].mul_(scale)
            step(w, g, v, Options(**TERMS))
    assert len(taken) == 6


def test_bitwise_the_same_again_and_prepared():
    found, o = [], Options(**TERMS)
    for prepared in (False, True, True):
        w, g, v = lists(SHAPES)
        plan = prepare(w, g, v, o) if prepared else None
        for _ in range(3):
            step(w, g, v, o, prepared=plan)
        found.append((bits(w), bits(v)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable_for_a_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for _ in range(2):
            w, g, v = lists([(700, 900), (64,)])
            step(w, g, v, Options(**TERMS))
            found.append((bits(w), bits(v)))
        assert found[0] == found[1]
    finally:
        torch.set_num_threads(before)


def test_views_next_to_each_other_keep_to_themselves():
    """Slices of one buffer, aligned or not, small and large; sentinels between them."""
    sizes = [5, 16_385, 3, 70_000]
    buffers = [torch.full((100_000,), 77.0) for _ in range(3)]
    columns, at = [[], [], []], 1
    for n in sizes:
        for column, base in zip(columns, buffers, strict=True):
            column.append(base[at : at + n].uniform_(0.5, 1.5))
        at += n + 1
    step(*columns, Options(**TERMS))
    at = 1
    for n in sizes:
        for base in buffers:
            assert base[at - 1] == base[at + n] == 77.0
        at += n + 1
