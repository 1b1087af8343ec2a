"""Where and from what a figure comes: commit, machine, versions, and the folder that holds it."""

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

import torch

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
    """As the driver has it; cpu where there is no GPU."""
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
    """What stands in environment.json."""
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


def read(path: Path) -> dict[str, Any]:
    """environment.json of a results folder; empty where there is none."""
    file = path / "environment.json"
    return json.loads(file.read_text()) if file.exists() else {}


def note(path: Path, **entries: Any) -> None:
    """Add to environment.json. A dict is merged into the one that stands there."""
    found = read(path)
    for key, value in entries.items():
        if isinstance(value, dict):
            value = {**found.get(key, {}), **value}
        found[key] = value
    path.mkdir(parents=True, exist_ok=True)
    (path / "environment.json").write_text(json.dumps(found, indent=2) + "\n")


def reportable(path: Path) -> str | None:
    """Why figures of a folder may not be quoted; None where they may."""
    found = read(path)
    if "sha" not in found:
        return "no environment.json says where it comes from"
    if found.get("dirty", True):
        return "it was measured from a tree with changes that no commit holds"
    if found.get("gate"):
        return "the correctness gate failed"
    if found.get("tests", {}).get("exit status", 0) != 0:
        return "the tests of its commit failed"
    return None
