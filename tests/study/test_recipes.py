"""The paper's tables, cell by cell, against a transcription of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("click", reason="the extra `study` is not installed")

from lars_fused.study.commands.train import differences, published, recipe_settings
from lars_fused.study.errors import StudyError
from lars_fused.study.experiments.paper import RECIPES, ROWS, TABLE_2, TABLE_2_SPREAD, recipe
from lars_fused.study.settings import Settings

pytestmark = pytest.mark.cpu

# batch: lr → accuracy ...; ? is illegible.
TABLES = """
1a alexnet sgd 2.5 100 | 512: 0.02 58.8 | 4096: 0.04 53.0, 0.05 53.1, 0.06 51.6, 0.07 0.1
   | 8192: 0.02 29.8, 0.03 44.8, 0.04 43.1, 0.05 0.1
1b alexnet-bn sgd 0 100 | 512: 0.02 60.2 | 4096: 0.16 58.1, 0.18 58.9, 0.21 58.5, 0.30 57.1
   | 8192: 0.23 57.6, 0.30 58.0, 0.32 57.7, 0.41 56.5
3a alexnet lars 2 100 | 512: ? 58.7 | 4096: ? 58.5 | 8192: ? 58.2 | 16384: ? 55.0 | 32768: ? 46.9
3b alexnet-bn lars 5 100 | 512: ? 60.2 | 4096: ? 60.4 | 8192: 14 60.1 | 16384: ? 59.3
   | 32768: ? 57.8
"""
# batch, γ, warm-up, minimal, extended
TABLE_4 = """
256 4 0 73.8 75.8
1024 10 5 73.3 75.4
8192 30 5 73.5 75.2
16384 33 12 72.9 74.4
32768 40 12 72.5 72.5
"""
TABLE_5 = """
5a alexnet 16384 | 100 55.0 | 125 55.9 | 150 56.7 | 175 57.3 | 200 58.2
5b alexnet-bn 32768 | 100 57.8 | 125 59.2 | 150 59.5 | 175 59.5 | 200 59.9
5c resnet50 16384 | 100 74.4 | 125 74.1 | 150 74.6 | 175 74.8 | 200 75.5
"""
# optimizer, batch, γ, epochs, warm-up, accuracy
TABLE_6 = """
sgd 256 0.02 100 0 69.2
lars 256 4 100 5 70.3
lars 1024 6 100 10 69.7
lars 2048 7 150 25 ?
lars 4096 10 200 30 69.9
lars 8192 10 250 60 69.0
lars 16384 10 350 110 67.2
"""
LAYERS = """
conv1.b 1.86 0.22 8.48
conv1.w 0.098 0.017 5.76
conv2.b 5.546 0.165 33.6
conv2.w ? 0.002 83.5
conv3.b 9.40 0.135 69.9
conv3.w 0.196 0.0015 127
conv4.b 8.15 0.109 74.6
conv4.w 0.196 0.0013 148
conv5.b 6.65 0.09 73.6
conv5.w ? ? 69
fc6.b 30.7 0.26 117
fc6.w 6.4 0.005 1345
fc7.b 20.5 0.30 68
fc7.w 6.4 0.013 489
fc8.b 20.2 0.22 93
fc8.w 0.316 0.016 19
"""


def value(text: str) -> float | None:
    return None if text == "?" else float(text)


def expected() -> set[tuple]:
    rows: set[tuple] = set()
    for line in TABLES.replace("\n   |", " |").strip().splitlines():
        head, *cells = line.split("|")
        table, network, optimizer, warmup, epochs = head.split()
        for cell in cells:
            batch, pairs = cell.split(":")
            for pair in pairs.split(","):
                lr, accuracy = map(value, pair.split())
                rows.add(
                    (
                        table,
                        network,
                        optimizer,
                        int(batch),
                        lr,
                        float(warmup),
                        int(epochs),
                        accuracy,
                        "minimal",
                    )
                )
    for line in TABLE_4.split("\n")[1:-1]:
        batch, lr, warmup, minimal, extended = map(float, line.split())
        for accuracy, augment in ((minimal, "minimal"), (extended, "extended")):
            rows.add(("4", "resnet50", "lars", int(batch), lr, warmup, 100, accuracy, augment))
    for line in TABLE_5.strip().splitlines():
        head, *cells = line.split("|")
        table, network, batch = head.split()
        lr, warmup = {"5a": (None, 2.0), "5b": (None, 5.0), "5c": (33.0, 12.0)}[table]
        augment = "extended" if table == "5c" else "minimal"
        for cell in cells:
            epochs, accuracy = cell.split()
            rows.add(
                (
                    table,
                    network,
                    "lars",
                    int(batch),
                    lr,
                    warmup,
                    int(epochs),
                    float(accuracy),
                    augment,
                )
            )
    for line in TABLE_6.split("\n")[1:-1]:
        optimizer, *rest = line.split()
        batch, lr, epochs, warmup, accuracy = map(value, rest)
        augment = "minimal" if optimizer == "sgd" else "extended"
        rows.add(
            ("6", "googlenet", optimizer, int(batch), lr, warmup, int(epochs), accuracy, augment)
        )
    return rows


def test_every_cell_of_the_tables() -> None:
    ours = {
        (r.table, r.network, r.optimizer, r.batch, r.lr, r.warmup, r.epochs, r.accuracy, r.augment)
        for r in ROWS
    }
    assert ours == expected()
    assert len(ROWS) == len(RECIPES) == 9 + 9 + 5 + 5 + 10 + 15 + 7


def test_what_is_illegible_says_so() -> None:
    for row in ROWS:
        if row.lr is None or row.accuracy is None:
            assert "illegible in the source" in row.remark, row


def test_table_2_and_its_ratios() -> None:
    lines = [line.split() for line in LAYERS.strip().splitlines()]
    assert [(x.name, x.weight, x.gradient, x.ratio) for x in TABLE_2] == [
        (name, *map(value, rest)) for name, *rest in lines
    ]
    for layer in TABLE_2:
        if layer.weight and layer.gradient:  # printed to two or three digits
            assert layer.weight / layer.gradient == pytest.approx(layer.ratio, rel=0.05)
    ratios = [layer.ratio for layer in TABLE_2]
    assert (min(ratios), max(ratios)) == TABLE_2_SPREAD


def test_a_recipe_becomes_settings() -> None:
    row = recipe("table1a-4096-lr0.05")
    settings = Settings(**recipe_settings(row))
    assert (settings.network, settings.optimizer, settings.batch) == ("alexnet", "sgd", 4096)
    assert (settings.lr, settings.warmup_epochs, settings.epochs) == (0.05, 2.5, 100.0)
    assert settings.warmup_start * settings.lr == pytest.approx(0.001)
    assert (settings.momentum, settings.weight_decay) == (0.9, 5e-4)
    assert (settings.decay, settings.power, settings.scaling) == ("poly", 2.0, "none")
    assert settings.convention == "PAPER"
    assert settings.trust_coefficient == 0  # the convention's, 0.001
    for other in ROWS:
        filled = {"lr": 1.0} | recipe_settings(other)
        assert Settings(**filled).batch == other.batch


def test_what_differs_is_said() -> None:
    row = recipe("table4-8192-extended")
    settings = Settings(**(recipe_settings(row) | {"batch": 512, "lr": 5.0}), width=0.25)
    assert differences(row, settings, (1, 8, 8)) == [
        "data digits instead of ImageNet",
        "resolution 8 instead of 224",
        "batch 512 instead of 8192",
        "lr 5 instead of 30",
        "width 0.25 instead of 1",
    ]
    assert published(row) == "Published (table 4, ImageNet): 75.2 %."
    assert "illegible" in published(recipe("table6-2048"))


def test_unknown_recipes() -> None:
    with pytest.raises(StudyError, match="choose from table6-256-sgd, table6-256, "):
        recipe("table6-64")
    with pytest.raises(StudyError, match="`lars-study recipes` lists them"):
        recipe("vgg")
