"""What a captured graph owns: tables that outlive the step which they were made for."""

import gc
import weakref

import pytest
import torch

from lars_fused._engine.graph_pool import GraphPool
from lars_fused._engine.tensors import StepTensors

pytestmark = pytest.mark.cpu


class Step:
    """Stands for a prepared step, and for its tables: anything that can be dropped."""


def taken():
    """A pool whose tables were taken by a step that is gone, and what it held, weakly."""
    pool, step, tables = GraphPool(), Step(), Step()
    weight, gradient = torch.ones(2), torch.ones(2)
    pool.reserve(step, lambda: [tables])
    pool.take(step, StepTensors([weight], [gradient], [None], [None], False))
    with pytest.raises(RuntimeError, match="used up"):
        pool.take(step, StepTensors([], [], [], [], False))
    return pool, *map(weakref.ref, (step, tables, weight, gradient))


def test_tables_and_tensors_of_a_capture_outlive_its_step():
    pool, step, tables, weight, gradient = taken()
    gc.collect()
    assert step() is None
    assert tables() is not None
    assert weight() is not None
    assert gradient() is None, "gradients belong to the caller"
    del pool
    gc.collect()
    assert tables() is None
    assert weight() is None
