"""LARS under Lightning's Trainer: groups, warm-up, clipping by norm, mixed precision, resume.

python examples/clients/lightning_trainer.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lars_fused import LARS, WarmupPolynomialLR, param_groups


class Classifier(lightning.LightningModule):
    def __init__(self, total_steps=20):
        super().__init__()
        self.total_steps = total_steps
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))
        self.losses = []

    def training_step(self, batch, _):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = LARS(param_groups(self, 1e-4), lr=0.5, trust_coefficient=0.02)
        scheduler = WarmupPolynomialLR(optimizer, warmup_steps=5, total_steps=self.total_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]  # not once an epoch


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(640, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(inputs, labels), batch_size=64)


def fit(epochs=2, total_steps=20, resume_from=None, **trainer_options):
    """Train for epochs of 10 steps; the losses and the trainer, which saves checkpoints."""
    torch.manual_seed(0)
    model = Classifier(total_steps)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(model, loader(), ckpt_path=resume_from, weights_only=True)
    return model.losses, trainer


if __name__ == "__main__":
    losses, trainer = fit(precision="bf16-mixed", gradient_clip_val=1.0)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, layer in trainer.optimizers[0].layer_stats().items():
        print(f"{name:16} trust ratio {layer.trust_ratio:.2e}  lr {layer.effective_lr:.2e}")
