"""Sharpness: Definition 2 against closed forms, Table 1, networks, paths, the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("click", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")
pytest.importorskip("scipy", reason="the extra `study` is not installed")

from lars_fused.study import data, networks, runs
from lars_fused.study.evaluation import evaluated
from lars_fused.study.experiments.sharpness import subspace, work
from lars_fused.study.experiments.sharpness.functions import FUNCTIONS, TABLE_1, measure
from lars_fused.study.experiments.sharpness.maximise import half_widths, sharpness
from lars_fused.study.experiments.sharpness.plan import Box, Plan
from lars_fused.study.experiments.sharpness.subspace import Identity, RandomColumns
from lars_fused.study.experiments.sharpness.surface import (
    Surface,
    along,
    between,
    coefficients,
    renew_statistics,
)
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu


def quadratic(curvature: np.ndarray, centre: np.ndarray, height: float):
    """½ Σ hᵢ (xᵢ − cᵢ)² + height, with its gradient."""

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        away = x - centre
        return float(0.5 * (curvature * away**2).sum()) + height, curvature * away

    return function


def corner(curvature, centre, height, x, epsilon) -> float:
    """φ in closed form: the box's maximum is the corner away from the centre."""
    half = epsilon * (np.abs(x) + 1)
    at = float(0.5 * (curvature * (x - centre) ** 2).sum()) + height
    most = float(0.5 * (curvature * (np.abs(x - centre) + half) ** 2).sum()) + height
    return 100 * (most - at) / (1 + at)


# ------------------------------------------------------------------------ Definition 2


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("at_minimum", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_sharpness_of_a_quadratic_is_its_closed_form(n, at_minimum, epsilon) -> None:
    generator = np.random.default_rng(n)
    curvature = 10.0 ** generator.uniform(-2, 2, n)
    centre = generator.standard_normal(n)
    x = centre if at_minimum else centre + generator.standard_normal(n)
    found = sharpness(quadratic(curvature, centre, 0.3), x, Identity(n), epsilon, iterations=100)
    expected = corner(curvature, centre, 0.3, x, epsilon)
    # f itself is rounded: 1e-16 of 1 + f, of which φ is a hundredth of a thousandth at least.
    assert found.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.at == pytest.approx(quadratic(curvature, centre, 0.3)(x)[0])
    assert found.value == pytest.approx(100 * (found.largest - found.at) / (1 + found.at))


def test_the_climb_does_not_depend_on_the_unit_of_the_function() -> None:
    slope = np.array([1.0, -2.0, 0.5])
    for unit in (1.0, 1e-25):
        found = sharpness(
            lambda x, unit=unit: (unit * float(slope @ x), unit * slope),
            np.zeros(3), Identity(3), 0.01, starts=0,
        )  # fmt: skip
        assert found.value == pytest.approx(100 * unit * 0.01 * 3.5, rel=1e-9, abs=0)


def test_a_point_outside_of_the_box_never_counts() -> None:
    seen = []
    function = quadratic(np.ones(3), np.zeros(3), 0.0)

    def watched(x: np.ndarray) -> tuple[float, np.ndarray]:
        seen.append(x.copy())
        return function(x)

    x = np.array([2.0, -1.0, 0.0])
    sharpness(watched, x, Identity(3), 0.01)
    half = np.array([0.03, 0.02, 0.01])
    assert half_widths(Identity(3), x, 0.01) == pytest.approx(half)
    assert (np.abs(np.array(seen) - x) <= half * (1 + 1e-12)).all()


def test_sharpness_with_a_random_matrix_is_the_best_corner() -> None:
    """F is convex, so its maximum over the box is at one of the 2^p corners."""
    n, p = 6, 3
    function = quadratic(np.array([1.0, 5, 0.1, 20, 2, 7]), np.arange(6) / 3, 0.2)
    x = np.linspace(-1, 1, n)
    space = RandomColumns(n, p, seed=4)
    dense = np.array([space.forward(unit) for unit in np.eye(p)]).T
    half = 0.02 * (np.abs(np.linalg.pinv(dense) @ x) + 1)
    corners = [function(x + dense @ (half * s))[0] for s in itertools.product([-1, 1], repeat=p)]
    expected = 100 * (max(corners) - function(x)[0]) / (1 + function(x)[0])
    found = sharpness(function, x, space, 0.02, iterations=50, starts=8)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_a_function_that_overflows_in_the_box_is_infinitely_sharp() -> None:
    def wall(x: np.ndarray) -> tuple[float, np.ndarray]:
        return (float(x[0]), np.ones(1)) if x[0] < 0.5 else (math.nan, np.ones(1))

    assert sharpness(wall, np.zeros(1), Identity(1), 1.0).value == math.inf
    assert sharpness(wall, np.zeros(1), Identity(1), 0.4).value == pytest.approx(40)
    assert math.isnan(sharpness(wall, np.ones(1), Identity(1), 0.1).value)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (1, 1)])
@pytest.mark.parametrize("kept", [True, False])
def test_products_with_a_random_matrix_are_those_of_the_matrix(shape, kept, monkeypatch) -> None:
    n, p = shape
    monkeypatch.setattr(subspace, "ROWS", 2 * p)  # two rows at a time
    monkeypatch.setattr(subspace, "KEPT", 10**6 if kept else 0)
    space = RandomColumns(n, p, seed=11)
    dense = np.array([space.forward(unit) for unit in np.eye(p)]).T
    assert dense.shape == (n, p)
    assert len(np.unique(dense)) == n * p  # no block is the copy of another
    generator = np.random.default_rng(0)
    y, g = generator.standard_normal(p), generator.standard_normal(n)
    assert space.forward(y) == pytest.approx(dense @ y)
    assert space.transposed(g) == pytest.approx(dense.T @ g)
    assert space.pseudo_inverse(g) == pytest.approx(np.linalg.pinv(dense) @ g, rel=1e-6, abs=1e-9)
    assert RandomColumns(n, p, seed=11).forward(y).tolist() == space.forward(y).tolist()
    assert RandomColumns(n, p, seed=12).forward(y).tolist() != space.forward(y).tolist()


def test_numbers_of_a_random_matrix_are_standard_normal() -> None:
    drawn = np.concatenate([RandomColumns(4000, 5, 0).forward(unit) for unit in np.eye(5)])
    # Standard errors of 20,000 numbers: 0.007 of the mean, 0.005 of the deviation.
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.02


def test_nothing_of_size_n_times_n_is_made() -> None:
    n = 100_000  # n × n would be 80 GB
    function = quadratic(np.ones(n), np.zeros(n), 0.0)
    for space in (Identity(n), RandomColumns(n, 2, 0)):
        assert sharpness(function, np.zeros(n), space, 1e-3, iterations=1).value > 0


# ----------------------------------------------------------------------------- Table 1


@pytest.mark.parametrize("row", [r for r in TABLE_1 if not r.random], ids=str)
def test_identity_rows_of_table_1_have_the_printed_digits(row) -> None:
    found = measure(row, draws=1, seed=0)
    assert found.text == row.printed
    assert found.agrees


@pytest.mark.parametrize("row", [r for r in TABLE_1 if r.random and r.epsilon == 1e-3], ids=str)
def test_random_rows_of_table_1_are_their_best_corner(row) -> None:
    """Each draw must be exact; the printed value, of one draw, must be among them."""
    found = measure(row, draws=12, seed=1)
    function, n, _ = FUNCTIONS[row.figure]
    for seed, value in enumerate(found.values, 1):
        dense = np.array([RandomColumns(n, n, seed).forward(unit) for unit in np.eye(n)]).T
        corners = itertools.product([-row.epsilon, row.epsilon], repeat=n)
        expected = 100 * max(function(dense @ np.array(y))[0] for y in corners)
        assert value == pytest.approx(expected, rel=1e-6, abs=0)
    assert found.agrees
    assert found.below == sum(v < float(row.printed) for v in found.values) / 12
    assert not replace(found, values=[v * 1e-9 for v in found.values]).agrees


def test_gradients_of_the_four_functions() -> None:
    for function, n, _ in FUNCTIONS.values():
        x = np.array([0.7, -1.2])[:n]
        for i in range(n):
            step = np.eye(n)[i] * 1e-6
            slope = (function(x + step)[0] - function(x - step)[0]) / 2e-6
            assert function(x)[1][i] == pytest.approx(slope, rel=1e-6)


# ---------------------------------------------------------------------- networks, paths


def some(count: int = 300) -> tuple[data.Split, data.Split]:
    loaded = data.load("synthetic", 0, count)
    return loaded.train, loaded.test


def trained(name: str, seed: int) -> torch.nn.Module:
    """A network after a few steps, so that its statistics are of the data."""
    torch.manual_seed(seed)
    network, (split, _) = networks.build(name, (1, 8, 8), 10, 0.25), some()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(6):
        chosen = torch.arange(50 * step, 50 * step + 50)
        optimizer.zero_grad()
        output = network(split.images.take(chosen))
        torch.nn.functional.cross_entropy(output, split.labels[chosen]).backward()
        optimizer.step()
    return network


def test_a_networks_loss_and_gradient_as_a_function_of_one_vector(monkeypatch) -> None:
    network, (split, _) = trained("c1", 0), some()  # dropout is off, statistics stay
    kept = {name: b.clone() for name, b in network.named_buffers()}
    surface = Surface(network, split)
    whole, gradient = surface(surface.start)
    assert whole == pytest.approx(evaluated(network, split, torch.device("cpu"))[0], rel=1e-6)
    assert len(surface.start) == networks.parameters(network)
    direction = np.random.default_rng(0).standard_normal(len(gradient))
    direction *= 0.02 / np.linalg.norm(direction)
    ends = [surface(surface.start + sign * direction)[0] for sign in (1, -1)]
    # Central differences: the error is cubic in the step; float32 gives the losses to 1e-6.
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float(gradient @ direction), rel=0.05, abs=1e-5)
    monkeypatch.setattr("lars_fused.study.evaluation.AT_ONCE", 70)
    parts, pieces = surface(surface.start)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert pieces == pytest.approx(gradient, rel=1e-3, abs=1e-6)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, kept[name])


def test_a_networks_sharpness_grows_with_the_box() -> None:
    network, (split, _) = trained("mlp", 0), some()
    surface = Surface(network, split)
    x = surface.start
    for space in (Identity(len(x)), RandomColumns(len(x), 10, 0)):
        small, large = (sharpness(surface, x, space, e).value for e in (5e-4, 1e-3))
        assert 0 < small < large


@pytest.mark.parametrize("path", ["linear", "sine"])
@pytest.mark.parametrize("name", ["mlp", "c1"])
def test_the_ends_of_a_path_are_the_two_models(path: str, name: str) -> None:
    small, large = trained(name, 1), trained(name, 2)
    ends = [{k: v.clone() for k, v in n.state_dict().items()} for n in (small, large)]
    splits = some()
    points = along(trained(name, 3), (ends[0], ends[1]), path, [-0.5, 0.0, 0.5, 1.0], splits)
    for point, network in ((points[1], small), (points[3], large)):
        network.eval()
        for which, split in zip(("train", "test"), splits, strict=True):
            loss, accuracy = evaluated(network, split, torch.device("cpu"))
            assert getattr(point, f"{which}_loss") == loss  # to the bit
            assert getattr(point, f"{which}_accuracy") == accuracy
    assert len({p.train_loss for p in points}) == 4


def test_weights_and_coefficients_along_a_path() -> None:
    assert coefficients("linear", -1.0) == (2.0, -1.0)
    assert coefficients("sine", 0.5) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert coefficients("sine", 2.0) == pytest.approx((-1.0, 0.0))
    small = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([1.0])}
    large = {"w": torch.tensor([3.0, 6.0]), "running_var": torch.tensor([9.0])}
    middle = between(small, large, "linear", 0.25)
    assert middle["w"].tolist() == [1.5, 3.0]
    assert middle["running_var"].tolist() == [1.0]
    sine = between(small, large, "sine", 0.5)["w"]
    assert sine.tolist() == pytest.approx([4 * 0.5**0.5, 8 * 0.5**0.5])


def test_statistics_of_batch_normalisation_are_renewed_from_the_images() -> None:
    network, (split, _) = trained("mlp-bn", 0), some()
    network.eval()
    first: list[torch.Tensor] = []
    layer = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d))
    layer.register_forward_pre_hook(lambda module, given: first.append(given[0]))
    renew_statistics(network, split)
    seen = torch.cat(first)
    assert torch.allclose(layer.running_mean, seen.mean(0), atol=1e-6)
    assert torch.allclose(layer.running_var, seen.var(0), rtol=1e-5)
    assert (layer.momentum, layer.training) == (0.1, False)


# ------------------------------------------------------------------------- the command


SMALL = [
    "sharpness", "--data=synthetic", "--train-images=256", "--network=mlp-bn", "--epochs=2",
    "--batches=32,128", "--optimizers=lars", "--seeds=2", "--epsilons=0.001,0.0005",
    "--columns=5", "--images=100", "--points=4", "--draws=3",
]  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    from lars_fused.study.cli import main

    out = tmp_path_factory.mktemp("sharpness")
    assert main([*SMALL, f"--out={out}"]) == 0
    return out


def test_the_command_leaves_its_tables_and_pictures(study: Path) -> None:
    table = rows(study / "sharpness.csv")
    assert len(table) == 2 * 2 * 4  # seeds, batches, boxes
    for row in table:
        value = 100 * (float(row["largest_loss"]) - float(row["loss"])) / (1 + float(row["loss"]))
        assert float(row["sharpness"]) == pytest.approx(value)
    assert {(r["optimizer"], r["batch"], r["steps"]) for r in table} == {
        ("lars", "32", "16"),
        ("lars", "128", "4"),
    }
    for name in ("sharpness_by_batch", "accuracy_by_epoch", "paths", "functions"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    ends = [r for r in rows(study / "paths.csv") if r["alpha"] in ("0.0", "1.0")]
    assert len(ends) == 2 * 2  # paths, ends; of the first seed
    accuracies = {r["batch"]: float(r["test_accuracy"]) for r in table if r["seed"] == "0"}
    for row in ends:
        batch = "32" if row["alpha"] == "0.0" else "128"  # the small batch is at α = 0
        assert float(row["test_accuracy"]) == accuracies[batch]
    summary = json.loads((study / "summary.json").read_text())
    assert len(summary["functions"]) == 16
    assert all(f["agrees"] for f in summary["functions"] if not f["random"])
    assert summary["versions"]["scipy"]


def test_each_number_is_that_of_a_sharpness_measured_anew(study: Path) -> None:
    plan = Plan.from_dict(json.loads((study / "study.json").read_text())["plan"])
    row = rows(study / "sharpness.csv")[-1]
    settings = plan.settings(row["optimizer"], int(row["batch"]), int(row["seed"]))
    loaded = data.load("synthetic", 0, 256)
    network = work.network(loaded, settings)
    network.load_state_dict(work.weights(study, settings))
    surface = Surface(network, data.first(loaded, 100).train)
    space = RandomColumns(len(surface.start), 5, work.MATRIX_SEED)
    again = sharpness(surface, surface.start, space, float(row["epsilon"]))
    assert (row["matrix"], again.value) == ("random", float(row["sharpness"]))


def test_nothing_that_is_finished_is_done_again_and_shares_make_the_whole(
    study: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from lars_fused.study.cli import main
    from lars_fused.study.experiments.sharpness import draw

    for name in ("functions", "by_batch", "by_epoch", "paths"):
        monkeypatch.setattr(draw, name, lambda *args: None)
    merged = tmp_path / "merged"
    for part in (1, 2):
        out = tmp_path / str(part)
        assert main([*SMALL, f"--only={part}/2", f"--out={out}"]) == 0
        assert f"share {part}/2 is done" in capsys.readouterr().out
        shutil.copytree(out, merged, dirs_exist_ok=True)
    assert main(["report", str(tmp_path / "1")]) == 0
    assert "2 of 4 runs are finished and measured" in capsys.readouterr().out
    for module, name in ((runs, "Trainer"), (work, "sharpness"), (work, "along")):
        monkeypatch.setattr(module, name, None)
    assert main([*SMALL, f"--out={merged}"]) == 0
    for name in ("sharpness.csv", "paths.csv", "functions.csv", "accuracy_by_epoch.csv"):
        assert (merged / name).read_bytes() == (study / name).read_bytes()
    file = next((merged / "runs").glob("*/sharpness-*.json"))
    file.write_text(file.read_text()[:30])
    capsys.readouterr()
    assert main(["report", str(merged)]) == 1
    shown = capsys.readouterr()
    assert f"{file} is not a whole JSON file" in shown.err
    assert shown.err.count("\n") == 1
    file.write_text('{"box": {}, "sharpness": {}}')
    assert main(["report", str(merged)]) == 1
    assert "is not a sharpness (it is of another box)" in capsys.readouterr().err


def test_a_box_has_a_file_of_its_own() -> None:
    boxes = [
        Box("identity", 1e-3, 100, 0, 10), Box("random", 1e-3, 100, 0, 10),
        Box("random", 5e-4, 100, 0, 10), Box("random", 1e-3, 50, 0, 10),
        Box("random", 1e-3, 100, 10, 10), Box("random", 1e-3, 100, 0, 20),
    ]  # fmt: skip
    assert len({box.name for box in boxes}) == len(boxes)
    plan = Plan(Settings(), {"adam": 1e-3}, (32, 64), 1, (1e-3,), 100, 0, 10, 25, 100)
    assert plan.alphas[0] == -1
    assert plan.alphas[-1] == 2
    assert {0.0, 1.0} <= set(plan.alphas)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers=lamb"], "--optimizers lamb is unknown; choose from adam, sgd, lars"),
        (["--optimizers=adam,adam"], "names one twice"),
        (["--batches=64"], "needs a small and a large batch size"),
        (["--batches=64,9999"], "--batch 9,999 is larger"),
        (["--epsilons=0.1,-1"], "the numbers must be positive"),
        (["--images=5000"], "--images 5000 is more than the 2,048"),
        (["--columns=0"], "0 is not in the range"),
        (["--scaling=cubic"], "'cubic' is not one of"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message) -> None:
    from lars_fused.study.cli import main

    out = tmp_path / "out"
    assert main(["sharpness", "--data=synthetic", *arguments, f"--out={out}"]) != 0
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert not out.exists()
