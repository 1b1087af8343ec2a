"""Windows of large tensors, and tensors that are widened in blocks."""

import pytest
import torch

from lars_fused._engine import fused, large_tensor, square_norms, torch_step
from lars_fused._engine.large_tensor import STAGE
from lars_fused.reference import Options
from tests.cases import TERMS
from tests.engine.test_torch_step import BF16, F32, check, check_sums, clones, lists, truth_of

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("w_dtype", "g_dtype", "copied"),
    [(BF16, BF16, False), (F32, BF16, True), (BF16, F32, False), (F32, F32, False)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"denominator": "decayed"}, {"nesterov": True}], ids=str)
def test_tensors_of_several_blocks(w_dtype, g_dtype, copied, options):
    """Norms take blocks of 2·STAGE elements, updates of STAGE; the last is not a whole piece."""
    o = Options(**TERMS | options)
    w, g, v = lists([(5 * STAGE + 4321,), (2 * STAGE + 1,)], w_dtype, g_dtype)
    copies = clones(w) if copied else [None] * 2
    if copied:
        copies = [c.to(BF16) for c in copies]
    true_w, true_v, (true_sums, true_ratios) = truth_of(w, g, v, copies, [o] * 2, [False] * 2)
    old = clones(w)
    found = torch_step.step_(w, g, v, copies, [o] * 2, [False] * 2)
    assert list(found.parts) == ["fused"]
    sums, ratios = found.tables()
    # Squares of 16-bit numbers are exact: their sums round to the same side more often.
    rtol = 2e-7 if w_dtype == g_dtype == F32 else 3e-6
    check_sums(sums, true_sums, [o] * 2, rtol)
    torch.testing.assert_close(ratios, true_ratios, rtol=rtol, atol=0)
    check(w, true_w, old)
    check(v, true_v, old)
    check(copies, true_w, old)


@pytest.mark.parametrize(
    ("shapes", "tensors"),
    [([(300, 1000)] * 40, [40]),  # one window
     ([(3000, 5000)] * 5, [2, 2, 1]),  # 2^25 elements at the most
     ([(100_000, 256), (300, 1000), (300, 1000), (300, 1000)], [2, 2])],  # 2^19 norms at the most
    ids=["all", "elements", "norms"],
)  # fmt: skip
def test_windows_of_large_tensors(shapes, tensors):
    plan = fused.Plan(
        *([torch.empty(shape) for shape in shapes] for _ in range(3)),
        [Options(**TERMS)] * len(shapes),
    )  # fmt: skip
    assert [len(window.index) for window in plan.windows] == tensors
    assert [i for window in plan.windows for i in window.index] == list(range(len(shapes)))
    numel = sum(window._table.numel() for window in plan.windows)
    assert numel <= large_tensor.TABLE * len(plan.windows)


@pytest.mark.parametrize("n", [1, STAGE, STAGE + 1, 262_144, 1_000_003])
def test_blocks_are_few_and_equal(n):
    """A short last block costs as many calls as a whole one, and is all that stays widened."""
    t = torch.arange(n, dtype=F32)
    found = square_norms.blocks(t, STAGE)
    sizes = [b.numel() for b in found]
    assert torch.equal(torch.cat(found), t)
    assert len(sizes) == -(-n // STAGE)
    assert max(sizes) <= STAGE
    assert max(sizes) - min(sizes) <= len(sizes) * square_norms.PIECE
