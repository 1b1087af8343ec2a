"""Checkpoints of sharded training: on other numbers of ranks, and after a rank was killed."""

import datetime
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lars_fused import WarmupPolynomialLR
from tests.distributed import networks as nets
from tests.processes import CONTEXT

pytestmark = pytest.mark.cpu

BATCH, SAVED, END = 8, 5, 10


class Training:
    """A network, sharded where there is a process group, with its optimizer and schedule."""

    def __init__(self, sharded, master_weights=False):
        from torch.distributed.fsdp import fully_shard

        dtype = torch.bfloat16 if master_weights else torch.float64
        self.model = nets.network().to(dtype)
        if sharded:
            for layer in self.model:
                if [*layer.parameters()]:
                    fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = nets.optimizer_for(
            self.model, "torch", lr_in_momentum=False, master_weights=master_weights
        )
        self.schedule = WarmupPolynomialLR(
            self.optimizer, warmup_steps=3, total_steps=END + 1, warmup_start_factor=0.1
        )
        self.dtype = dtype

    def parts(self):
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
        }

    def save(self, folder):
        dcp.save(self.parts(), checkpoint_id=folder)

    def load(self, folder):
        parts = self.parts()
        dcp.load(parts, checkpoint_id=folder)
        set_model_state_dict(self.model, parts["model"])
        set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        return self

    def run(self, first, last, rank=0, size=1, before_step=lambda step: None):
        for step, batch in enumerate(nets.batches(END, BATCH, self.dtype)):
            if first <= step < last:
                nets.loss_of(self.model, *nets.share(batch, rank, size)).backward()
                before_step(step)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self

    def weights(self):
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.model.parameters()]
        return [p.detach().tolist() for p in whole]


def saved_and_continued(rank, size, folder, master_weights):
    training = Training(True, master_weights).run(0, SAVED, rank, size)
    training.save(folder)
    return training.run(SAVED, END, rank, size).weights()


def loaded_and_continued(rank, size, folder, master_weights):
    training = Training(True, master_weights).load(folder)
    return training.run(SAVED, END, rank, size).weights()


def assert_same_trajectory(found, expected, **tolerances):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(a, dtype=torch.float64),
            torch.tensor(b, dtype=torch.float64),
            **tolerances or nets.tolerances("torch"),
        )


# Loading in one process without a process group is what is tested.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("master_weights", [False, True])
def test_saved_on_some_ranks_loaded_on_others_and_alone(ranks, two, tmp_path, master_weights):
    folder = str(tmp_path)
    expected = ranks.run(saved_and_continued, folder, master_weights)[0]
    # The same number of ranks adds up in the same order; bfloat16 rounds gradients otherwise.
    again = ranks.run(loaded_and_continued, folder, master_weights)
    assert all(weights == expected for weights in again)
    if not master_weights:
        alone = Training(False).load(folder).run(SAVED, END).weights()
        assert_same_trajectory(alone, expected)
        for weights in two.run(loaded_and_continued, folder, master_weights):
            assert_same_trajectory(weights, expected)


def killed(rank, size, meeting, folder, limit, report):
    """Rank 1 dies in the middle of a step, where the others wait for its norms."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=limit),
    )  # fmt: skip
    training = Training(True).run(0, SAVED, rank, size)
    training.save(folder)

    def before_step(step):
        if step == SAVED + 2 and rank == 1:
            dist.all_reduce = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    try:
        training.run(SAVED, END, rank, size, before_step)
    except RuntimeError as error:
        report.send(str(error))
        os._exit(3)  # without leaving the group, which would wait for the dead rank


def test_a_killed_rank_ends_the_others_and_training_resumes_bitwise(ranks, tmp_path):
    limit = 600  # what gloo waits for; the others must have ended long before
    expected = ranks.run(saved_and_continued, str(tmp_path / "whole"), False)
    mine, theirs = CONTEXT.Pipe(duplex=False)
    meeting, folder = str(tmp_path / "meeting"), str(tmp_path / "cut")
    size = ranks.size
    processes = [
        CONTEXT.Process(target=killed, args=(rank, size, meeting, folder, limit, theirs))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [-signal.SIGKILL if rank == 1 else 3 for rank in range(size)]
    for _ in range(size - 1):
        assert mine.recv()
    assert ranks.run(loaded_and_continued, folder, False) == expected
