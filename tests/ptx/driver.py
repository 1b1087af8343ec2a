"""Triton's view of a GPU that is not there: compiles for it, launches on the machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from lars_fused._engine import launch
from tests.ptx import machine

MULTIPROCESSORS, L2_BYTES = 2, 1 << 18
_parsed: dict[str, machine.Kernel] = {}
_ROWS = dict(launch.kernels().tuning.ROWS)  # as they are launched, whatever a test makes of them


class LiveTensors:
    """Every tensor made since this began, found among the objects that the collector knows.

    What was looked at once is frozen, out of the collector's sight, so that each call looks only at
    objects that are new; the tensors among the frozen ones are remembered, weakly.
    """

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        gc.freeze()

    def buffers(self, arguments: Iterable[Any]) -> list[tuple[int, int]]:
        """Address and size of the storage of each that is alive and on the CPU."""
        found = [o for o in (*gc.get_objects(), *arguments) if issubclass(type(o), torch.Tensor)]
        gc.freeze()
        self._seen |= {id(t): weakref.ref(t) for t in found}
        alive = {key: t for key, known in self._seen.items() if (t := known()) is not None}
        self._seen = {key: self._seen[key] for key in alive}
        tensors = [
            t for t in alive.values() if t.device.type == "cpu" and t.layout == torch.strided
        ]
        storages = [t.untyped_storage() for t in tensors]
        return [(s.data_ptr(), s.nbytes()) for s in storages]


class Driver(DriverBase):
    """What Triton asks of a driver, and a record of the launches."""

    def __init__(self, capability: int = 90) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": 232_448}
        )
        self.launcher_cls = self._launcher
        self.in_memory: list[dict[Any, Any]] = [{} for _ in _kernels()]  # as triton keeps them
        self.in_launch: dict[Any, Any] = {}  # as the package keeps them
        self._loading: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Forget all but the kernels."""
        self.launches: list[str] = []
        self.compiled: list[str] = []
        self.schedule: dict[str, Any] = {}
        self._tensors = LiveTensors()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    # A kernel's PTX is known before it is loaded, and nothing else of it is needed.

    def loading(self, _module: Any, _function: Any, name: str, files: Any, *_: Any) -> None:
        (self._loading[name],) = (path for file, path in files.items() if file.endswith(".ptx"))

    def _load(self, name: str, _binary: bytes, shared: int, _device: int) -> tuple[Any, ...]:
        path = self._loading[name]
        if path not in _parsed:
            with open(path) as file:
                _parsed[path] = machine.Kernel(file.read())
        self.compiled.append(name)
        return object(), (_parsed[path], shared), 0, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Any:
        kinds = list(source.signature.values())

        def run(
            x: int, y: int, z: int, _stream: Any, function: Any, _packed: Any, _launch: Any,
            _enter: Any, _exit: Any, *args: Any,
        ) -> None:  # fmt: skip
            kernel, shared = function
            assert (y, z) == (1, 1)
            given = [a for a, kind in zip(args, kinds, strict=True) if kind != "constexpr"]
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
            scratch = [0] * (len(kernel.parameters) - len(values))
            memory = machine.Memory(self._tensors.buffers(given))
            self.launches.append(kernel.name)
            schedule = dict(self.schedule)
            if metadata.launch_cooperative_grid:
                schedule["resident"] = x
            machine.launch(kernel, x, [*values, *scratch], memory, shared, **schedule)

        return run


def _kernels() -> list[Any]:
    return [launch.function(name) for name in get_args(launch.KernelName)]


_drivers: dict[int, Driver] = {}


@contextmanager
def pretended_gpu(capability: int = 90, *, fresh: bool = False) -> Iterator[Driver]:
    """Within the block the kernels of CPU tensors are compiled for a GPU and run on the machine.

    Kernels compiled in earlier blocks are still there, unless it is to be a fresh process's GPU.
    The launch constants are those of the package.
    """
    if fresh or capability not in _drivers:
        driver = Driver(capability)
        if not fresh:
            _drivers[capability] = driver
    else:
        driver = _drivers[capability]
        driver.begin()
    real = launch.run
    before = triton.runtime.driver.active if triton.runtime.driver._active else None

    def run(name: str, grid: int, args: Any, dtypes: Any, row: Any, device: Any) -> None:
        real(name, grid, args, dtypes, row, torch.device("cuda", 0))

    def architecture(device: torch.device) -> tuple[str, int, int]:
        return f"sm_{capability}", MULTIPROCESSORS, L2_BYTES

    triton.runtime.driver.set_active(driver)
    outside = [dict(kernel.device_caches) for kernel in _kernels()]
    _keep(driver.in_memory)
    try:
        with (
            mock.patch.object(launch, "why_not", return_value=None),
            mock.patch.object(launch, "architecture", architecture),
            mock.patch.object(launch, "run", run),
            mock.patch.object(launch, "_COMPILED", driver.in_launch),
            mock.patch.dict(launch.kernels().tuning.ROWS, _ROWS),
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
            mock.patch.object(triton.knobs.runtime, "kernel_load_start_hook", driver.loading),
        ):
            yield driver
    finally:
        gc.unfreeze()
        triton.runtime.driver._active = before
        driver.in_memory = [dict(kernel.device_caches) for kernel in _kernels()]
        _keep(outside)


def _keep(caches: list[dict[Any, Any]]) -> None:
    """Let triton have these compiled kernels and no others: launchers belong to one driver."""
    for kernel, cache in zip(_kernels(), caches, strict=True):
        kernel.device_caches.clear()
        kernel.device_caches.update(cache)
