"""Random models through the kernels, the portable path and float64.

Fifty examples in `make test`, a thousand with HYPOTHESIS_PROFILE=fuzz (`make fuzz`).
"""

import copy

import pytest
import torch

from tests.oracle import Truth, assert_true
from tests.tools import DTYPES, copies, make_grads, make_params, same_bits

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lars_fused import LARS  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.interpret, pytest.mark.gpu, pytest.mark.fuzz]

EXAMPLES = max(50, settings().max_examples)

SHAPES = [
    (),
    (1,),
    (3,),
    (7,),
    (2, 3),
    (4, 1, 3),
    (0,),
    (2, 0),
    (17, 9),
    (130,),
    (257,),
    (2, 3, 2, 2),
]
LAYOUTS = ["contiguous", "reversed", "column", "offset"]


def laid_out(t, layout):
    """The same values in another layout."""
    if layout == "reversed":
        memory = torch.empty(t.shape[::-1], dtype=t.dtype, device=t.device)
        return memory.permute(list(reversed(range(t.dim())))).copy_(t)
    if layout == "column":
        return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
    if layout == "offset":
        flat = torch.full((t.numel() + 5,), 7, dtype=t.dtype, device=t.device)
        return flat[3 : 3 + t.numel()].view(t.shape).copy_(t)
    return t.clone()


@st.composite
def options(draw):
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        "momentum": momentum,
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.2])),
        "trust_coefficient": draw(st.sampled_from([0.001, 0.05, 0.5])),
        "eps": draw(st.sampled_from([0.0, 1e-8, 0.1])),
        "dampening": 0.0 if nesterov else draw(st.sampled_from([0.0, 0.4])),
        "nesterov": nesterov,
        "denominator": draw(st.sampled_from(["sum", "decayed", "gradient"])),
        **{
            name: draw(st.booleans())
            for name in ("lr_in_momentum", "trust_clip", "decay_zero_norm", "adapt", "maximize")
        },
    }


TENSOR = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "gradient": st.sampled_from(LAYOUTS),
        "group": st.integers(0, 1),
        "zero": st.sampled_from(["no", "no", "no", "weight", "gradient"]),
    }
)
# A step: which gradients are there, by bit; the learning rate's factor; what happens before it.
STEP = st.tuples(
    st.integers(0, 15),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.sampled_from(["nothing", "nothing", "resume", "deepcopy"]),
)


def build(tensors, groups, backend, device):
    params = []
    for seed, t in enumerate(tensors):
        (p,) = make_params([t["shape"]], t["dtype"], device, seed)
        value = torch.zeros_like(p) if t["zero"] == "weight" else p
        params.append(torch.nn.Parameter(laid_out(value.detach(), t["layout"])))
    members = [[p for p, t in zip(params, tensors, strict=True) if t["group"] == g] for g in (0, 1)]
    optimizer = LARS(
        [{"params": m, **o} for m, o in zip(members, groups, strict=True)], backend=backend
    )
    return params, optimizer


def train(params, optimizer, tensors, groups, steps):
    for number, (present, factor, before) in enumerate(steps):
        if before == "resume":
            saved = copy.deepcopy(optimizer.state_dict())
            blank = [{"params": g["params"]} for g in optimizer.param_groups]
            optimizer = LARS(blank, backend=optimizer._engine.settings.backend)
            optimizer.load_state_dict(saved)
        elif before == "deepcopy":
            params, optimizer = copy.deepcopy((params, optimizer))
        for group, o in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = o["lr"] * factor
        grads = gradients(params, tensors, number, present)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        kept = [None if g is None else g.clone() for g in grads]
        optimizer.step()
        assert same_bits([p.grad for p in params], kept)
    return params


def gradients(params, tensors, number, present):
    grads = []
    for i, (g, t) in enumerate(zip(make_grads(params, number), tensors, strict=True)):
        g = g.zero_() if t["zero"] == "gradient" else g
        grads.append(laid_out(g, t["gradient"]) if present >> i & 1 else None)
    return grads


def truths(params, tensors, groups, steps):
    """One float64 run a tensor: each has its own group and history."""
    result = []
    for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
        truth = Truth([p], **groups[t["group"]])
        for number, (present, factor, _) in enumerate(steps):
            g = gradients(params, tensors, number, present)[i]
            truth.step([g], lr=groups[t["group"]]["lr"] * factor)
        result.append(truth)
    return result


# The fixtures are constants of the whole run, and the interpreter is slow by nature.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    tensors=st.lists(TENSOR, min_size=1, max_size=4),
    groups=st.tuples(options(), options()),
    steps=st.lists(STEP, min_size=1, max_size=3),
)
def test_random_models_agree_with_float64(tensors, groups, steps, tier, device):
    backend = "torch" if tier == "cpu" else "auto"
    params, optimizer = build(tensors, groups, backend, device)
    expected = truths(params, tensors, groups, steps)
    trained = train(params, optimizer, tensors, groups, steps)
    for p, truth in zip(trained, expected, strict=True):
        assert_true([p], truth, steps=len(steps), units=6.0)
    if backend == "torch":
        return
    portable, other = build(tensors, groups, "torch", device)
    portable = train(portable, other, tensors, groups, steps)
    for p, truth in zip(portable, expected, strict=True):
        assert_true([p], truth, steps=len(steps), units=6.0)
    frozen = [p for i, p in enumerate(portable) if not any(s[0] >> i & 1 for s in steps)]
    untouched = [p for i, p in enumerate(trained) if not any(s[0] >> i & 1 for s in steps)]
    assert same_bits(copies(frozen), copies(untouched))
