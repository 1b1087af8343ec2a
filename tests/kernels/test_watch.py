"""A queue that is not at its start is noticed and named, without a synchronisation in the step."""

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine.queue_state import lost_epoch
from lars_fused.kernels import layout
from tests import internals

pytestmark = pytest.mark.interpret


def tables_after(steps, numels=(20_000, 5)):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in numels]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = LARS(params, backend="triton")
    for _ in range(steps):
        optimizer.step()
    (tables,) = internals.launches(optimizer)
    tables.owner = optimizer  # or the memory that the tables point to would be freed
    return tables


@pytest.mark.parametrize("launches", [1, 2])
def test_a_queue_at_its_start_is_never_reported(launches):
    with internals.forced_launches(launches):
        tables = tables_after(2)
        assert lost_epoch(tables.memory.counter, tables.memory.watch) is None
        internals.run(tables, torch.ones(1))
        assert lost_epoch(tables.memory.counter, tables.memory.watch) is None
        internals.run(tables)
        assert lost_epoch(tables.memory.counter, tables.memory.watch) is None
        assert tables.steps_taken() == 3


def test_a_queue_beyond_its_start_is_named_at_once_and_ever_after():
    tables = tables_after(1, numels=(9, 8, 7, 6, 5))  # each is one item, which waits for nobody
    tables.memory.counter.add_(2)
    assert lost_epoch(tables.memory.counter, tables.memory.watch) == 2, "before the launch"
    internals.run(tables)  # hands its first two items to nobody
    assert tables.memory.counter.item() == 3 << 32, (
        "and resets the queue, so that nothing shows there"
    )
    assert lost_epoch(tables.memory.counter, tables.memory.watch) == 2
    internals.run(tables)
    internals.run(tables)
    assert lost_epoch(tables.memory.counter, tables.memory.watch) == 2


def test_programs_that_disagreed_on_found_inf_are_noticed():
    """A step ends as skipped whose ticket 0 was taken, while others still draw tickets."""
    tables = tables_after(1, numels=(9, 8, 7, 6, 5))
    tables.memory.watch[layout.LAST_EPOCH] = 2  # by the program that held ticket 0
    internals.run(tables, torch.ones(1))  # the others see the flag
    tables.memory.counter.add_(4)
    internals.run(tables)  # its last item is all that it does, and its epoch follows the one before
    assert tables.memory.counter.item() == 3 << 32
    assert lost_epoch(tables.memory.counter, tables.memory.watch) == 2


def test_a_ticket_after_the_last_is_noticed():
    tables = tables_after(1, numels=(9, 8, 7, 6, 5))
    tables.memory.counter.add_(5 + tables.programs)
    internals.run(tables)
    assert tables.memory.watch[layout.LOST_EPOCH] == 2


def test_the_optimizer_says_so_where_it_waits_for_the_device_anyway():
    tables = tables_after(1, numels=(9, 8, 7, 6, 5))
    optimizer = tables.owner
    optimizer.layer_stats()
    tables.memory.counter.add_(2)
    internals.run(tables)
    with pytest.raises(RuntimeError, match=r"LARS: step 2 of 2 found its work queue not at the st"):
        optimizer.layer_stats()
