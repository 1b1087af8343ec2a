"""LARS in torch.distributed.checkpoint: state under parameter names, saved and resumed.

python examples/clients/distributed_checkpoint.py       also under torchrun, with sharded models
"""

import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lars_fused import LARS, WarmupPolynomialLR, param_groups


def make(total_steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
    optimizer = LARS(param_groups(model, 1e-4), lr=0.5, trust_coefficient=0.02)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=5, total_steps=total_steps)
    return model, optimizer, scheduler


def save(folder, model, optimizer, scheduler):
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "scheduler": scheduler.state_dict(),
    }
    dcp.save(state, checkpoint_id=folder)


def load(folder, model, optimizer, scheduler):
    # dcp.load fills the tensors of a state of the same form, which is what a new run has.
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "scheduler": scheduler.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def train(model, optimizer, scheduler, steps):
    generator = torch.Generator().manual_seed(0)
    task = torch.randn(16, 4, generator=generator)
    losses = []
    for step in range(steps):
        inputs = torch.randn(64, 16, generator=generator)
        if step < scheduler.last_epoch:
            continue  # done before the checkpoint
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ task).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        first = make(20)
        losses = train(*first, steps=10)
        save(folder, *first)
        second = make(20)
        load(folder, *second)
        losses += train(*second, steps=20)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
