"""Both backends against the float64 reference, on named regimes, within the bound of `cases`."""

import math

import pytest
import torch

from lars_fused import conventions
from lars_fused._engine import validate
from tests import internals, oracle
from tests.cases import COMBINATIONS, OPTIONS, TERMS, Spec, odd_layouts, regimes, small_row
from tests.conftest import INTERPRETED
from tests.oracle import ULPS, ulp
from tests.trial import Trial

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.ptx,
    pytest.mark.gpu,
    # numpy, under the interpreter, where a square or a product is to overflow
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def row(monkeypatch, device):
    return small_row(monkeypatch, device)


# That both paths give the same bits for every option and magnitude, test_bitwise.py holds. The
# portable backend launches nothing: one is enough.
@pytest.fixture(params=[1, 2] if INTERPRETED or torch.cuda.is_available() else [1])
def launches(request):
    with internals.forced_launches(request.param):
        yield request.param


def a_few(row):
    """Sizes for the cases whose subject is not the layout: one chunk, several, a tail, a scalar."""
    return [
        Spec("one element", (1,)),
        Spec("within a block", (3, 5)),
        Spec("one chunk", (row.chunk,)),
        Spec("several chunks and a tail", (2 * row.chunk + row.block + row.threads + 3,)),
        Spec("misaligned", (row.chunk + 3,), 1, 3),
    ]


@pytest.mark.interpret
@pytest.mark.floor
def test_every_regime(row, launches, backend, device):
    """Two steps; half of the tensors come with a momentum, the others have their first step."""
    trial = Trial(regimes(row), backend, device, seeded=True)
    trial.step()
    trial.check()
    trial.poison()
    trial.step()
    trial.check()


def test_every_dtype_of_the_kernels_has_a_combination_and_its_magnitudes():
    for place in range(3):
        missing = {*validate.STORAGE_DTYPES} - {combination[place] for combination in COMBINATIONS}
        assert not missing, f"add {missing} to COMBINATIONS as the {('w', 'g', 'v')[place]}"
    mastered = {combination[0] for combination in COMBINATIONS if combination[3]}
    missing = {*validate.LOW_PRECISION} - mastered
    assert not missing, f"add a combination of {missing} with masters"
    missing = {*validate.STORAGE_DTYPES} - {*MAGNITUDES}
    assert not missing, f"add both ends of the range of {missing} to MAGNITUDES"


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("w", "g", "v", "master"), COMBINATIONS, ids=lambda x: str(x).removeprefix("torch.")
)
def test_every_dtype_combination(row, launches, backend, device, w, g, v, master):
    specs = a_few(row)
    if master:  # nothing of it is a plain copy of the parameter's layout
        specs.append(Spec("channels_last", (2, 3, 5, 4), order=(0, 2, 3, 1), g_order=(0, 2, 3, 1)))
    trial = Trial(
        specs, backend, device, w_dtype=w, g_dtype=g, v_dtype=v, master=master, seeded=True
    )
    for _ in range(2):
        trial.step()
        trial.check()


@pytest.mark.interpret
@pytest.mark.floor
def test_every_option_in_one_launch(row, backend, device):
    """A group for every variant, over tensors of one chunk and of several; a group option that
    reached another group's tensors would show.
    """
    names = list(OPTIONS)
    specs = [
        Spec(f"{name}: {n} elements", (n,))
        for n in (9, row.chunk + row.threads + 1)
        for name in names
    ]
    trial = Trial(
        specs, backend, device, groups=list(OPTIONS.values()), group_of=lambda i: i % len(names),
        seeded=True,
    )  # fmt: skip
    for _ in range(2):
        trial.step()
        trial.check()
    if backend == "triton":
        assert len(trial.works()) == 1


def test_every_convention(row, backend, device):
    groups = [dict(getattr(conventions, name)) for name in conventions.__all__]
    for group in groups:
        group["weight_decay"], group["lr"] = 0.2, 20.0  # ratios are about 0.001 here
    specs = [Spec(f"{name}", (row.chunk + 5,)) for name in conventions.__all__]
    trial = Trial(specs, backend, device, groups=groups, group_of=lambda i: i, seeded=True)
    for _ in range(3):
        trial.step()
    trial.check()


def test_ten_steps_with_a_learning_rate_that_changes_each_step(row, backend, device):
    specs = [a_few(row)[1], a_few(row)[4]]
    trial = Trial(specs, backend, device, groups=[{}, OPTIONS["lr outside"]], group_of=lambda i: i)
    for step in range(10):
        trial.step(lr=0.3 * (1 + step % 4))
        trial.check()


ZERO_NORMS = {
    "w = 0": (0.0, 1.0, {}),
    "g = 0": (1.0, 0.0, {}),
    "both 0": (0.0, 0.0, {}),
    "w = 0, decay off": (0.0, 1.0, {"decay_zero_norm": False}),
    "g = 0, decay off": (1.0, 0.0, {"decay_zero_norm": False}),
    "g = 0, decayed": (1.0, 0.0, {"denominator": "decayed"}),
    "g = 0, no decay at all": (1.0, 0.0, {"denominator": "decayed", "weight_decay": 0.0}),
    "w = 0, clip": (0.0, 1.0, {"trust_clip": True}),
    "g = 0, gradient": (1.0, 0.0, {"denominator": "gradient", "eps": 0.0}),
}


def test_zero_norms(row, backend, device):
    sizes = (5, row.chunk + 7)
    specs = [Spec(f"{name}, {n} elements", (n,)) for n in sizes for name in ZERO_NORMS]
    trial = Trial(
        specs, backend, device, groups=[x[2] for x in ZERO_NORMS.values()],
        group_of=lambda i: i % len(ZERO_NORMS), seeded=True,
        magnitudes=[x[:2] for x in ZERO_NORMS.values()] * len(sizes),
    )  # fmt: skip
    for _ in range(2):
        trial.step()
        trial.check()


@pytest.mark.parametrize("count", [84, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_tiny_tensors(row, backend, device, count):
    """84 have every mix of size and alignment. The plan and tables of 5,000 are tested at full
    length in engine/test_launch_tables.py, 10,000 in torch operations in contract/test_memory.py.
    """
    count = 5000 if device == "cuda" else count
    specs = [Spec(f"tensor {i}", (1 + i % 7, 2), i % 4, i % 3) for i in range(count)]
    trial = Trial(
        specs, backend, device, groups=[{}, OPTIONS["not adapted"]], group_of=lambda i: i % 2
    )
    trial.step()
    trial.check()


@pytest.mark.interpret
def test_a_tensor_of_many_chunks(monkeypatch, backend, device):
    """More chunks than the last program adds at a time, and more than the window holds."""
    row = small_row(monkeypatch, device, chunk=16, block=8, threads=4, lanes=32, window=16 * 8 * 4)
    trial = Trial([Spec("long", (72 * row.chunk + 5,)), Spec("short", (3,))], backend, device)
    trial.step()
    trial.check()
    if backend == "triton":
        assert trial.works()[0].schedule.plan.n_slots == 73


def test_layouts_of_the_portable_path_are_stepped_beside_the_kernels(row, backend, device):
    """`auto` steps exactly the tensors that the kernels cannot take in the portable path."""
    odd = odd_layouts(row)
    specs = [spec for pair in zip(a_few(row), odd, strict=False) for spec in pair]
    trial = Trial(specs, "torch" if backend == "torch" else "auto", device, seeded=True)
    for _ in range(2):
        trial.step()
        trial.check()
    if backend == "triton":
        portable = internals.tensors_in_portable(trial.optimizer)
        assert {trial.ones[i].name for i in portable} == {spec.name for spec in odd}
        assert len(internals.tensors_in_kernels(trial.optimizer)) == len(odd)


MAGNITUDES = {
    F32: (1e-40, 1e-30, 1e-19, 1.0, 1e15, 3e19),
    BF16: (1e-38, 1e-20, 1.0, 3e19),
    F16: (1e-6, 1e-3, 1.0, 1e3),
}


@pytest.mark.parametrize("dtype", MAGNITUDES, ids=lambda d: str(d).removeprefix("torch."))
def test_extreme_magnitudes(row, backend, device, dtype):
    """Squares of such numbers leave the range of fp32 on both sides; norms must not.

    The trust coefficient is large so that w moves by a part of itself whatever g is. Eager fp32
    squares overflow here, and the bound can only be that of rounding: the baseline is the truth.
    """
    pairs = [(w, g) for w in MAGNITUDES[dtype] for g in MAGNITUDES[dtype]]
    specs = [Spec(f"w {w:g}, g {g:g}", (row.block + 3,)) for w, g in pairs]
    specs += [Spec(f"w {w:g}, g {g:g}, two chunks", (row.chunk + 5,)) for w, g in pairs[::5]]
    options = {
        "lr": 1.0, "trust_coefficient": 0.5, "eps": 0.0, "weight_decay": 0.0,
        "denominator": "gradient",
    }  # fmt: skip
    trial = Trial(
        specs, backend, device, w_dtype=dtype, groups=[options], magnitudes=pairs + pairs[::5]
    )
    trial.step()
    trial.memory.check()
    for one in trial.ones:
        ours, truth = one.p.detach().double().cpu(), one.truth
        assert torch.isfinite(ours).all(), one.name
        allowed = 8 * ulp(torch.maximum(truth.abs(), one.start.abs()), dtype)
        assert ((ours - truth).abs() <= allowed).all(), one.name
        smallest = math.sqrt(ours.numel()) * torch.finfo(dtype).tiny
        assert one.start.norm() < smallest or not torch.equal(ours, one.start), one.name


@pytest.mark.interpret
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_tensor_only(
    row, launches, backend, device, bad
):
    trial = Trial([Spec(f"tensor {i}", (row.chunk + 3,)) for i in range(3)], backend, device)
    trial.gradients()
    trial.ones[1].p.grad[row.chunk + 1] = bad
    trial.gradients = lambda: None
    trial.step()
    clean = [one for i, one in enumerate(trial.ones) if i != 1]
    for one in clean:
        assert torch.isfinite(one.p).all()
    assert trial.ones[1].p.isnan().any()
    trial.ones = clean
    trial.check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("term", "changes"),
    [
        ("decay", {"weight_decay": 0.0}),
        ("momentum", {"momentum": 0.0}),
        ("ratio", {"adapt": False}),
        ("eps", {"eps": 0.0}),
        ("dampening", {"dampening": 0.4}),
        ("nesterov", {"nesterov": True}),
        ("denominator", {"denominator": "decayed"}),
        ("lr", {"lr": 1.4}),
        ("placement of lr", {"lr_in_momentum": False}),
        ("sign", {"maximize": True}),
    ],
)
def test_every_term_moves_the_result(term, changes, dtype):
    """A term dropped from the equations lands outside of the bound, on tensors of any size."""
    for spec in [Spec("few", (5,)), Spec("many", (211,))]:
        trial = Trial([spec], "torch", w_dtype=dtype)
        one, wrong = trial.ones[0], trial.ones[0].start.clone()
        v = None
        for step in range(2):
            trial.step(lr=(1.5, 0.9)[step])
            o = {**oracle.DEFAULTS, **TERMS, "lr": (1.5, 0.9)[step]} | changes
            wrong, v = oracle.in_float64(wrong, one.p.grad, v, o)
        bound = 2 * (one.eager.double() - one.truth).abs().max()
        bound = bound + ULPS * ulp(torch.maximum(one.truth.abs(), one.start.abs()), dtype)
        assert ((wrong - one.truth).abs() > bound).any(), f"{term} is lost in the tolerance"
