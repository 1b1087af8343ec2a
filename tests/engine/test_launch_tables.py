"""What is sent to the device and when, int64 addressing, and what layer_stats() reads back."""

import contextlib
import mmap

import pytest
import torch

from lars_fused import LARS, reference
from lars_fused._engine.plan import make_plan, unpack_items
from lars_fused.kernels import layout
from lars_fused.kernels.layout import BOTH, pack_item
from lars_fused.reference import Options
from tests import internals
from tests.cases import OPTIONS, TERMS, Memory, Spec, marked, small_row, some

cpu = pytest.mark.cpu
interpret = pytest.mark.interpret
everywhere = [cpu, interpret, pytest.mark.gpu]


@pytest.fixture
def uploads(monkeypatch):
    """The shapes of what is sent to the device, as it happens."""
    return internals.record_uploads(monkeypatch)


@interpret
def test_only_what_changed_is_uploaded(row, uploads, launched):
    params = some(count=6)
    optimizer = LARS([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}], backend="triton")
    optimizer.step()
    tensor_words, group_words = (getattr(layout, f"{name}_WORDS") for name in ("TENSOR", "GROUP"))
    assert sorted(uploads) == sorted([(6, tensor_words), (2, group_words)])
    uploads.clear()
    optimizer.step()
    assert uploads == []

    kept = params[2].grad, params[4].grad
    params[2].grad = params[2].grad.clone()
    optimizer.step()
    assert uploads == [(1, tensor_words)]
    uploads.clear()
    params[2].grad, params[4].grad = kept[0], kept[1].clone()
    optimizer.step()
    assert uploads == [(3, tensor_words)]  # the stretch from the first row to the last
    uploads.clear()

    optimizer.param_groups[1]["lr"] = 0.2
    optimizer.step()
    assert uploads == [(2, group_words)]
    assert len(launched) == 5


@interpret
def test_a_new_learning_rate_neither_compiles_nor_plans(row, launched):
    params = some()
    optimizer = LARS(params, backend="triton", weight_decay=0.1)
    optimizer.step()
    kept = internals.launches(optimizer)
    for lr, decay in ((0.5, 0.1), (0.25, 0.2), (0.0, 0.0)):
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay, nesterov=lr == 0.25)
        optimizer.step()
        assert internals.launches(optimizer) == kept
    assert len(launched) == 4
    assert len(set(launched)) == 1  # the same kernel with the same compile-time constants


@interpret
def test_the_tables_of_5000_tensors(monkeypatch):
    """Every tensor's addresses, size, alignment and group are in its own row, and it has its item.
    The kernel is not run here: kernels/test_accuracy.py does.
    """
    internals.replace_launch(monkeypatch, lambda *_: None)
    memory = Memory()
    specs = [Spec(f"{i}", (1 + i % 5,), i % 3, i % 2) for i in range(5000)]
    params = [memory.place(torch.ones(s.shape), torch.float32, s.name, s.w_offset) for s in specs]
    params = [torch.nn.Parameter(p) for p in params]
    for p, s in zip(params, specs, strict=True):
        p.grad = memory.place(torch.ones(s.shape), torch.float32, s.name, s.g_offset)
    groups = [{"params": params[:2000]}, {"params": params[2000:], "adapt": False}]
    optimizer = LARS(groups, backend="triton")
    optimizer.step()
    (work,) = internals.launches(optimizer)
    columns = {
        "W_AT": [p.data_ptr() for p in params],
        "G_AT": [p.grad.data_ptr() for p in params],
        "V_AT": [optimizer.state[p]["momentum_buffer"].data_ptr() for p in params],
        "COPY_AT": [0] * 5000,
        "NUMEL": [p.numel() for p in params],
        "GROUP": [int(i >= 2000) for i in range(5000)],
        "FLAGS": [
            layout.FRESH + layout.ALIGNED * (i % 6 == 0 and optimizer_aligned(optimizer, p))
            for i, p in enumerate(params)
        ],
    }
    for name, column in columns.items():
        assert work.rows.tensors[:, getattr(layout, name)].tolist() == column, name
    kinds, tensors, chunks = unpack_items(work.arguments.items)
    assert kinds.unique().tolist() == [BOTH]
    assert chunks.unique().tolist() == [0]
    assert sorted(tensors.tolist()) == list(range(5000))


def optimizer_aligned(optimizer, p):
    return optimizer.state[p]["momentum_buffer"].data_ptr() % 16 == 0


@interpret
@pytest.mark.parametrize("launches", [1, 2])
def test_elements_beyond_two_to_the_31(monkeypatch, launches):
    """The last chunk of a tensor of 2^31 + 100 elements, of which only that chunk exists: its base
    address lies as far below. A 32-bit offset wraps and lands lower still, in pages reserved for it
    (and never filled), so that the test fails instead of crashing.
    """
    chunk, tail = 1 << 20, 100
    row = small_row(monkeypatch, "cpu", chunk=chunk, block=1 << 16, threads=128)
    numel, device = (1 << 31) + tail, torch.device("cpu")
    private_anonymous_unreserved = 0x02 | 0x20 | 0x4000
    pages = mmap.mmap(-1, (9 << 30), flags=private_anonymous_unreserved)
    end = torch.frombuffer(pages, dtype=torch.float16, offset=(9 << 30) - 4096)
    w, g = end[:tail], end[1024 : 1024 + tail]
    w.copy_(torch.randn(tail))
    g.copy_(torch.randn(tail))
    expected = (w.double() - 0.5 * g.double()).half()
    dtypes = internals.Dtypes(torch.float16, torch.float16, torch.float32)
    with internals.forced_launches(launches):
        options = Options(lr=0.5, momentum=0.0, adapt=False)
        work = internals.lone_tables(device, dtypes, numel, options)
    last = pack_item(BOTH, 0, (1 << 31) // row.chunk)
    assert last in work.schedule.plan.items.tolist()
    internals.single_chunk(work, last)
    below = 2 * (numel - tail)
    internals.point_at(work, w.data_ptr() - below, g.data_ptr() - below)
    internals.run(work)
    torch.testing.assert_close(w, expected)


@marked(cpu, interpret)
def test_plans_beyond_two_to_the_31_elements():
    """The chunk index of an item has 31 bits to itself."""
    plan = make_plan([(1 << 31) + 1], [True], chunk=1 << 16, window=0, lag=1, bytes_per_element=8)
    _, _, chunks = unpack_items(plan.items)
    assert chunks.max().item() == 1 << 15


@interpret
@pytest.mark.parametrize("asked", ["3", "one", ""])
def test_the_number_of_launches_is_one_or_two(monkeypatch, asked):
    monkeypatch.setenv("LARS_FUSED_LAUNCHES", asked)
    with pytest.raises(ValueError, match=f"LARS_FUSED_LAUNCHES={asked} is not allowed"):
        LARS(some(), backend="triton").step()


@interpret
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lars_step", internals.launch.StepArguments),
        ("lars_resident", internals.launch.StepArguments),
        ("l2norm", internals.launch.NormArguments),
        ("lars_update", internals.launch.UpdateArguments),
    ],
)
def test_arguments_bear_the_names_that_the_kernel_gives_them(name, arguments):
    """They are passed by position."""
    names = internals.launch.function(name).arg_names
    compile_time = internals.launch.constants(
        internals.Dtypes(*[torch.float32] * 4),
        internals.kernels().tuning.row_for("sm_90"), name, False,
    )  # fmt: skip
    assert names == [*arguments._fields, *compile_time]


@interpret
def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no launch constants for architecture 'tpu'.*'gfx'"):
        internals.kernels().tuning.row_for("tpu")
    assert internals.kernels().tuning.row_for("gfx90a") == internals.kernels().tuning.ROWS["gfx"]


@marked(*everywhere)
@pytest.mark.parametrize("launches", [1, 2])
def test_layer_stats_are_the_float64_truth(monkeypatch, backend, device, launches):
    row = small_row(monkeypatch, device)
    names = list(OPTIONS)
    numels = [row.chunk + 3 if i % 2 else 7 for i in range(len(names))]
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in numels]
    groups = [
        {"params": [(name, p)], **TERMS, **OPTIONS[name]}
        for name, p in zip(names, params, strict=True)
    ]
    with internals.forced_launches(launches):
        optimizer = LARS(groups, backend=backend)
        assert optimizer.layer_stats() == {}
        for scale in (1, 3):  # what the second step leaves is not what the first one left
            for p in params:
                p.grad = scale * torch.randn_like(p)
            params[3].grad = None
            expected = {}
            for name, p in zip(names, params, strict=True):
                if p.grad is None:
                    continue
                o = Options(**{**TERMS, **OPTIONS[name]})
                sums = reference.square_sums(p.detach().double(), p.grad.double(), o)
                ratio = reference.trust_ratios(sums[None], [o])[0].item()
                expected[name] = (*sums.sqrt().tolist(), ratio, o.lr * ratio)
            optimizer.step()
            stats = optimizer.layer_stats()
            assert list(stats) == list(expected)
            for name, row_of in expected.items():
                assert stats[name] == pytest.approx(row_of, rel=1e-6), name


@marked(*everywhere)
def test_layer_stats_without_names_are_by_index(backend, device):
    params = some(device=device)
    params[1].grad = None
    optimizer = LARS(params, backend=backend)
    optimizer.step()
    assert list(optimizer.layer_stats()) == [0, 2]


@marked(interpret)
@pytest.mark.parametrize("launches", [1, 2])
def test_every_table_of_a_launch_is_known_to_its_streams(launches):
    """What a stream may still read must not be freed for another: also what lies in containers."""
    params = some(count=3, n=5000)
    with internals.forced_launches(launches):
        optimizer = LARS(params, backend="triton")
        optimizer.step()
    (work,) = internals.launches(optimizer)

    def tensors_in(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from tensors_in(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from tensors_in(inner)
        elif hasattr(value, "__dict__"):
            yield from tensors_in(vars(value))

    held = [
        t for name, value in vars(work).items() if name != "schedule" for t in tensors_in(value)
    ]
    known = {t.data_ptr() for t in work.tables()}
    on_host_alone = {work.rows._fresh.data_ptr()}
    assert len([t for t in held if t.numel()]) > 10
    assert {t.data_ptr() for t in held if t.numel()} - on_host_alone <= known


@cpu
@pytest.mark.parametrize("current", [0, 1])
def test_a_capture_is_asked_of_the_devices_own_stream(current, monkeypatch):
    """Another device may be the current one."""
    from lars_fused._engine import launch

    device = [current]

    @contextlib.contextmanager
    def switched(to):
        before, device[0] = device[0], to.index
        yield
        device[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device[0] == 1)
    assert launch.capturing(torch.device("cuda", 1))
    assert not launch.capturing(torch.device("cuda", 0))
    assert not launch.capturing(torch.device("cpu"))
    assert device == [current]
