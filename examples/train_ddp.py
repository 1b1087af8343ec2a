"""Train on many devices with large batches: DDP, LARS, warm-up and polynomial decay.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py            # digits, on a CPU too
    torchrun --nproc-per-node 8 examples/train_ddp.py --data /imagenet --global-batch 8192 \
        --epochs 90 --micro-batch 128 --checkpoint run.pt

`--data` is a folder with `train/<class>/<image>` and `val/<class>/<image>`; without it the
handwritten digits of scikit-learn are used. A run that was stopped resumes from `--checkpoint`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from images import ImageFolder, resnet50
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lars_fused import LARS, WarmupPolynomialLR, param_groups, scaled_lr
from lars_fused.distributed import NoiseScale, check_same_on_all_ranks, overlap_with_backward
from lars_fused.study import digits


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="image folder with train/ and val/; default: digits")
    add("--image-size", type=int, default=224, help="pixels a side (224)")
    add("--epochs", type=int, default=30)
    add("--global-batch", type=int, default=256, help="images a step, over all ranks (256)")
    add("--micro-batch", type=int, default=64, help="images that a device takes at a time (64)")
    add("--lr", type=float, default=1.0, help="learning rate at batch 256, scaled linearly (1)")
    add("--trust", type=float, default=0.005, help="trust coefficient (0.005)")
    add("--weight-decay", type=float, default=5e-4)
    add("--warmup-epochs", type=float, default=5)
    add("--checkpoint", type=Path, help="file written after every epoch, and resumed from")
    add("--stop-after", type=int, help="stop after this many steps in all, as if interrupted")
    add("--overlap", action="store_true", help="take the steps inside the backward pass")
    add("--no-bf16", action="store_true", help="no bfloat16 autocast")
    add("--workers", type=int, default=0, help="processes that read images, for each rank (0)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Data:
    """The data, and each rank's share of it."""

    def __init__(self, args: argparse.Namespace):
        self.train: Dataset[tuple[Tensor, int]]
        self.test: Dataset[tuple[Tensor, int]]
        if args.data is None:
            every = digits.load()
            self.train = TensorDataset(every.train_images, every.train_labels)
            self.test = TensorDataset(every.test_images, every.test_labels)
            self.network: nn.Module = digits.small_alexnet_bn()
        else:
            self.train = ImageFolder(args.data / "train", args.image_size, training=True)
            self.test = ImageFolder(args.data / "val", args.image_size, training=False)
            self.network = resnet50(self.train.classes)
        self.args, self.rank, self.ranks = args, dist.get_rank(), dist.get_world_size()
        self.steps = len(self.train) // args.global_batch  # per epoch, without the remainder
        if self.steps == 0:
            raise SystemExit(f"--global-batch must be at most {len(self.train)}, the images")
        if args.global_batch < 2 * self.ranks * self.pieces:  # batch normalisation needs two
            raise SystemExit("--global-batch and --micro-batch must leave two images to each rank")

    def order(self, epoch: int, first_step: int) -> Iterator[list[int]]:
        """This rank's micro-batches, step by step; resuming reproduces them exactly."""
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        shuffled = torch.randperm(len(self.train), generator=generator)
        for step in range(first_step, self.steps):
            batch = shuffled[step * self.args.global_batch :][: self.args.global_batch]
            # Shares of ranks and of micro-batches may differ by one image: any batch size works.
            mine = batch.tensor_split(self.ranks)[self.rank]
            yield from (piece.tolist() for piece in mine.tensor_split(self.pieces))

    @property
    def pieces(self) -> int:
        """Micro-batches per step: the same on every rank."""
        most = -(-self.args.global_batch // self.ranks)
        return -(-most // self.args.micro_batch)

    def training(self, epoch: int, first_step: int) -> DataLoader[tuple[Tensor, Tensor]]:
        order = list(self.order(epoch, first_step))
        workers = self.args.workers
        return DataLoader(
            self.train,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    def testing(self) -> DataLoader[tuple[Tensor, Tensor]]:
        mine = list(range(len(self.test)))[self.rank :: self.ranks]
        batch = self.args.micro_batch
        order = [mine[at : at + batch] for at in range(0, len(mine), batch)]
        return DataLoader(self.test, batch_sampler=order, num_workers=self.args.workers)


class Clock:
    """Times a step and the optimizer within it, on the device if there is one."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Trainer:
    """One training run: model, optimizer, schedule, and the state in a checkpoint."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(args.seed)
        self.args, self.device, self.data = args, device, Data(args)
        network = self.data.network.to(device, memory_format=torch.channels_last)
        self.model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        lr = scaled_lr(args.lr, args.global_batch)
        groups = param_groups(network, args.weight_decay)
        self.optimizer = LARS(groups, lr, trust_coefficient=args.trust)
        check_same_on_all_ranks(self.optimizer)
        self.total = args.epochs * self.data.steps
        warmup = min(round(args.warmup_epochs * self.data.steps), self.total - 1)
        self.schedule = WarmupPolynomialLR(
            self.optimizer, warmup_steps=warmup, total_steps=self.total, warmup_start_factor=0.1
        )
        # An average, since ranks may differ by one image.
        self.noise = NoiseScale(max(1, args.global_batch // self.data.ranks), decay=0.95)
        self.step = 0
        self.resume()
        if args.overlap:
            overlap_with_backward(self.model, self.optimizer, noise_scale=self.noise)
        elif self.data.ranks > 1:
            self.noise.attach(self.model)
        self.clock = Clock(device)

    # -------------------------------------------------------------------- checkpoints

    def resume(self) -> None:
        path = self.args.checkpoint
        if path is not None and path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.model.module.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.noise.load_state_dict(saved["noise"])
            self.step = saved["step"]
            self.say(f"resumed {path} at step {self.step}")

    def save(self) -> None:
        path = self.args.checkpoint
        if path is not None and self.data.rank == 0:
            parts = {
                "model": self.model.module,
                "optimizer": self.optimizer,
                "schedule": self.schedule,
                "noise": self.noise,
            }
            saved = {name: part.state_dict() for name, part in parts.items()}
            beside = path.with_suffix(".new")
            torch.save({**saved, "step": self.step}, beside)
            os.replace(beside, path)  # the old file stays complete until the new one is

    # ----------------------------------------------------------------------- training

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """This micro-batch's share of the global mean, times the ranks, since DDP divides."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        bf16 = not self.args.no_bf16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(images)
        total = F.cross_entropy(output.float(), labels, reduction="sum")
        return total * (self.data.ranks / self.args.global_batch)

    def take_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> str:
        """Take one step over all micro-batches and log it."""
        # Dropout depends only on the step, so that a resumed run repeats it.
        torch.manual_seed((self.args.seed + self.step) * self.data.ranks + self.data.rank)
        began = self.clock.now()
        loss = torch.zeros((), device=self.device)
        for piece in range(self.data.pieces):
            last = piece == self.data.pieces - 1
            self.model.require_backward_grad_sync = last  # what no_sync() sets
            part = self.loss(*next(batches))
            part.backward()
            loss += part.detach()
        if self.data.ranks > 1:
            self.noise.update()
        before = self.clock.now()
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        after = self.clock.now()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        dist.all_reduce(loss)
        end = self.clock.now()
        whole = self.clock.seconds(began, end)
        share = self.clock.seconds(before, after) / whole
        return (
            f"step {self.step}/{self.total} loss {float(loss) / self.data.ranks:.4f} lr {lr:.4f} "
            f"{1000 * whole:.1f} ms optimizer {100 * share:.1f} % "
            f"{self.args.global_batch / whole:.0f} images/s noise scale {self.noise.value:.0f}"
        )

    def run(self) -> None:
        from tqdm import tqdm

        quiet = self.data.rank != 0 or not sys.stderr.isatty()
        stop = min(self.total, self.args.stop_after or self.total)
        with tqdm(total=self.total, initial=self.step, unit="step", disable=quiet) as bar:
            while self.step < stop:
                epoch, done = divmod(self.step, self.data.steps)
                batches = iter(self.data.training(epoch, done))
                for _ in range(done, self.data.steps):
                    line = self.take_step(batches)
                    self.say(line, bar)
                    bar.update()
                    if self.step == stop:
                        break
                self.save()
                self.say(f"epoch {epoch + 1}: test accuracy {100 * self.accuracy():.2f} %", bar)

    @torch.no_grad()
    def accuracy(self) -> float:
        # Not through DDP, which would wait for ranks that have one batch fewer.
        network = self.model.module.eval()
        for buffer in network.buffers():  # running means: those of the checkpoint
            dist.broadcast(buffer, 0)
        right = torch.zeros(2, device=self.device)
        for images, labels in self.data.testing():
            found = network(images.to(self.device)).argmax(1)
            right += torch.tensor([(found == labels.to(self.device)).sum(), len(labels)]).to(right)
        network.train()
        dist.all_reduce(right)
        return float(right[0] / right[1])

    def say(self, line: str, bar: object = None) -> None:
        if self.data.rank == 0:
            getattr(bar, "write", print)(line)
            sys.stdout.flush()


def main() -> None:
    args = options()
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        Trainer(args, device).run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
