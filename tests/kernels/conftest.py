"""Machine code is read once: disassembling takes most of the codegen tier's time."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.conftest import running_tier


@pytest.fixture(autouse=True, scope="session")
def _kept_disassembly(pytestconfig: pytest.Config):
    """What a tool printed of a cubin, kept beside triton's own cache of the cubins themselves.

    The name of an entry is the hash of the tool, its options and the cubin: another compiler,
    kernel or tool makes another.
    """
    if running_tier(pytestconfig) != "cpu" or "codegen" not in pytestconfig.getoption("markexpr"):
        yield
        return
    import triton

    from bench import codegen

    folder = Path(triton.knobs.cache.dir) / "disassembly"
    real = codegen._output

    def output(*command: str) -> str:
        *options, file = command
        key = hashlib.sha256(repr([triton.__version__, *options]).encode())
        key.update(Path(file).read_bytes())
        kept = folder / key.hexdigest()
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_text(real(*command), encoding="utf-8")
            part.replace(kept)
        return kept.read_text(encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen, "_output", output)
        yield
