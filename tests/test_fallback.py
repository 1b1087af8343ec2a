"""A kernel that fails in the middle of a run: under "auto" the portable path takes over exactly."""

import pytest
import torch

from lars_fused import LARS, launch, stepper

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_momentum_of_earlier_steps_is_kept(failing, monkeypatch):
    real, calls = launch.run, []

    def run(*args):
        calls.append(args)
        if len(calls) > failing:
            raise RuntimeError("launch failed")
        real(*args)

    monkeypatch.setattr(stepper, "_warned", set())
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, generator=generator)
    grads = [torch.randn(3, 5, generator=generator) for _ in range(3)]
    runs = {}
    for backend in ("torch", "auto"):
        p = torch.nn.Parameter(w.clone())
        optimizer = LARS([p], 2.0, weight_decay=0.1, dampening=0.5, trust_coefficient=0.05,
                         backend=backend)  # fmt: skip
        if backend == "auto":
            monkeypatch.setattr(launch, "run", run)
        for g in grads:
            p.grad = g
            if backend == "auto" and len(calls) == failing:
                with pytest.warns(RuntimeWarning, match="kernel could not be launched"):
                    optimizer.step()
            else:
                optimizer.step()
        runs[backend] = p.detach()
    torch.testing.assert_close(runs["auto"], runs["torch"], rtol=1e-6, atol=1e-7)
