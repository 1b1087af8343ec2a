"""Mini-batch against full gradient: distances, cache, orders of images, pruning, command."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("skimage", reason="the extra `study` is not installed")

from lars_fused.study import data, networks, runs
from lars_fused.study.data import in_memory
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.minibatch import compare, findings, metrics, perceptual, prune
from lars_fused.study.experiments.minibatch.cache import HEADER, GradientCache, stamp
from lars_fused.study.experiments.minibatch.compare import Comparison, Distances
from lars_fused.study.experiments.minibatch.draw import HEAT
from lars_fused.study.experiments.minibatch.plan import METRICS, Plan, cut, middle, upper_quartile
from lars_fused.study.loop import Trainer
from lars_fused.study.order import Fixed
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu

IMAGES, BATCH = 100, 16  # six mini-batches of 17, 17, 17, 17, 16, 16
BASE = Settings(
    data="synthetic", train_images=IMAGES, network="linear", optimizer="sgd", lr=0.1, batch=BATCH,
    epochs=3.0, decay="step", evaluations=1, order="made",
)  # fmt: skip


def images() -> data.Data:
    return data.load("synthetic", 0, IMAGES)


def batches() -> list[torch.Tensor]:
    return cut(torch.arange(IMAGES).flip(0), BATCH)


def comparison(folder: Path, **changes) -> Comparison:
    return Comparison(replace(BASE, **changes), images(), batches(), folder)


# ------------------------------------------------------------------------- Algorithm 1


def closed_form(weight: np.ndarray, bias: np.ndarray, chosen: torch.Tensor) -> list[np.ndarray]:
    """Softmax regression: ∂R/∂W = (P − Y)ᵀX / m and ∂R/∂b = Σ(P − Y) / m, in float64."""
    split = images().train
    x = split.images.take(chosen).flatten(1).double().numpy()
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(x)), split.labels[chosen].numpy()] -= 1
    return [p.T @ x / len(x), p.mean(0)]


def test_distances_on_a_linear_model_are_those_of_the_closed_form(tmp_path: Path) -> None:
    found = comparison(tmp_path).run()
    assert found.layers.shape == (3, 6, 2)
    trainer = Trainer(BASE, images(), order=Fixed(batches()))
    for epoch in range(3):
        # net_compare stays where the epoch began, while net_normal goes on.
        weight, bias = (p.detach().double().numpy().copy() for p in trainer.parameters)
        each = [closed_form(weight, bias, chosen) for chosen in batches()]
        full = closed_form(weight, bias, torch.arange(IMAGES))
        for k, gradients in enumerate(each):
            by_tensor = [np.linalg.norm(g - f) for g, f in zip(gradients, full, strict=True)]
            assert found.layers[epoch, k].tolist() == pytest.approx(by_tensor, rel=2e-5)
            assert float(found.total[epoch, k]) == pytest.approx(math.hypot(*by_tensor), rel=2e-5)
        norms = [np.linalg.norm(f) for f in full]
        assert found.full[epoch].tolist() == pytest.approx(norms, rel=2e-5)
        trainer.run(stop_after=(epoch + 1) * 6)
    assert found.rates == pytest.approx([0.1, 0.01, 0.001])


def test_the_sum_over_mini_batches_is_the_full_gradient() -> None:
    torch.manual_seed(0)
    model, split = networks.build("mlp", (1, 8, 8), 10), images().train
    parameters = list(model.parameters())

    def gradient(chosen: torch.Tensor) -> list[torch.Tensor]:
        output = model(split.images.take(chosen))
        loss = torch.nn.functional.cross_entropy(output, split.labels[chosen])
        return list(torch.autograd.grad(loss, parameters))

    parts = batches()
    assert {len(part) for part in parts} == {16, 17}  # a plain mean would be wrong
    found = compare.mean_gradient(lambda k: gradient(parts[k]), [len(part) for part in parts])
    for ours, whole in zip(found, gradient(torch.arange(IMAGES)), strict=True):
        # Both are sums of 100 float32 terms in different orders.
        assert float((ours - whole).abs().max()) <= 100 * 6e-8 * float(whole.abs().max())


def test_an_interrupted_comparison_is_bitwise_the_whole_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "CHECKPOINT_SECONDS", 0.0)
    options = {"network": "c1", "width": 0.0625, "order": "noisy"}  # dropout, batch normalisation
    whole = comparison(tmp_path / "whole", **options)
    whole.run()

    def stop(trainer: Trainer) -> None:
        if trainer.step == 9:  # in the second of three epochs: three gradients are cached
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path / "parts", **options).run(stop)
    again = comparison(tmp_path / "parts", **options)
    assert again.trainer.step == 6
    computed = []
    plain = compare._Start._compute
    monkeypatch.setattr(
        compare._Start,
        "_compute",
        lambda self, k: computed.append((self.first, k)) or plain(self, k),
    )
    again.run()
    # What was cached before the interruption is used: the first three of the second epoch.
    assert computed == [(6, 3), (6, 4), (6, 5)] + [(12, k) for k in range(6)]
    assert torch.equal(again.distances.layers, whole.distances.layers)
    assert again.distances.rates == whole.distances.rates
    assert again.trainer.history.losses == whole.trainer.history.losses
    for a, b in zip(again.trainer.parameters, whole.trainer.parameters, strict=True):
        assert torch.equal(a, b)
    again.finish()
    assert not again.cache.folder.exists()
    assert {p.name for p in again.folder.iterdir()} >= {runs.RESULT, compare.DISTANCES}


# --------------------------------------------------------------------------- the cache


SHAPES = [torch.Size([3, 5]), torch.Size([]), torch.Size([7])]


def gradients() -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


def test_the_cache_is_as_large_as_it_says_and_returns_every_bit(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path / "cache", SHAPES, 3)
    written = [gradients() for _ in range(3)]
    for k, each in enumerate(written):
        cache.write(k, each, stamp(k=k))
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) == cache.size
    assert cache.size == 3 * (HEADER + 4 * 23)
    for k, each in enumerate(written):
        for a, b in zip(cache.read(k, stamp(k=k)) or [], each, strict=True):
            assert torch.equal(a, b)
    (cache.folder / "other").touch()
    cache.clear()
    assert [file.name for file in cache.folder.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("change", "damaged"),
    [
        (lambda content: content[:-1], 1),
        (lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], 1),
        (lambda content: b"", 1),
        (lambda content: b"\xff" * len(content), 1),
        (lambda content: content[:HEADER], 1),
    ],
    ids=["short", "a bit", "empty", "noise", "header alone"],
)
def test_a_damaged_gradient_is_not_believed(tmp_path: Path, change, damaged: int) -> None:
    cache = GradientCache(tmp_path, SHAPES, 1)
    cache.write(0, gradients(), "now")
    cache.file(0).write_bytes(change(cache.file(0).read_bytes()))
    assert cache.read(0, "now") is None
    assert cache.damaged == damaged


def test_a_stale_gradient_is_not_believed(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path, SHAPES, 1)
    assert cache.read(0, "now") is None
    cache.write(0, gradients(), stamp(settings={"lr": 0.1}, step=3))
    assert cache.read(0, stamp(settings={"lr": 0.2}, step=3)) is None
    assert cache.read(0, stamp(settings={"lr": 0.1}, step=4)) is None
    assert cache.read(0, stamp(settings={"lr": 0.1}, step=3)) is not None
    assert cache.damaged == 0  # every epoch finds the files of the one before


def test_damage_in_the_middle_of_an_epoch_changes_no_result(tmp_path: Path) -> None:
    # With dropout: what is computed again draws the random numbers of its own step.
    options = {"network": "c1", "width": 0.0625, "order": "noisy"}
    whole = comparison(tmp_path / "whole", **options).run()
    other = comparison(tmp_path / "other", **options)

    def harm(trainer: Trainer) -> None:
        if trainer.step == 4:
            file = other.cache.file(1)
            file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")

    assert torch.equal(other.run(harm).layers, whole.layers)
    assert other.cache.damaged == 1


def test_a_cache_that_does_not_fit_is_refused_before_the_start(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    cache = GradientCache(tmp_path / "not" / "yet" / "there", [torch.Size([1000])], 10)
    needed = 11 * (HEADER + 4000)  # a file is written beside the one it replaces
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, needed))
    assert cache.check_space() == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, needed - 1))
    message = r"takes 0.04 MB \(10 mini-batches of 1,000 numbers\), and 0.05 MB are free"
    with pytest.raises(StudyError, match=message):
        cache.check_space()
    cache.write(0, [torch.zeros(1000)], "now")  # what is there already needs no room
    assert cache.check_space() == needed - 1


# ------------------------------------------------------------------------- the metrics


def made() -> np.ndarray:
    """Black, white, grey, a checkerboard of 8 pixels, red, green, blue: 32x32 in [0, 1]."""
    found = np.zeros((7, 32, 32, 3))
    found[1], found[2] = 1.0, 0.5
    rows, columns = np.indices((32, 32)) // 8
    found[3] = ((rows + columns) % 2)[..., None]
    for channel in range(3):
        found[4 + channel, ..., channel] = 1.0
    return found


def test_a_white_image_is_brightest_and_a_black_one_darkest() -> None:
    found = metrics.intensity(made())
    assert found.argmax() == 1
    assert found.argmin() == 0
    assert found[1] == 32 * 32 * 3
    assert found[4:].tolist() == [1024.0] * 3


def test_a_checkerboard_has_most_edges_and_a_plain_image_none() -> None:
    found = metrics.edges(made())
    assert found.argmax() == 3
    assert found[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    assert found[3] > 100


def test_mean_colours_are_sorted_by_hue_saturation_value() -> None:
    shown = made()
    shown[6] *= 0.3  # a dark blue: by hue it is last, by value it would be second
    found = metrics.colour(shown)
    assert found[4:, 0] == pytest.approx([0, 1 / 3, 2 / 3])  # red, green, blue
    assert found[2] == pytest.approx([0, 0, 0.5])
    # Grey has hue and saturation 0 and is sorted by value; red comes after it, then green, blue.
    assert metrics.ascending(found).tolist() == [0, 2, 3, 1, 4, 5, 6]
    with pytest.raises(StudyError, match="1 or 3 channels, not 2"):
        metrics.colour(made()[..., :2])


def test_pixels_of_any_kind_are_scaled_and_equals_keep_their_order() -> None:
    bytes_ = in_memory(torch.full((2, 1, 8, 8), 51, dtype=torch.uint8))
    assert metrics.pixels(bytes_)(torch.arange(2)).max() == pytest.approx(0.2)
    floats = in_memory(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 16.0)]))
    assert metrics.pixels(floats)(torch.arange(2)).max((1, 2, 3)).tolist() == [0.0, 1.0]
    assert metrics.ascending(np.array([2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2]


def test_perceptual_distance_is_zero_at_the_mean_and_larger_for_stranger_images() -> None:
    torch.manual_seed(0)
    network = networks.build("conv2", (1, 8, 8), 10)
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    pattern = torch.randn(1, 8, 8)
    pixels = torch.stack([pattern, pattern + 0.2 * torch.randn(1, 8, 8), pattern, -pattern])
    pixels = torch.cat([pixels, 3 * pattern[None] - pixels[1:].sum(0)])  # the mean is the pattern
    shown = in_memory(pixels)
    found = metrics.scores("perceptual", shown, network)
    assert torch.allclose(perceptual.mean_image(shown, [torch.arange(5)]), pixels.mean(0)[None])
    strange = torch.stack([pattern * 0.8, -pattern])
    features = [perceptual.features(network, x) for x in (strange, pattern[None])]
    near, far = perceptual.between(*features)
    assert near < far
    assert perceptual.between(features[1], features[1]).tolist() == [0.0]
    # By hand: unit vectors by position, squares over channels, mean over positions, layers added.
    expected = 0.0
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(
                lambda m, i, o, n=name: seen.setdefault(n, []).append(o.detach().clone())
            )
    network.eval()(pixels[1:2])
    network(pixels.mean(0)[None])
    for a, b in seen.values():
        unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in (a, b)]
        expected += float((unit[0] - unit[1]).square().sum(1).mean())
    assert found[1] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(StudyError, match="this network has none"):
        perceptual.features(networks.build("linear", (1, 8, 8), 10), pixels)


# ------------------------------------------------------------------ orders and findings


def test_the_order_is_cut_as_in_the_text_and_loses_no_image() -> None:
    parts = cut(torch.randperm(50_000), 256)
    assert len(parts) == 195
    assert {len(part) for part in parts} == {256, 257}
    assert torch.cat(parts).sort().values.equal(torch.arange(50_000))
    assert upper_quartile(8).tolist() == [False] * 6 + [True] * 2
    assert middle(10).tolist() == [False] + [True] * 8 + [False]


def distances(rows: list[list[float]], rates: list[float]) -> Distances:
    layers = torch.tensor(rows, dtype=torch.float64)[..., None]
    return Distances(["w"], layers, layers[:, 0], rates)


def test_claims_are_judged_by_the_distances() -> None:
    falling = [[4.0, 4, 4, 4, 4, 4, 4, 1, 1, 1], [40.0, 40, 40, 40, 40, 40, 40, 10, 10, 10]]
    bowl = [[9.0, 1, 1, 1, 1, 1, 1, 1, 1, 9]]
    found = distances(falling + bowl, [0.1, 0.1, 0.01])
    assert found.phases() == [range(0, 2), range(2, 3)]
    first, second = findings.claims("intensity", found)
    # The upper quartile is 1 (the last three of ten), the rest 4; an epoch's size does not matter.
    assert (first.text, first.held, first.epochs) == (findings.UPPER, True, 1.0)
    assert first.ratio == pytest.approx(0.25)
    assert (second.text, second.held) == (findings.INNER, True)
    assert second.ratio == pytest.approx(1 / 9)
    (outer, _) = findings.claims("colour", found)
    assert outer.ratio == pytest.approx(((4 + 1) / 2) / ((6 * 4 + 2) / 8))
    assert outer.held
    (edges, _) = findings.claims("edges", found)
    assert not edges.held
    assert edges.ratio == pytest.approx(1 / outer.ratio)
    assert findings.extremes(found)[1] == pytest.approx(9)
    # Each epoch by itself: 4 over the mean of 3.1, also where another epoch is ten times as large.
    assert findings.quarters(found)[0][0] == pytest.approx(4 / 3.1)
    assert findings.quarters(found)[0][3] / findings.quarters(found)[0][0] == pytest.approx(0.25)


def test_light_is_near() -> None:
    import matplotlib as mpl

    near, far = (np.dot(mpl.colormaps[HEAT](x)[:3], [0.2, 0.7, 0.1]) for x in (0.0, 1.0))
    assert near > 0.9
    assert far < 0.3


# ----------------------------------------------------------------------------- pruning


def orders() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randperm(1000, generator=generator) for name in METRICS}


def test_the_recommended_mini_batches_are_those_of_the_conclusions() -> None:
    made = orders()
    early = prune.allowed(made, 50, "recommended", 0)
    assert len(early) == 2 * 5  # a quarter of twenty, of two orders
    upper = {name: set(order[750:].tolist()) for name, order in made.items()}
    for number, chosen in enumerate(early):
        assert set(chosen.tolist()) <= upper["intensity" if number < 5 else "perceptual"]
    late = prune.allowed(made, 50, "recommended", 1)
    assert len(late) == 4 * 16
    for number, chosen in enumerate(late):
        order = list(made.values())[number // 16]
        assert not set(chosen.tolist()) & set(order[:100].tolist() + order[900:].tolist())
    assert len(prune.allowed(made, 50, "sorted", 0)) == 4 * 20
    uneven = {name: order[:990] for name, order in made.items()}
    assert {len(b) for b in prune.allowed(uneven, 50, "sorted", 0)} == {50}


def test_arms_take_equal_steps_and_every_mini_batch_of_a_pool_in_turn() -> None:
    settings = replace(BASE, batch=50, milestones=(0.25, 0.5))
    assert prune.order_of("random", settings, orders(), 40) is None
    drawn = prune.order_of("recommended", settings, orders(), 40)
    assert drawn is not None
    assert drawn.steps(3.0) == 40
    assert [drawn.phase(step) for step in (0, 9, 10, 19, 20, 39)] == [0, 0, 1, 1, 2, 2]
    early = {tuple(b.tolist()) for b in prune.allowed(orders(), 50, "recommended", 0)}
    assert {tuple(drawn.chosen(step).tolist()) for step in range(10)} == early
    other = prune.order_of("recommended", replace(settings, seed=1), orders(), 40)
    assert any(not torch.equal(drawn.chosen(s), other.chosen(s)) for s in range(10))


def test_the_verdict_is_students_t() -> None:
    verdict = prune.Verdict("recommended", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    mean, low, high = verdict.interval(verdict.average)
    # t with 2 degrees of freedom is 4.3027 at 97.5 %, the standard error 1/√3.
    assert (mean, low, high) == pytest.approx(
        (2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )
    assert verdict.sentence().startswith("NOT FASTER")
    assert prune.Verdict("a", [0.0, 0.1], [2.0, 2.1]).sentence().startswith("FASTER")
    assert prune.Verdict("a", [0.0, 0.1], [-2.0, -2.1]).sentence().startswith("SLOWER")
    assert "at the end it is lower" in prune.Verdict("a", [-1.0, -1.1], [2.0, 2.1]).sentence()


# ------------------------------------------------------------------------- the command


SMALL = [
    "minibatch", "--data=synthetic", "--train-images=128", "--batch=16", "--epochs=2",
    "--metrics=perceptual", "--prune", "--prune-seeds=2",
]  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    from lars_fused.study.cli import main

    out = tmp_path_factory.mktemp("minibatch")
    assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_the_command_leaves_its_tables_and_pictures(study: Path) -> None:
    table = rows(study / "distances.csv")
    assert len(table) == 2 * 8
    assert sorted({float(row["lr"]) for row in table}) == pytest.approx([0.01, 0.1])
    for row in table:
        assert float(row["distance"]) > 0
    for epoch in ("1", "2"):
        shares = [float(r["relative_distance"]) for r in table if r["epoch"] == epoch]
        assert sum(shares) == pytest.approx(8, rel=1e-5)
    for name in ("heat_perceptual", "layers_perceptual", "prune"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    arms = rows(study / "prune.csv")
    assert [(row["arm"], row["seed"]) for row in arms] == [
        (arm, seed) for arm in ("random", "sorted", "recommended") for seed in ("0", "1")
    ]
    assert {row["steps"] for row in arms} == {"16"}
    summary = json.loads((study / "summary.json").read_text())
    for verdict in summary["prune"]["verdicts"]:
        expected = [
            float(r["test_accuracy"]) - float(s["test_accuracy"])
            for r, s in zip([a for a in arms if a["arm"] == verdict["arm"]], arms[:2], strict=True)
        ]
        assert verdict["final"] == pytest.approx(expected)
    assert {"scikit-image", "torch"} <= summary["versions"].keys()
    assert not list(study.rglob("*.gradient"))


def test_arms_of_a_seed_begin_with_the_same_weights_and_differ_in_their_images(study: Path) -> None:
    plan = Plan.from_dict(json.loads((study / "study.json").read_text())["plan"])
    found = {arm: runs.find(study, plan.arm(arm, 0)) for arm in ("random", "recommended")}
    made = [
        Trainer(replace(plan.arm(arm, 0), epochs=2.0), data.load("synthetic", 0, 128)).parameters
        for arm in found
    ]
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
    assert found["random"].history.losses != found["recommended"].history.losses
    assert found["random"].history.rates == found["recommended"].history.rates


def test_nothing_that_is_finished_is_done_again_and_shares_make_the_whole(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from lars_fused.study.cli import main
    from lars_fused.study.experiments.minibatch import draw

    for name in ("heat_maps", "layer_maps", "prune_curves"):
        monkeypatch.setattr(draw, name, lambda *args: None)
    merged = tmp_path / "merged"
    for part in (1, 2):
        out = tmp_path / str(part)
        assert main([*SMALL, f"--only={part}/2", f"--out={out}"]) == 0
        assert f"share {part}/2 is done" in capsys.readouterr().out
        shutil.copytree(out, merged, dirs_exist_ok=True)
    monkeypatch.setattr(runs, "Trainer", None)
    monkeypatch.setattr(compare, "Trainer", None)
    assert main(["report", str(merged)]) == 0
    text = capsys.readouterr().out
    assert "Recommended mini-batches against random ones, 2 seeds, equal steps" in text
    for name in ("distances.csv", "claims.csv", "prune.csv"):
        assert (merged / name).read_bytes() == (study / name).read_bytes()
    assert main([*SMALL, f"--out={merged}"]) == 0
    text = capsys.readouterr().out
    assert "Gradient cache: 8 mini-batches of 17,610 numbers, 0.57 MB of" in text


def test_features_come_from_the_weights_of_another_run(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    network = networks.build("mlp", (1, 8, 8), 10, 0.5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    shown = images()
    eye = perceptual.from_file(tmp_path / "weights.pt", shown, "mlp", 0.5)
    for a, b in zip(eye.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(StudyError, match=r"does not fit mlp at width 1 for images of 1x8x8"):
        perceptual.from_file(tmp_path / "weights.pt", shown, "mlp", 1.0)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(StudyError, match=r"is not the weights.pt of a run"):
        perceptual.from_file(tmp_path / "list.pt", shown, "mlp", 1.0)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(StudyError, match="is damaged"):
        perceptual.from_file(tmp_path / "noise.pt", shown, "mlp", 1.0)
    # Another file is another order: its runs are not taken for those of the first.
    plan = Plan(BASE, ("perceptual", "edges"), 1, perceptual.digest(tmp_path / "weights.pt"))
    other = replace(plan, features=perceptual.digest(tmp_path / "list.pt"))
    assert plan.comparison("perceptual").key != other.comparison("perceptual").key
    assert plan.comparison("edges").key == other.comparison("edges").key
    assert plan.arm("recommended", 0).key != other.arm("recommended", 0).key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=beauty"], "--metrics beauty is unknown; choose from intensity"),
        (["--metrics=edges,edges"], "names a metric twice"),
        (["--network=linear"], "this network has none"),
        (["--epochs=1.5"], "--epochs 1.5 is not allowed"),
        (["--batch=1000"], "--batch 1000 leaves 2 mini-batches"),
        (["--batch=9999"], "--batch 9,999 is larger"),
        (["--features=/nowhere"], "does not exist"),
        (["--prune", "--prune-seeds=1"], "1 is not in the range"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message) -> None:
    from lars_fused.study.cli import main

    out = tmp_path / "out"
    assert main(["minibatch", "--data=synthetic", *arguments, f"--out={out}"]) != 0
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert not out.exists()
