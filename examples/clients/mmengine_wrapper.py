"""LARS in mmengine: registered, built from a configuration, stepped by OptimWrapper.

python examples/clients/mmengine_wrapper.py
"""

import torch
from mmengine.optim import OPTIM_WRAPPER_CONSTRUCTORS, OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from torch import nn

from lars_fused import LARS, WarmupPolynomialLR, param_groups

OPTIMIZERS.register_module(name="FusedLARS", module=LARS, force=True)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class LARSConstructor:
    """Groups of `param_groups`: `paramwise_cfg` alone can undecay tensors, not unadapt them."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.cfg, self.exclude = optim_wrapper_cfg, (paramwise_cfg or {}).get("exclude", ())

    def __call__(self, model):
        wrapper = {**self.cfg}
        kind = wrapper.pop("type", "OptimWrapper")
        options = {**wrapper.pop("optimizer")}
        decay = options.pop("weight_decay", 0.0)
        options["params"] = param_groups(model, decay, exclude=self.exclude)
        optimizer = OPTIMIZERS.build(options)
        assert kind == "OptimWrapper", "for AmpOptimWrapper build that class here"
        return OptimWrapper(optimizer, **wrapper)


CONFIG = {
    "type": "OptimWrapper",
    "constructor": "LARSConstructor",
    "optimizer": {"type": "FusedLARS", "lr": 0.5, "trust_coefficient": 0.02, "weight_decay": 1e-4},
    "accumulative_counts": 2,
}


def make(total_steps=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
    wrapper = build_optim_wrapper(model, CONFIG)
    scheduler = WarmupPolynomialLR(wrapper.optimizer, warmup_steps=5, total_steps=total_steps)
    return model, wrapper, scheduler


def train(model, wrapper, scheduler, steps=20):
    generator = torch.Generator().manual_seed(0)
    task = torch.randn(16, 4, generator=generator)
    wrapper.initialize_count_status(model, 0, 2 * steps)
    losses = []
    for step in range(2 * steps):  # two micro-batches a step
        inputs = torch.randn(32, 16, generator=generator)
        if step < 2 * scheduler.last_epoch:
            continue  # done before the checkpoint
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(inputs), (inputs @ task).argmax(1))
        wrapper.update_params(loss)
        if step % 2:
            scheduler.step()
            losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    model, wrapper, scheduler = make()
    losses = train(model, wrapper, scheduler)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, layer in wrapper.optimizer.layer_stats().items():
        print(f"{name:16} trust ratio {layer.trust_ratio:.2e}  lr {layer.effective_lr:.2e}")
