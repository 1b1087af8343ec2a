"""The examples of examples/clients: 20 steps in each framework, and resumed half-way.

Each needs a framework that `make test` does not install; where it is missing the test is skipped
and says so. docs/clients.md names the versions that they were run with.
"""

import importlib
import importlib.util
import warnings

import pytest
import torch

pytestmark = pytest.mark.cpu


@pytest.fixture
def example(monkeypatch):
    """An example by its file's name, if the framework that it shows is installed."""

    def load(name, package):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"skipped: {package} is not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the frameworks' own
            try:
                importlib.import_module(package)
            except ImportError as error:
                pytest.skip(f"skipped: {package} is installed without what it needs: {error}")
        return importlib.import_module(f"examples.clients.{name}")

    return load


def check(losses, steps=20):
    assert len(losses) == steps
    # The last fifth is well below the first step: it learns, by more than the noise of a batch.
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0], losses


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_trainer(example, precision, tmp_path):
    fit = example("lightning_trainer", "lightning").fit
    # A loss far below it is clipped at every step, so a clip that does nothing would show.
    options = {"accelerator": "cpu", "gradient_clip_val": 1e-3}

    def run(**more):
        how = {"precision": precision}
        if precision == "16-mixed":  # by itself Lightning allows it on a GPU only
            from lightning.pytorch.plugins.precision import MixedPrecision

            how = {"plugins": [MixedPrecision(precision, "cpu", scaler())]}
        return fit(**options, **how, **more)

    losses, trainer = run()
    check(losses)
    stats = trainer.optimizers[0].layer_stats()
    total = sum(layer.gradient_norm**2 for layer in stats.values()) ** 0.5
    assert total == pytest.approx(1e-3, rel=1e-2)
    first, half = run(epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second, _ = run(resume_from=tmp_path / "half.ckpt")
    assert first + second == losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_fabric(example, precision, tmp_path):
    train = example("lightning_fabric", "lightning").train

    def run(**more):
        how = {"precision": precision}
        if precision == "16-mixed":
            from lightning.fabric.plugins import MixedPrecision

            how = {"plugins": [MixedPrecision(precision, "cpu", scaler())]}
        return train(accelerator="cpu", **how, **more)

    losses, optimizer = run(max_norm=1e-3)
    check(losses)
    norms = [layer.gradient_norm for layer in optimizer.optimizer.layer_stats().values()]
    assert sum(n * n for n in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
    whole, _ = run()
    first, _ = run(steps=10, checkpoint=tmp_path / "half.ckpt")
    second, _ = run(checkpoint=tmp_path / "half.ckpt", resume=True)
    assert first + second == whole


def test_transformers_trainer(example, tmp_path):
    fit = example("transformers_trainer", "transformers").fit
    losses, trainer = fit(str(tmp_path / "whole"), use_cpu=True)
    check(losses)
    stats = trainer.optimizer.optimizer.layer_stats()
    assert stats["net.3.weight"].trust_ratio != 1.0
    assert stats["net.3.bias"].trust_ratio == 1.0
    fit(str(tmp_path / "half"), stop_after=10, use_cpu=True)
    resumed, _ = fit(str(tmp_path / "half"), resume=True, use_cpu=True)
    assert resumed == losses


def test_accelerate(example, tmp_path):
    train = example("accelerate_loop", "accelerate").train
    losses, optimizer = train(cpu=True)
    check(losses)
    assert optimizer.optimizer.layer_stats()["3.bias"].trust_ratio == 1.0
    first, _ = train(steps=10, folder=str(tmp_path), cpu=True)
    second, _ = train(folder=str(tmp_path), resume=True, cpu=True)
    assert first + second == losses


def test_timm(example):
    module = example("timm_schedule", "timm")
    losses, _ = module.train()
    check(losses)
    first, state = module.train(steps=10)
    second, _ = module.train(state=state)
    assert first + second == losses
    _, optimizer, scheduler = module.make(20)
    scheduler.step_update(5)
    for group in optimizer.param_groups:
        assert group["adapt"] == all(p.ndim > 1 for p in group["params"])
        assert group["lr"] / group["lr_scale"] == pytest.approx(optimizer.param_groups[-1]["lr"])


def test_distributed_checkpoint(example, tmp_path):
    module = example("distributed_checkpoint", "torch.distributed.checkpoint")
    whole = module.make(20)
    losses = module.train(*whole, steps=20)
    check(losses)
    half = module.make(20)
    first = module.train(*half, steps=10)
    module.save(tmp_path, *half)
    resumed = module.make(20)
    module.load(tmp_path, *resumed)
    assert first + module.train(*resumed, steps=20) == losses
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_mmengine(example):
    module = example("mmengine_wrapper", "mmengine")
    whole = module.make()
    losses = module.train(*whole)
    check(losses)
    adapted, left_out = whole[1].optimizer.param_groups
    assert (adapted["adapt"], left_out["adapt"], left_out["weight_decay"]) == (True, False, 0.0)
    half = module.make()
    first = module.train(*half, steps=10)
    resumed = module.make()
    for a, b in zip(half, resumed, strict=True):
        b.load_state_dict(a.state_dict())
    assert first + module.train(*resumed) == losses
