"""Fixtures of several files here."""

import pytest
import torch

from lars_fused._engine import sgd_kernel


@pytest.fixture
def calls(monkeypatch):
    """Every call of the SGD kernel: its tensors and options."""
    assert sgd_kernel.trusted(torch.float32)  # tried by now, not among the calls
    made, real = [], sgd_kernel.run

    def record(weights, grads, buffers, **options):
        made.append((list(weights), list(grads), list(buffers), options))
        real(weights, grads, buffers, **options)

    monkeypatch.setattr(sgd_kernel, "run", record)
    return made
