"""LARS under the Trainer of Hugging Face transformers: `optimizers=`, accumulation, resume.

python examples/clients/transformers_trainer.py
"""

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lars_fused import LARS, WarmupPolynomialLR, param_groups


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4))

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1280, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def fit(folder, steps=20, stop_after=None, resume=False, accumulation=2, **arguments):
    """Train for `steps` steps, or save at `stop_after`; the losses and the trainer."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = LARS(param_groups(model, 1e-4), lr=0.5, trust_coefficient=0.02)
    scheduler = WarmupPolynomialLR(optimizer, warmup_steps=5, total_steps=steps)
    last = stop_after or steps
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=last,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,  # LARS normalises each layer itself
            save_steps=last,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=data(),
        # With optimizer_cls_and_kwargs the Trainer makes the groups, and knows no `adapt`.
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, trainer = fit(folder)
    print(f"loss {losses[0]} -> {losses[-1]}")
    for name, layer in trainer.optimizer.optimizer.layer_stats().items():  # behind accelerate's
        print(f"{name:16} trust ratio {layer.trust_ratio:.2e}  lr {layer.effective_lr:.2e}")
