"""LARS under Lightning Fabric: mixed precision, clipping by norm, checkpoint and resume.

python examples/clients/lightning_fabric.py
"""

import torch
from lightning.fabric import Fabric
from torch import nn

from lars_fused import LARS, WarmupPolynomialLR, param_groups


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    task = torch.randn(16, 4, generator=generator)
    for _ in range(steps):
        inputs = torch.randn(64, 16, generator=generator)
        yield inputs, (inputs @ task).argmax(1)


def train(steps=20, total_steps=20, checkpoint=None, resume=False, max_norm=1.0, **fabric_options):
    fabric = Fabric(**fabric_options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
    model, optimizer = fabric.setup(
        model, LARS(param_groups(model, 1e-4), lr=0.5, trust_coefficient=0.02)
    )
    scheduler = WarmupPolynomialLR(optimizer.optimizer, warmup_steps=5, total_steps=total_steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    if resume:
        fabric.load(checkpoint, state)
    losses = []
    for step, (inputs, labels) in enumerate(batches(steps)):
        if step < state["step"]:
            continue
        inputs, labels = inputs.to(fabric.device), labels.to(fabric.device)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        optimizer.step()
        scheduler.step()
        state["step"] = step + 1
        losses.append(float(loss.detach()))
    if checkpoint is not None and not resume:
        fabric.save(checkpoint, state)
    return losses, optimizer


if __name__ == "__main__":
    losses, optimizer = train(precision="bf16-mixed")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, layer in optimizer.optimizer.layer_stats().items():  # behind Fabric's wrapper
        print(f"{name:16} trust ratio {layer.trust_ratio:.2e}  lr {layer.effective_lr:.2e}")
