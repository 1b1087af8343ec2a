"""The same bits, whatever the order of the list, the number of programs, the launches, the past."""

import functools
import random

import pytest
import torch

from lars_fused import LARS, lars_step
from tests import internals
from tests.cases import OPTIONS, TERMS, Spec, bits, regimes, small_row
from tests.trial import Trial

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.gpu,
    # numpy, under the interpreter, where a square or a product is to overflow
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

# Of the weights and of the gradients.
MAGNITUDES = [(1.0, 1.0), (1e-40, 1e-30), (1e15, 3e19), (1e-19, 3e19), (3e19, 1e-40)]


@pytest.fixture
def row(monkeypatch, device):
    return small_row(monkeypatch, device)


def sizes(row):
    """Tensors of one chunk and of several, some of them too long for the window."""
    numels = [
        1,
        row.threads,
        row.block + 1,
        row.chunk,
        row.chunk + 1,
        3 * row.chunk,
        7 * row.chunk + 5,
    ]
    return {f"tensor {i}": n for i, n in enumerate(numels)}


def start(row, device, names=None, steps=2):
    """By name: a weight, and a gradient for each step. The values depend on the name alone."""
    values = {}
    for name, n in sizes(row).items():
        generator = torch.Generator().manual_seed(n)
        values[name] = torch.randn(steps + 1, n, generator=generator).to(device)
    return {name: values[name] for name in names or values}


def run(row, device, names=None, steps=2, **options):
    """The bits of every weight and momentum after some steps, by name."""
    values = start(row, device, names, steps)
    params = {name: torch.nn.Parameter(v[0].clone()) for name, v in values.items()}
    optimizer = LARS(params.values(), backend="triton", **{**TERMS, **options})
    for step in range(steps):
        for name, p in params.items():
            p.grad = values[name][1 + step].clone()
        optimizer.step()
    return {
        name: bits([p, optimizer.state[p]["momentum_buffer"]]) for name, p in params.items()
    }  # fmt: skip


@functools.cache
def once(row, device):
    """The run that the others are compared with: one launch a step, the plan as it is."""
    with internals.forced_launches(1):
        return run(row, device)


@pytest.mark.interpret
@pytest.mark.floor
def test_two_runs_from_the_same_state(row, device):
    assert run(row, device) == once(row, device)


def test_a_shuffled_list(row, device):
    names = list(sizes(row))
    for seed in range(3):
        random.Random(seed).shuffle(names)
        assert run(row, device, names) == once(row, device)


@pytest.mark.interpret
@pytest.mark.floor
@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_the_number_of_programs(monkeypatch, row, device, programs):
    """Over one plan: also fewer and more programs than items."""
    expected, launched = once(row, device), []

    def with_programs(name, grid, *rest):
        launched.append(name)
        actual(name, programs, *rest)

    actual = internals.replace_launch(monkeypatch, with_programs)
    assert run(row, device) == expected
    assert launched == ["lars_step"] * 2


@pytest.mark.parametrize("in_flight", [1, 2, 7, 132])
def test_the_order_that_a_number_of_programs_asks_for(monkeypatch, row, device, in_flight):
    """The plan itself depends on how many programs are in flight; so do its grids."""
    expected = once(row, device)
    name, count, _ = internals.launch.architecture(torch.device(device))
    tuning = internals.kernels().tuning
    programs = max(1, in_flight // count)
    monkeypatch.setitem(tuning.ROWS, name, tuning.row_for(name)._replace(programs=programs))
    assert run(row, device) == expected


@pytest.mark.interpret
def test_one_launch_and_two(row, device):
    with internals.forced_launches(2):
        assert run(row, device) == once(row, device)


def test_one_launch_and_two_of_every_variant(row, device):
    """All options, and numbers whose squares leave the range of fp32."""
    names, sizes_of = list(OPTIONS), (9, row.chunk + row.threads + 1)
    specs = [Spec(f"{name}, {n}", (n,)) for n in sizes_of for name in names]
    magnitudes = [MAGNITUDES[i % len(MAGNITUDES)] for i in range(len(specs))]
    found = []
    for launches in (1, 2):
        with internals.forced_launches(launches):
            trial = Trial(
                specs, "triton", device, groups=list(OPTIONS.values()),
                group_of=lambda i: i % len(names), seeded=True, magnitudes=magnitudes,
            )  # fmt: skip
            for _ in range(2):
                trial.step()
        found.append(bits([one.p for one in trial.ones]))
    assert found[0] == found[1]


@pytest.mark.parametrize("launches", [1, 2])
def test_a_step_after_steps_of_other_lists(row, device, launches):
    """One optimizer whose set of gradients changes from step to step goes back and forth between
    tables that it keeps; `lars_step` makes new ones each time. Another optimizer runs in between.
    """
    steps = 4
    values = start(row, device, steps=steps)
    a, b = ([v[0].clone() for v in values.values()] for _ in range(2))
    params = [torch.nn.Parameter(w) for w in a]
    buffers = [None] * len(b)
    other = torch.nn.Parameter(torch.ones(3 * row.chunk, device=device))
    other.grad = torch.ones_like(other)
    with internals.forced_launches(launches):
        optimizer = LARS(params, backend="triton", **TERMS)
        between = LARS([other], backend="triton")
        for step in range(steps):
            grads = [v[1 + step].clone() for v in values.values()]
            present = [i for i in range(len(b)) if step % 2 == 0 or i % 2]
            for i, p in enumerate(params):
                p.grad = grads[i] if i in present else None
            optimizer.step()
            between.step()
            held = [buffers[i] for i in present]
            lars_step([b[i] for i in present], [grads[i] for i in present], held, **TERMS)
            for i, v in zip(present, held, strict=True):
                buffers[i] = v
    assert bits(a) == bits(b)
    assert bits([optimizer.state[p]["momentum_buffer"] for p in params]) == bits(buffers)


def test_every_variant_repeats(row, device):
    """All options and layouts, twice, with scratch memory full of NaN the second time."""
    names = list(OPTIONS)

    def once(poisoned):
        trial = Trial(
            regimes(row), "triton", device, groups=list(OPTIONS.values()),
            group_of=lambda i: i % len(names),
        )  # fmt: skip
        for _ in range(2):
            trial.step()
            if poisoned:
                trial.poison()
        return bits([one.p for one in trial.ones])

    assert once(False) == once(True)


def test_gradients_keep_their_bits_and_versions(row, device):
    grads = [v[1] for v in start(row, device).values()]
    params = [torch.nn.Parameter(v[0].clone()) for v in start(row, device).values()]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    before, versions = bits(grads), [g._version for g in grads]
    optimizer = LARS(params, backend="triton", maximize=True, **TERMS)
    optimizer.step()
    assert bits(grads) == before
    assert [g._version for g in grads] == versions
    assert [p._version for p in params] == [1] * len(params)  # autograd is told of the write
