"""Which images a step takes, and how a step is divided."""

from __future__ import annotations

import pytest
import torch

from lars_fused.study.errors import StudyError
from lars_fused.study.order import Order, mixed, pieces, share, steps_for, warmup_steps
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("batch", [1, 7, 64, 99, 100])
def test_every_image_once_an_epoch_at_any_batch_size(batch: int) -> None:
    order = Order(100, batch, seed=3)
    steps = -(-300 // batch)
    tape = torch.cat([order.chosen(step) for step in range(steps)])[:300]
    assert all(len(order.chosen(step)) == batch for step in range(steps))
    for epoch in tape.split(100):
        assert torch.equal(epoch.sort().values, torch.arange(100))
    assert not torch.equal(tape[:100], tape[100:200])


def test_a_step_needs_no_earlier_one() -> None:
    forward, backward = Order(100, 30, 5), Order(100, 30, 5)
    there = [forward.chosen(step) for step in range(12)]
    back = [backward.chosen(step) for step in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert not torch.equal(Order(100, 30, 6).chosen(0), there[0])


def test_epochs_show_as_many_images_at_any_batch_size() -> None:
    for batch in (32, 256, 1024):
        assert abs(batch * steps_for(40, batch, 1297) - 40 * 1297) <= batch / 2
    assert steps_for(0.1, 1024, 1297) == 1
    assert warmup_steps(Settings(batch=100, epochs=10, warmup_epochs=2), 1000) == 20
    assert warmup_steps(Settings(batch=100, epochs=1, warmup_epochs=9), 1000) == 9  # one is left
    assert warmup_steps(Settings(batch=1000, epochs=9, warmup_epochs=0.1), 1000) == 1


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(StudyError, match="--batch 1,298 is larger than the 1,297 training images"):
        Order(1297, 1298, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [0, 1, 5, 16, 100])
def test_pieces_of_all_ranks_are_the_batch(micro: int, ranks: int) -> None:
    chosen = torch.arange(17)
    cut = pieces(chosen, micro, ranks)
    assert max(map(len, cut)) <= (micro or 17)
    assert torch.equal(torch.cat(cut), chosen)
    shares = [share(len(cut), rank, ranks) for rank in range(ranks)]
    assert [i for part in shares for i in part] == list(range(len(cut)))
    assert all(len(part) >= 1 for part in shares)


def test_random_numbers_do_not_coincide() -> None:
    seeds = {mixed(s, t, k) for s in range(20) for t in range(20) for k in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
