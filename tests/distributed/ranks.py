"""Process groups that outlive a test: starting processes takes seconds, a check milliseconds."""

import contextlib
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from unittest.mock import patch

from tests.processes import CONTEXT

START_LIMIT = 90  # seconds; the machine may be busy
GROUP_TIMEOUT = 60


class Ranks:
    """`size` processes in one group on this machine: gloo, or NCCL with a GPU each.

    `run(check, ...)` calls `check(rank, size, ...)` on all of them and gives what each returned. A
    check that fails or hangs fails the test, and the next one gets new processes.
    """

    def __init__(self, size, backend="gloo"):
        self.size, self.backend = size, backend
        self._processes = []

    def _start(self):
        # A fork may use a GPU if its parent has not, but nothing here depends on that.
        context = multiprocessing.get_context("spawn") if self.backend == "nccl" else CONTEXT
        meeting = os.path.join(tempfile.mkdtemp(prefix="ranks"), "meeting")
        self._pipes = []
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.size, self.backend, theirs, meeting),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def run(self, check, *args, limit=60):
        if not self._processes:
            self._start()
            limit += START_LIMIT
        for pipe in self._pipes:
            pipe.send((check, args))
        return self._answers(limit)

    def _answers(self, limit):
        found, failed = {}, {}
        end = time.monotonic() + limit
        while len(found) + len(failed) < self.size and time.monotonic() < end:
            for rank, pipe in enumerate(self._pipes):
                if rank in found or rank in failed or not pipe.poll(0.002):
                    continue
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, f"ended with status {self._processes[rank].exitcode}"
                (found if good else failed)[rank] = value
            if failed:  # the others may wait for the one that failed
                end = min(end, time.monotonic() + 2)
        if failed or len(found) < self.size:
            self.stop()
            silent = sorted({*range(self.size)} - {*found} - {*failed})
            text = "".join(f"\nrank {rank}: {why}" for rank, why in sorted(failed.items()))
            raise AssertionError(f"ranks without an answer: {silent}{text}")
        return [found[rank] for rank in range(self.size)]


def _serve(rank, size, backend, pipe, meeting):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import quicken

        quicken()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    limit = datetime.timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit
    )
    while True:
        try:
            check, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = True, check(rank, size, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


# Whoever drops the last reference to a gloo group joins its threads. A DDP model that is freed
# after the group was left does so holding the interpreter, for which such a thread may wait: both
# hang (pytorch#56297). A thread in a hook's callback would join itself, which ends the process. So
# groups are kept.
_KEPT = []


@contextlib.contextmanager
def group_of_one():
    """A group whose only rank is this process."""
    import torch.distributed as dist

    with patch.object(sys, "excepthook", sys.excepthook):  # which torch wraps once for each group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        _KEPT.append(dist.group.WORLD)
        try:
            yield
        finally:
            dist.destroy_process_group()


def raised(kind, call):
    """The text of the error that a call raises; the check fails if it raises none."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def same_bits(tensors):
    """Whether all ranks hold bitwise the same tensors."""
    import torch
    import torch.distributed as dist

    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    other = flat.clone()
    dist.broadcast(other, 0)
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, bool(torch.equal(flat, other)))
    return all(answers)
