"""A GPU that is not there, as far as CUDA graphs go: CPU memory, kernels in the interpreter.

Within `emulated_gpu()` a tensor made on "cuda" is CPU memory that says otherwise, a launch runs in
Triton's interpreter, and a capture records launches and copies instead of doing them, as CUDA does;
`replay` then does them. What CUDA refuses during a capture is refused: to wait for the device, to
take pinned memory. After that the capture cannot end, and its stream stays current, as in torch.

Real memory, real kernels, the real package: what a captured step reads when it is replayed is what
it would read on a GPU. Not emulated: asynchrony, the caching allocator, torch's own kernels in a
capture (an error here).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lars_fused._engine import launch

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_FLAGS: dict[Any, Callable[[bool], Any]] = {
    Tensor.device.__get__: lambda on_gpu: GPU if on_gpu else _CPU,
    Tensor.is_cuda.__get__: lambda on_gpu: on_gpu,
    Tensor.is_cpu.__get__: lambda on_gpu: not on_gpu,
}
_WAITS = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__,
    Tensor.__int__, torch.equal, Tensor.nonzero,
}  # fmt: skip
# What does nothing on the device: memory, views, metadata.
_FREE = {
    torch.empty, torch.empty_like, Tensor.detach, Tensor.view, Tensor.__getitem__, Tensor.numel,
    Tensor.data_ptr, Tensor.stride, Tensor.size, Tensor.dim, Tensor.is_contiguous, Tensor.to,
    Tensor.is_inference, Tensor.element_size, Tensor.storage_offset, Tensor.is_complex,
    Tensor.is_floating_point, Tensor.untyped_storage, Tensor.is_set_to, Tensor.__len__,
    Tensor.__hash__,
}  # fmt: skip


class OnGpu(Tensor):
    """CPU memory that is taken for a GPU's."""

    def record_stream(self, stream: Any) -> None:
        """Torch's own takes none but real streams."""
        stream.told_of.add(self.data_ptr())


def _is_gpu(value: Any) -> bool | None:
    """Whether an argument names a GPU; None where it names no device."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"):
        return value.startswith("cuda")
    return None


class Stream:
    """Stands in for torch.cuda.Stream: nothing runs late, and what it is told is kept."""

    def __init__(self, *_: Any) -> None:
        self.waited_for: list[Stream] = []
        self.told_of: set[int] = set()  # addresses of memory that it uses
        self.synchronize = lambda: None
        self.wait_stream = self.waited_for.append


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] = []
        self.broken: str | None = None

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for do in self.recorded:
                do()


class Gpu(TorchFunctionMode):
    """The mode that makes "cuda" mean `OnGpu`; holds the capture in progress and the streams."""

    def __init__(self) -> None:
        super().__init__()
        self.capture: Graph | None = None
        self.streams = [Stream()]
        self.launches: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(leaf, OnGpu) for leaf in leaves)
        if func in _FLAGS:
            return _FLAGS[func](on_gpu)
        pinned = bool(kwargs.pop("pin_memory", False)) or func is Tensor.pin_memory
        if self.capture is not None:
            recorded = self._captured(self.capture, func, args, on_gpu, pinned)
            if recorded is not None:
                return recorded
        named = [gpu for gpu in map(_is_gpu, leaves) if gpu is not None]
        if named or func is Tensor.cpu:
            args, kwargs = tree_map(lambda a: a if _is_gpu(a) is None else _CPU, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, torch.Size):  # which tree_map would turn into a tuple
            return result
        wanted = named[-1] if named else on_gpu and func is not Tensor.cpu
        return tree_map(lambda r: _placed(r, wanted) if isinstance(r, Tensor) else r, result)

    def _captured(self, graph: Graph, func: Any, args: Any, on_gpu: bool, pinned: bool) -> Any:
        """Record an operation; None where it does nothing on the device."""
        if pinned or (on_gpu and func in _WAITS):
            graph.broken = f"{func.__name__}: operation not permitted when stream is capturing"
            raise RuntimeError(graph.broken)
        if on_gpu and func is Tensor.copy_:
            target, source = args[:2]
            graph.recorded.append(lambda: target.copy_(source))
            return target
        if on_gpu and func not in _FREE and not getattr(func, "__name__", "") == "__get__":
            raise NotImplementedError(f"{func} in an emulated capture")
        return None

    def launched(self, name: str, do: Callable[[], object]) -> None:
        self.launches.append(name)
        if self.capture is not None:
            self.capture.recorded.append(do)
        else:
            do()


def _placed(t: Tensor, on_gpu: bool) -> Tensor:
    if isinstance(t, OnGpu) == on_gpu:
        return t
    if on_gpu:
        return t.as_subclass(OnGpu)
    return t.detach().clone().as_subclass(Tensor)


@contextmanager
def _current(gpu: Gpu, stream: Any) -> Iterator[None]:
    gpu.streams.append(stream)
    try:
        yield
    finally:
        gpu.streams.pop()


@contextmanager
def _capturing(gpu: Gpu, graph: Graph) -> Iterator[None]:
    gpu.streams.append(Stream())
    gpu.capture = graph
    try:
        yield
    finally:
        gpu.capture = None
        if graph.broken:  # the stream is not given back: torch.cuda.graph.__exit__
            raise RuntimeError(f"capture_end: {graph.broken}")
        gpu.streams.pop()


def _interpreted(gpu: Gpu, run: Callable[..., None]) -> Callable[..., None]:
    """`launch.run` for both devices: in the interpreter, now or when a graph is replayed."""
    signature = inspect.signature(run)

    def emulated(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named)
        if bound.arguments["device"].type != "cuda":
            run(*given, **named)
            return
        bound.arguments["device"] = _CPU
        with torch._C.DisableTorchFunction():
            bound.arguments["args"] = [
                a.as_subclass(Tensor) if isinstance(a, Tensor) else a
                for a in bound.arguments["args"]
            ]

        def do() -> None:
            with torch._C.DisableTorchFunction():
                run(*bound.args, **bound.kwargs)

        gpu.launched(bound.arguments["name"], do)

    return emulated


@contextmanager
def emulated_gpu() -> Iterator[Gpu]:
    """Within the block, "cuda" is emulated. Needs TRITON_INTERPRET=1."""
    gpu = Gpu()
    in_interpreter = launch.architecture(_CPU)
    why_not = launch.why_not
    replaced: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": lambda graph: _capturing(gpu, graph),
        "Stream": Stream,
        "stream": lambda stream: _current(gpu, stream),
        "current_stream": lambda *_: gpu.streams[-1],
        "set_stream": lambda stream: gpu.streams.__setitem__(slice(None), [stream]),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "is_current_stream_capturing": lambda: gpu.capture is not None,
    }
    with ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name, stand_in in (
            ("why_not", lambda device: why_not(_CPU)),
            ("architecture", lambda device: in_interpreter),
            ("run", _interpreted(gpu, launch.run)),
        ):
            stack.enter_context(mock.patch.object(launch, name, stand_in))
        stack.enter_context(gpu)
        yield gpu
