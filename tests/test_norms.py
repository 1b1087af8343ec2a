"""`multi_tensor_l2norm` and `clip_grad_norm_` against float64, in both backends."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lars_fused import clip_grad_norm_, multi_tensor_l2norm, param_groups
from tests import internals
from tests.cases import Memory, bits, odd_layouts, regimes, small_row

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.ptx,
    pytest.mark.gpu,
    # numpy, under the interpreter, where a square or a product is to overflow
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def row(monkeypatch, device):
    return small_row(monkeypatch, device)


def placed(specs, dtype, device, scale=1.0):
    memory = Memory(device)
    tensors = [
        memory.place(torch.randn(s.shape) * scale, dtype, s.name, s.w_offset, s.order, s.gap)
        for s in specs
    ]
    return memory, tensors


def truth(tensors):
    return torch.stack([t.detach().double().cpu().norm() for t in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_regime(row, backend, device, dtype):
    memory, tensors = placed(regimes(row), dtype, device)
    before = bits(tensors)
    norms = multi_tensor_l2norm(tensors, backend=backend)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms.cpu(), truth(tensors), rtol=1e-6, atol=0)
    together = multi_tensor_l2norm(tensors, per_tensor=False, backend=backend)
    assert together.shape == ()
    torch.testing.assert_close(together.cpu(), truth(tensors).norm(), rtol=1e-6, atol=0)
    memory.check()
    assert bits(tensors) == before


@pytest.mark.interpret
def test_mixed_dtypes_keep_their_places(row, backend, device):
    tensors = [torch.full((3,), float(i + 1), dtype=DTYPES[i % 3], device=device) for i in range(7)]
    norms = multi_tensor_l2norm(tensors, backend=backend)
    expected = torch.arange(1.0, 8.0, dtype=torch.float64) * math.sqrt(3)
    torch.testing.assert_close(norms.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.interpret
def test_magnitudes_whose_squares_leave_fp32(row, backend, device):
    scales = [1e-42, 1e-30, 1e-15, 1.0, 1e18, 3e37]
    tensors = [torch.randn(row.chunk + 3, device=device) * s for s in scales]
    norms = multi_tensor_l2norm(tensors, backend=backend)
    torch.testing.assert_close(norms.cpu(), truth(tensors), rtol=1e-5, atol=0)
    joint = multi_tensor_l2norm([tensors[0], tensors[-1]], per_tensor=False, backend=backend)
    torch.testing.assert_close(joint.cpu(), truth(tensors)[-1], rtol=1e-5, atol=0)


def test_layouts_and_dtypes_that_the_kernels_do_not_take(row, backend, device):
    _, tensors = placed(odd_layouts(row)[:1], torch.float32, device)
    tensors += [torch.randn(5, dtype=torch.float64, device=device), torch.randn(4, device=device)]
    expected = truth(tensors)
    torch.testing.assert_close(multi_tensor_l2norm(tensors).cpu(), expected, rtol=1e-6, atol=0)
    if backend == "triton":
        for i, remedy in ((0, "use a contiguous tensor"), (1, "the kernels support float32")):
            with pytest.raises(RuntimeError, match=rf"tensors\[0\].*cannot read it.*{remedy}"):
                multi_tensor_l2norm([tensors[i]], backend="triton")


def test_one_launch_a_dtype(monkeypatch, row, backend, device):
    launched = internals.record_launches(monkeypatch)
    tensors = [torch.ones(row.chunk * 2, dtype=d, device=device) for d in DTYPES[:2] * 3]
    multi_tensor_l2norm(tensors, backend=backend)
    assert launched == (["l2norm"] * 2 if backend == "triton" else [])


def test_nothing_and_empty_tensors(backend, device):
    assert multi_tensor_l2norm([], backend=backend).shape == (0,)
    assert multi_tensor_l2norm([], per_tensor=False, backend=backend) == 0
    norms = multi_tensor_l2norm([torch.ones(0, device=device)], backend=backend)
    assert norms.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_own_tensor(row, backend, device, bad):
    tensors = [torch.ones(row.chunk + 2, device=device) for _ in range(2)]
    tensors[0][row.chunk] = bad
    norms = multi_tensor_l2norm(tensors, backend=backend).cpu()
    torch.testing.assert_close(norms[0].item(), bad, equal_nan=True)
    assert norms[1] == pytest.approx(math.sqrt(row.chunk + 2))


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (3.0, TypeError, r"tensors\[1\]=3.0 is a float; must be a tensor"),
        (torch.ones(2, dtype=torch.int32), RuntimeError, r"tensors\[1\].*int32.*floating-point"),
        (torch.ones(2, dtype=torch.complex64), RuntimeError, r"tensors\[1\].*complex64"),
        (torch.ones(2).to_sparse(), RuntimeError, r"tensors\[1\].*sparse"),
    ],
    ids=["a number", "integers", "complex", "sparse"],
)
def test_bad_tensors(backend, value, kind, text):
    with pytest.raises(kind, match=text):
        multi_tensor_l2norm([torch.ones(2), value], backend=backend)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='cuda' is not allowed; must be one of \['auto'"):
        multi_tensor_l2norm([torch.ones(2)], backend="cuda")


def parameters(device, dtypes=DTYPES):
    params = [torch.nn.Parameter(torch.ones(5, dtype=d, device=device)) for d in dtypes]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i)
    return [*params, torch.nn.Parameter(torch.ones(2, device=device))]  # the last has no gradient


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3, math.inf])
def test_clips_as_torch_does(backend, device, max_norm):
    ours, theirs = (parameters(device, [torch.float32] * 3) for _ in range(2))
    total = clip_grad_norm_(ours, max_norm, backend=backend)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)
    assert ours[3].grad is None


def test_clips_every_dtype_by_one_factor(backend, device):
    params = parameters(device)
    norm = math.sqrt(5 * (1 + 4 + 9))
    total = clip_grad_norm_((p for p in params), 1.0, backend=backend)  # a generator
    assert total.item() == pytest.approx(norm, rel=1e-6)
    for i, p in enumerate(params[:3]):
        expected = torch.full((5,), (1.0 + i) / norm).to(p.dtype)
        torch.testing.assert_close(p.grad.cpu(), expected)


def test_one_tensor_and_nothing(backend, device):
    p = parameters(device)[0]
    assert clip_grad_norm_(p, 1.0, backend=backend).item() == pytest.approx(math.sqrt(5))
    p.grad = None
    assert clip_grad_norm_([p], 1.0, backend=backend) == 0


def test_a_norm_that_is_not_finite(backend, device):
    params = parameters(device, [torch.float32] * 2)
    params[0].grad[1] = math.inf
    before = bits([p.grad for p in params[:2]])
    with pytest.raises(
        RuntimeError, match=r"norm of the gradients is inf.*error_if_nonfinite=False"
    ):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True, backend=backend)
    assert bits([p.grad for p in params[:2]]) == before
    assert clip_grad_norm_(params, 1.0, backend=backend) == math.inf


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, "1", True])
def test_a_bad_max_norm(backend, device, max_norm):
    params = parameters(device)
    before = bits([p.grad for p in params[:3]])
    with pytest.raises(ValueError, match=r"max_norm=.* is not allowed; must be a number >= 0"):
        clip_grad_norm_(params, max_norm, backend=backend)
    assert bits([p.grad for p in params[:3]]) == before


@pytest.mark.interpret
def test_ordinary_chunks_are_summed_once(monkeypatch, tier, device):
    """The second pass, in other units, is for sums beyond fp32's range and for all zeros."""
    if tier != "interpret":
        pytest.skip("counts calls within the kernels, which only the interpreter makes")
    from lars_fused.kernels import sums

    calls = []
    real = sums._sum_squares

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setitem(sums.chunk_square_sums.fn.__globals__, "_sum_squares", counted)
    ordinary = torch.randn(100, device=device)

    def passes(*tensors):
        calls.clear()
        multi_tensor_l2norm(list(tensors), backend="triton")
        return len(calls)

    assert passes(ordinary) == 1
    assert passes(ordinary, ordinary * 1e-3, ordinary * 1e3) == 3
    assert passes(ordinary * 1e25) == passes(ordinary * 1e-25) == 2
    assert passes(torch.zeros(100, device=device)) == 2


def test_a_result_is_not_overwritten_by_the_next_call(backend, device):
    """The tables of a list of shapes are used again; what was given back is the caller's."""
    draw = [[torch.randn(40, 50, device=device), torch.randn(7, device=device)] for _ in range(3)]
    norms = [multi_tensor_l2norm(tensors, backend=backend) for tensors in draw]
    for found, tensors in zip(norms, draw, strict=True):
        torch.testing.assert_close(found.cpu(), truth(tensors), rtol=1e-6, atol=0)


@pytest.mark.interpret
def test_few_tables_are_kept_and_none_of_a_launch_that_failed(monkeypatch, tier, device):
    if tier != "interpret":
        pytest.skip("breaks a launch half-way, which only the interpreter lets a test do")
    from lars_fused import norms
    from lars_fused.kernels import l2norm

    norms._kept.__dict__.clear()
    monkeypatch.setattr(norms, "_KEPT_LISTS", 2)
    for n in (1, 2, 3, 4):
        multi_tensor_l2norm([torch.ones(n)], backend="triton")
    assert len(norms._kept.works) == 2

    tensors = [torch.randn(30_000)]  # several chunks: the arrivals are counted
    multi_tensor_l2norm(tensors, backend="triton")
    with monkeypatch.context() as patch:
        real, calls = l2norm.chunk_square_sums, []

        def second(*args):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*args)

        patch.setitem(l2norm.l2norm.fn.__globals__, "chunk_square_sums", second)
        with pytest.raises(KeyboardInterrupt):
            multi_tensor_l2norm(tensors, backend="triton")
    tensors[0].mul_(torch.linspace(1, 3, 30_000))  # other partial sums than those left behind
    for _ in range(2):
        after = multi_tensor_l2norm(tensors, backend="triton")
        torch.testing.assert_close(after, truth(tensors), rtol=1e-6, atol=0)


def test_under_capture_the_kernels_are_not_asked(monkeypatch, backend, device):
    """Their tables would need uploads of their own; `gpu/` holds the same with a real capture."""
    tensors = [torch.randn(100, device=device), torch.randn(7, device=device)]
    true = truth(tensors)
    monkeypatch.setattr(internals.launch, "capturing", lambda device: True)
    norms = multi_tensor_l2norm(tensors)
    torch.testing.assert_close(norms.cpu(), true, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"tensors\[0\].*cannot be captured.*backend='torch'"):
        multi_tensor_l2norm(tensors, backend="triton")


@pytest.mark.parametrize("function", [multi_tensor_l2norm, "clip"])
def test_what_inference_mode_made_serves_later_calls(function, backend, device):
    """Tables that are kept must be writable outside of inference mode too."""

    def norm(tensors):
        if function == "clip":
            params = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
            for p, t in zip(params, tensors, strict=True):
                p.grad = t.clone()
            return clip_grad_norm_(params, 1e9, backend=backend)
        return function(tensors, per_tensor=False, backend=backend)

    kept = [torch.full((37,), 2.0, device=device), torch.ones(600, device=device)]
    with torch.inference_mode():
        first = float(norm(kept))
    others = [t.clone() for t in kept]  # the same shapes, other addresses
    assert float(norm(others)) == first == pytest.approx((37 * 4 + 600) ** 0.5, rel=1e-6)


def test_a_norm_whose_square_passes_float64_does_not_raise(backend, device):
    """Four pieces whose squares float64 holds, but not their sum."""
    (norm,) = multi_tensor_l2norm(
        [torch.full((4 * 4096,), 1.2e152, dtype=torch.float64, device=device)], backend="torch"
    )
    assert norm == torch.inf


@pytest.mark.parametrize(
    "max_norm",
    [0.5, np.float32(0.5), Fraction(1, 2), torch.tensor(0.5), torch.tensor([0.5]).half()],
    ids=lambda value: type(value).__name__,
)
def test_max_norm_of_every_kind_of_number(max_norm, backend, device):
    """Torch's takes them too."""
    p = torch.nn.Parameter(torch.ones(4, device=device))
    places = [max_norm, max_norm.to(device)] if isinstance(max_norm, torch.Tensor) else [max_norm]
    for value in places:
        p.grad = torch.full_like(p, 2.0)
        total = clip_grad_norm_([p], value, backend=backend)
        assert float(total) == 4.0
        assert p.grad.tolist() == pytest.approx([0.25] * 4, rel=1e-6)
    clip_grad_norm_([p], math.inf, backend=backend)
    assert p.grad.tolist() == pytest.approx([0.25] * 4, rel=1e-6)


class Listed:
    """A sequence of the old kind, which `isinstance(_, Iterable)` does not know."""

    def __init__(self, held):
        self.held = held

    def __getitem__(self, i):
        return self.held[i]


def test_pairs_of_param_groups_are_their_parameters(device):
    model, twin = (torch.nn.Linear(3, 2).to(device) for _ in range(2))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad, q.grad = torch.full_like(p, 2.0), torch.full_like(q, 2.0)
    pairs = [p for group in param_groups(model, 0.1) for p in group["params"]]
    found = clip_grad_norm_(pairs, 1.0)
    assert torch.equal(found, clip_grad_norm_(twin.parameters(), 1.0))
    assert torch.equal(model.weight.grad, twin.weight.grad)
    norms = multi_tensor_l2norm(pairs)
    assert torch.equal(norms, multi_tensor_l2norm(list(model.parameters())))


def test_a_sequence_with_getitem_alone(device):
    tensors = [torch.ones(4, device=device), torch.zeros(2, device=device)]
    assert multi_tensor_l2norm(Listed(tensors)).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("number", [0, 1, np.False_, np.True_])
def test_numbers_as_flags(number, device):
    params = parameters(device)
    assert multi_tensor_l2norm([torch.ones(4, device=device)], number).ndim == bool(number)
    params[0].grad[0] = math.inf
    if number:
        with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
            clip_grad_norm_(params, 1.0, error_if_nonfinite=number)
    else:
        clip_grad_norm_(params, 1.0, error_if_nonfinite=number)


@pytest.mark.parametrize("flag", ["torch", None, 0.5, np.ones(2)])
def test_what_is_no_flag(flag):
    with pytest.raises(TypeError, match=r"per_tensor=.* is not allowed; must be True or False"):
        multi_tensor_l2norm([torch.ones(2)], flag)


@pytest.mark.parametrize("infinite", [np.float32("inf"), np.float64("inf"), torch.tensor(math.inf)])
def test_an_infinite_max_norm_clips_nothing(infinite, device):
    params = parameters(device)
    before = [p.grad.clone() for p in params[:3]]
    clip_grad_norm_(params, infinite)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=False))
