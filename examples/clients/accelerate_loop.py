"""LARS in a loop of Hugging Face accelerate: accumulation, the scheduler, checkpoint and resume.

python examples/clients/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lars_fused import LARS, WarmupPolynomialLR, param_groups


def train(steps=20, total_steps=20, folder=None, resume=False, accumulation=2, **options):
    """Optimizer steps up to `steps`; the losses and the prepared optimizer."""
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulation,
        # Otherwise the scheduler is stepped once for each process: num_processes times too far.
        step_scheduler_with_optimizer=False,
        **options,
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32 * accumulation * total_steps, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32)
    optimizer = LARS(param_groups(model, 1e-4), lr=0.5, trust_coefficient=0.02)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=5, total_steps=total_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    done = 0
    if resume:
        accelerator.load_state(folder)
        done = scheduler.scheduler.last_epoch
    losses = []
    for inputs, labels in accelerator.skip_first_batches(loader, done * accumulation):
        if done == steps:
            break
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            done += 1
            losses.append(float(loss.detach()))
    if folder is not None and not resume:
        accelerator.save_state(folder)
    return losses, optimizer


if __name__ == "__main__":
    losses, optimizer = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, layer in optimizer.optimizer.layer_stats().items():  # behind accelerate's wrapper
        print(f"{name:16} trust ratio {layer.trust_ratio:.2e}  lr {layer.effective_lr:.2e}")
