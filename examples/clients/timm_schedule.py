"""LARS with timm's parameter groups (layer-wise lr decay) and its schedulers.

python examples/clients/timm_schedule.py
"""

import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from lars_fused import LARS, conventions


def make(steps):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
    )
    groups = param_groups_layer_decay(model, weight_decay=1e-4, layer_decay=0.75)
    for group in groups:
        # timm's own Lars adapts the groups that it decays, and no others.
        group["adapt"] = group["weight_decay"] != 0
    optimizer = LARS(groups, lr=4.0, **conventions.TIMM | {"trust_coefficient": 0.02})
    # The scheduler multiplies each group's learning rate by its `lr_scale`.
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=5, warmup_lr_init=0.01, t_in_epochs=False
    )
    return model, optimizer, scheduler


def train(steps=20, total_steps=20, state=None):
    """Train to `steps`, from a checkpoint of this function or from nothing."""
    model, optimizer, scheduler = make(total_steps)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start = state["step"]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 4  # how bright an image is
    images = torch.randn(32, 3, 32, 32, generator=generator) + labels[:, None, None, None]
    losses = []
    for step in range(start, steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        losses.append(float(loss.detach()))
    return losses, {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": steps,
    }


if __name__ == "__main__":
    losses, _ = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
