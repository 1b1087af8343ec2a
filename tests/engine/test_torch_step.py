"""Which backend takes which tensor; and that every backend takes the same step."""

import math

import pytest
import torch

from lars_fused import LARS, multi_tensor_l2norm, reference
from lars_fused._engine import portable, rates, square_norms, torch_step, validate
from lars_fused.options import MOMENTUM_DTYPES
from lars_fused.reference import Options
from tests.cases import OPTIONS, TERMS, bits

pytestmark = pytest.mark.cpu

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Small and large tensors, around every size where the fused backend's loops change.
SHAPES = [(3, 2), (1,), (), (64,), (17, 5), (4096,), (4097,), (129, 127), (300, 333), (70_001,)]
BACKENDS = ["fused", "foreach", "reference"]


def lists(shapes, w_dtype=F32, g_dtype=None, v_dtype=F32, momentum=True):
    """Weights, gradients and buffers whose every term moves the result."""
    draw = torch.Generator().manual_seed(3)

    def some(dtype, scale):
        values = [torch.randn(s, generator=draw, dtype=F64) * scale for s in shapes]
        return [(v + v.sign() * 0.2).to(dtype) for v in values]

    v = some(v_dtype, 0.3) if momentum else [None] * len(shapes)
    return some(w_dtype, 1.0), some(g_dtype or w_dtype, 1.0), v


def truth_of(w, g, v, c, options, first, scale=1.0, sums=None):
    wide = [[None if t is None else t.to(F64, copy=True) for t in ts] for ts in (w, g, v)]
    found = portable.step_(*wide, [None] * len(w), options, first, scale, sums)
    return wide[0], wide[2], found


def error_bound(true, before, dtype, units=6):
    """Some roundings of the dtype at the size of what is added, and of fp32's arithmetic."""
    size = torch.maximum(true.abs(), before.double().abs()).max().item() + 1.0
    stored = torch.finfo(dtype).eps * true.abs()
    arithmetic = 2.0**-52 if dtype == F64 else 2.0**-24
    return units * (stored / 2 + arithmetic * size)


def check(new, true, before):
    for a, b, old in zip(new, true, before, strict=True):
        if a is not None and a.numel():
            error = (a.double() - b).abs()
            assert bool((error <= error_bound(b, old, a.dtype)).all()), (a.shape, error.max())


def check_sums(sums, true, options, rtol):
    """N(w)² and N(g)², and N(d)² wherever a denominator needs it."""
    torch.testing.assert_close(sums[:, :2], true[:, :2], rtol=rtol, atol=0)
    unknown = sums[:, 2].isnan()
    assert not any(u and o.denominator == "decayed" for u, o in zip(unknown, options, strict=True))
    torch.testing.assert_close(sums[~unknown, 2], true[~unknown, 2], rtol=rtol, atol=0)


def clones(tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_on_every_backend(backend, name):
    o = Options(**{**TERMS, **OPTIONS[name]})
    w, g, v = lists(SHAPES, momentum=o.momentum != 0)
    first = [i % 3 == 0 for i in range(len(w))]
    old_w, old_v, before = clones(w), clones(v), bits(g)
    n = len(w)
    true_w, true_v, (true_sums, true_ratios) = truth_of(w, g, v, [None] * n, [o] * n, first, 8.0)
    scale = torch.tensor(8.0, dtype=F64)
    sums, ratios = torch_step.step_(
        w, g, v, [None] * n, [o] * n, first, scale, backend=backend
    ).tables()
    check(w, true_w, old_w)
    check([x for x in v if x is not None], [x for x in true_v if x is not None],
          [x for x in old_v if x is not None])  # fmt: skip
    torch.testing.assert_close(ratios, true_ratios, rtol=1e-6, atol=0)
    check_sums(sums, true_sums, [o] * n, 1e-5)
    assert bits(g) == before, "a gradient was written"
    parts = torch_step.divide(w, g, v, [None] * n, [o] * n, backend).parts
    assert list(parts) == [backend], "another backend took some of the tensors"


# Weights, gradients, momentum, and whether the weights are masters with a bf16 copy.
COMBINATIONS = [
    (BF16, BF16, F32, False), (F16, F16, F32, False), (BF16, BF16, BF16, False),
    (F16, F16, F16, False), (F32, BF16, F32, True), (F32, BF16, F32, False),
    (F32, F32, BF16, False), (BF16, F32, F32, False),
]  # fmt: skip


def test_every_dtype_has_a_combination():
    """float64 is left to itself: test_float64_stays_float64."""
    weights, _, momenta, _ = map(set, zip(*COMBINATIONS, strict=True))
    missing = {*validate.PARAMETER_DTYPES} - weights - {F64}
    assert not missing, f"add {missing} to COMBINATIONS as the weights"
    missing = {*MOMENTUM_DTYPES} - momenta - {F64}
    assert not missing, f"add {missing} to COMBINATIONS as the momentum"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("w_dtype", "g_dtype", "v_dtype", "with_copy"), COMBINATIONS, ids=str)
def test_mixed_dtypes_on_every_backend(backend, w_dtype, g_dtype, v_dtype, with_copy):
    o = Options(**TERMS)
    w, g, v = lists(SHAPES, w_dtype, g_dtype, v_dtype)
    c = [t.to(BF16) if with_copy else None for t in w]
    n, first = len(w), [False] * len(w)
    old_w, old_v = clones(w), clones(v)
    true_w, true_v, _ = truth_of(w, g, v, c, [o] * n, first)
    torch_step.step_(w, g, v, c, [o] * n, first, backend=backend)
    check(w, true_w, old_w)
    check(v, true_v, old_v)
    if with_copy:
        assert all(torch.equal(a, b.to(BF16)) for a, b in zip(c, w, strict=True))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_float64_stays_float64(backend):
    o = [Options(**{**TERMS, "lr": lr}) for lr in (1.5, 1e-6)]
    for options in o:
        w, g, v = lists(SHAPES, F64, F64, F64)
        n, first = len(w), [False] * len(w)
        old = clones(w)
        true_w, true_v, _ = truth_of(w, g, v, [None] * n, [options] * n, first)
        torch_step.step_(w, g, v, [None] * n, [options] * n, first, backend=backend)
        check(w, true_w, old)
        check(v, true_v, clones(v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("denominator", ["sum", "decayed", "gradient"])
def test_sums_of_whole_layers_are_used_in_place_of_the_tensors_own(backend, denominator):
    o = Options(**{**TERMS, "denominator": denominator})
    w, g, v = lists(SHAPES)
    n, first = len(w), [False] * len(w)
    sums = 4 * torch_step.square_sums_of(w, g, [o] * n, backend=backend)
    check_sums(sums, 4 * portable.square_sums_of(w, g, [o] * n), [o] * n, 1e-5)
    sums[:, 1 if denominator == "decayed" else 2] = math.nan
    old = clones(w)
    true_w, _, (_, true_ratios) = truth_of(w, g, v, [None] * n, [o] * n, first, 1.0, sums)
    given, ratios = torch_step.step_(
        w, g, v, [None] * n, [o] * n, first, sums=sums, backend=backend
    ).tables()
    check(w, true_w, old)
    torch.testing.assert_close(ratios, true_ratios, rtol=1e-6, atol=0)
    assert torch.equal(given, sums) or torch.equal(given.isnan(), sums.isnan())


def test_what_a_backend_objects_to_goes_to_the_reference_in_the_same_step():
    w, g, v = lists([(6, 5)] * 6)
    v[1] = v[1].double()
    g[2] = g[2].t().contiguous().t()
    base = torch.randn(6, 10)
    w[3] = base[:, ::2]
    untouched = base[:, 1::2].clone()
    n, first, o = 6, [False] * 6, Options(**TERMS)
    _, parts, reasons = torch_step.divide(w, g, v, [None] * n, [o] * n)
    assert parts == {"fused": [0, 4, 5], "reference": [1, 2, 3]}
    assert reasons == {
        1: "its momentum is float64, the tensor torch.float32",
        2: "its gradient has strides (1, 6), the tensor (5, 1)",
        3: "its gradient has strides (5, 1), the tensor (10, 2)",
    }
    old = clones(w)
    true_w, true_v, (true_sums, true_ratios) = truth_of(w, g, v, [None] * n, [o] * n, first)
    sums, ratios = torch_step.step_(w, g, v, [None] * n, [o] * n, first).tables()
    for i in range(n):
        check([w[i]], [true_w[i]], [old[i]])
        check([v[i]], [true_v[i]], [old[i]])
    torch.testing.assert_close(ratios, true_ratios, rtol=1e-6, atol=0)
    check_sums(sums, true_sums, [o] * n, 1e-6)
    assert torch.equal(base[:, 1::2], untouched)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("zero", [(), (0,), (1,), (0, 1), (2,)])
def test_ratios_in_floats_are_those_of_the_reference(name, zero):
    o = Options(**{**TERMS, **OPTIONS[name]})
    sums = torch.tensor([[4.0, 9.0, 16.0], [1e-8, 2.0, 3.0], [5.0, 1e4, 1e-4]], dtype=F64)
    sums[1, list(zero)] = 0.0
    expected, decays = reference.trust_ratios(sums, [o] * 3)
    norms = sums.sqrt()
    found = rates.trust_ratios(
        norms[:, 0].tolist(), norms[:, 2 if o.denominator == "decayed" else 1].tolist(), o, o.lr
    )
    assert found[0] == pytest.approx(expected.tolist(), rel=1e-14)
    assert found[1] == decays.tolist()


def test_a_norm_of_a_hundred_million_elements():
    tensor = torch.rand(100_000_000, generator=torch.Generator().manual_seed(1))
    exact = math.sqrt(sum(float(x.double().square().sum()) for x in tensor.split(1 << 20)))
    found = multi_tensor_l2norm([tensor], backend="torch").item()
    assert abs(found / exact - 1) <= 1e-7


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * 4096, 200_001])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_norms_in_pieces(size, dtype, scale):
    if dtype == F16 and scale != 1.0:
        scale = 1e-4
    t = (torch.randn(size, dtype=F64) * scale).to(dtype)
    zero = torch.zeros(size, dtype=dtype)
    exact = t.double().square().sum()
    torch.testing.assert_close(
        # Squares of 16-bit numbers are exact: their sums round to the same side more often.
        square_norms.of([t, zero, t]), torch.stack([exact, exact * 0, exact]),
        rtol=2e-7 if dtype in (F32, F64) else 3e-6, atol=0,
    )  # fmt: skip


def test_a_skipped_step_of_the_reference_without_looking():
    w, g, v = lists(SHAPES)
    n, first = len(w), [True] * len(w)
    before = bits(w), bits(v)
    for flag, changed in ((1.0, False), (0.0, True)):
        torch_step.step_(w, g, v, [None] * n, [Options(**TERMS)] * n, first,
                         found_inf=torch.tensor([flag]), backend="reference")  # fmt: skip
        assert ((bits(w), bits(v)) != before) == changed


def test_learning_rates_of_tensors():
    like = torch.zeros(3, dtype=F64)
    shared = Options(lr=torch.tensor([0.25]))
    assert torch_step.learning_rates([shared, Options(lr=0.5), shared], like).tolist() == [
        0.25, 0.5, 0.25,
    ]  # fmt: skip
    assert torch_step.learning_rates([Options(lr=0.5)] * 3, like).tolist() == [0.5] * 3


def test_the_optimizer_takes_this_path():
    p = torch.nn.Parameter(torch.randn(20, 20))
    p.grad = torch.randn_like(p)
    optimizer = LARS([p], **TERMS, backend="torch")
    version = p._version
    optimizer.step()
    assert p._version > version, "autograd has to see the kernel's write"
