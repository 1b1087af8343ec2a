"""The origin of a figure: commit, machine, versions, and its results folder."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pytest-benchmark", "matplotlib", "timm", "jax",
    "jaxlib", "optax", "apex",
)  # fmt: skip
# Set where the commit cannot be asked for, as in a copy of the tree without its history.
SHA_VARIABLE = "LARS_FUSED_SHA"
_SMI = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> tuple[str, bool]:
    """The commit, "none" without one, and whether the tree differs from it outside of results."""
    stated = os.environ.get(SHA_VARIABLE, "")
    if stated:
        return stated.removesuffix("-dirty"), stated.endswith("-dirty")
    sha = _output("git", "rev-parse", "--short=10", "HEAD")
    if not sha:
        return "none", True
    return sha, bool(_output("git", "status", "--porcelain", "--", ".", ":!bench/results"))


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def gpu_name() -> str:
    """The driver's name for the GPU; cpu without one."""
    import torch  # here, for it takes seconds, and a note needs none

    if not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name()).removeprefix("NVIDIA ")


def driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def folder(parent: Path = RESULTS) -> Path:
    """<date>-<gpu or cpu>-<sha>[-dirty]."""
    sha, dirty = commit()
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")
    return parent / f"{now()[:10]}-{gpu}-{sha}{'-dirty' if dirty else ''}"


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def facts(command: str) -> dict[str, Any]:
    """The contents of environment.json."""
    import torch

    sha, dirty = commit()
    found: dict[str, Any] = {
        "command": command,
        "utc": now(),
        "sha": sha,
        "dirty": dirty,
        "gpu": gpu_name(),
        "driver": driver(),
        "nvidia-smi": _output("nvidia-smi", f"--query-gpu={_SMI}", "--format=csv"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "packages": {name: version(name) for name in PACKAGES if version(name)},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = getattr(properties, "L2_cache_size", 0)
    return found


def unquotable_tree() -> str | None:
    """Why nothing measured from this tree could be quoted; None if it could."""
    sha, dirty = commit()
    if sha == "none":
        return f"no commit is known: there is no history here and {SHA_VARIABLE} is not set"
    return f"the tree differs from its commit {sha}" if dirty else None


def read(path: Path) -> dict[str, Any]:
    """environment.json of a results folder; empty where there is none."""
    file = path / "environment.json"
    return json.loads(file.read_text()) if file.exists() else {}


def note(path: Path, **entries: Any) -> None:
    """Add to environment.json. Dicts are merged."""
    found = read(path)
    for key, value in entries.items():
        if isinstance(value, dict):
            value = {**found.get(key, {}), **value}
        found[key] = value
    write(path, found)


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace environment.json atomically: a killed run leaves the old file or the new one."""
    path.mkdir(parents=True, exist_ok=True)
    new = path / f"environment.json.{os.getpid()}"
    new.write_text(json.dumps(found, indent=2) + "\n")
    new.replace(path / "environment.json")


def note_status(path: Path, name: str, status: int) -> None:
    """Note how a part of a run ended. Once it has failed, later success does not hide that."""
    before = read(path).get(name, {}).get("exit status", 0)
    note(path, **{name: {"exit status": status or before}})


def reportable(path: Path) -> str | None:
    """Why figures of a folder may not be quoted; None if they may."""
    found = read(path)
    if "sha" not in found:
        return "no environment.json says where it comes from"
    if found.get("dirty", True):
        return "it was measured from a tree with changes that no commit holds"
    if found.get("gate"):
        return "the correctness gate failed"
    tests = found.get("tests") or {}
    if tests.get("exit status", 0) != 0:
        return "the tests of its commit failed"
    if not tests and found.get("gpu", "cpu") != "cpu":  # CI runs those of a CPU
        return "the tests of its commit were not run on this GPU"
    if any(verdict.startswith("errors") for verdict in found.get("sanitizer", {}).values()):
        return "compute-sanitizer found errors"
    return None
