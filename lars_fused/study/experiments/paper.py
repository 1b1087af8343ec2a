"""The tables of the LARS paper as data, each row with its table and cell.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks with Layer-wise Adaptive Rate
Scaling", submitted to ICLR 2018. The copy that these were read from is damaged: what is illegible
in it is None here, never a guess, and `remark` says how a repaired value is known. Accuracies are
top-1 in percent on ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass

from lars_fused.study.errors import StudyError

EARLIER_VERSION = (
    "An earlier version (arXiv:1708.03888v3) reports AlexNet to a batch of 8K and ResNet-50 to 32K "
    "without loss of accuracy; a ResNet-50 baseline of 73 at 256; and for AlexNet-BN at 32K 57.5 "
    "with every lr in [17; 28]."
)


@dataclass(frozen=True)
class Row:
    """One trained network of a table.

    Attributes:
        table, cell: where it stands.
        network: a name of `lars_fused.study.networks.NETWORKS`.
        optimizer: "lars" (η = 0.001) or "sgd", both with momentum 0.9 and decay 0.0005.
        batch, lr, warmup, epochs: images a step, γ after warm-up, epochs of warm-up and in all.
        accuracy: top-1, percent.
        augment: "minimal" or "extended" as `Settings.augment` has them.
        remark: what is known of a damaged value.
    """

    table: str
    cell: str
    network: str
    optimizer: str
    batch: int
    lr: float | None
    warmup: float
    epochs: int
    accuracy: float | None
    augment: str = "minimal"
    remark: str = ""

    @property
    def name(self) -> str:
        """What `--recipe` takes."""
        return f"table{self.table}-{self.cell}"


_ILLEGIBLE = "lr illegible in the source"


def _table_1() -> list[Row]:
    alexnet = {
        512: ((0.02, 58.8),),
        4096: ((0.04, 53.0), (0.05, 53.1), (0.06, 51.6), (0.07, 0.1)),
        8192: ((0.02, 29.8), (0.03, 44.8), (0.04, 43.1), (0.05, 0.1)),
    }
    normalised = {
        512: ((0.02, 60.2),),
        4096: ((0.16, 58.1), (0.18, 58.9), (0.21, 58.5), (0.30, 57.1)),
        8192: ((0.23, 57.6), (0.30, 58.0), (0.32, 57.7), (0.41, 56.5)),
    }
    length = "100 epochs by the caption, 128 by the text"
    rows = []
    for table, network, warmup, cells, remark in (
        ("1a", "alexnet", 2.5, alexnet, ""),
        ("1b", "alexnet-bn", 0.0, normalised, length),
    ):
        for batch, pairs in cells.items():
            for lr, accuracy in pairs:
                cell = f"{batch}-lr{lr:g}"
                rows.append(
                    Row(
                        table, cell, network, "sgd", batch, lr, warmup, 100, accuracy, remark=remark
                    )
                )
    return rows


def _table_3() -> list[Row]:
    plain = {512: 58.7, 4096: 58.5, 8192: 58.2, 16384: 55.0, 32768: 46.9}
    normalised = {512: 60.2, 4096: 60.4, 8192: 60.1, 16384: 59.3, 32768: 57.8}
    damaged = {
        ("3a", 8192): "lr illegible in the source: ~0Q~, which would fit 10",
        ("3a", 16384): "lr illegible in the source: ~4A~, which would fit 14",
        ("3b", 16384): "lr illegible in the source; its text: 59.3 for every lr in [13; 22]",
    }
    rows = []
    for table, network, warmup, cells in (
        ("3a", "alexnet", 2.0, plain),
        ("3b", "alexnet-bn", 5.0, normalised),
    ):
        for batch, accuracy in cells.items():
            lr = 14.0 if (table, batch) == ("3b", 8192) else None
            remark = "" if lr else damaged.get((table, batch), _ILLEGIBLE)
            rows.append(
                Row(
                    table, str(batch), network, "lars", batch, lr, warmup, 100, accuracy,
                    remark=remark,
                )
            )  # fmt: skip
    return rows


def _table_4() -> list[Row]:
    legend = "lr from the legend of Figure 4: the cell is damaged"
    cells = (
        (256, 4.0, 0.0, 73.8, 75.8, legend),
        (1024, 10.0, 5.0, 73.3, 75.4, legend),
        (8192, 30.0, 5.0, 73.5, 75.2, ""),
        (16384, 33.0, 12.0, 72.9, 74.4, ""),
        (32768, 40.0, 12.0, 72.5, 72.5, ""),
    )
    return [
        Row(
            "4", f"{batch}-{augment}", "resnet50", "lars", batch, lr, warmup, 100, accuracy,
            augment, remark,
        )
        for batch, lr, warmup, minimal, extended, remark in cells
        for augment, accuracy in (("minimal", minimal), ("extended", extended))
    ]  # fmt: skip


def _table_5() -> list[Row]:
    alexnet = {100: 55.0, 125: 55.9, 150: 56.7, 175: 57.3, 200: 58.2}
    normalised = {100: 57.8, 125: 59.2, 150: 59.5, 175: 59.5, 200: 59.9}
    resnet = {100: 74.4, 125: 74.1, 150: 74.6, 175: 74.8, 200: 75.5}
    same = "lr illegible in the source, as in Table 3"
    rows = []
    for table, network, batch, lr, warmup, cells, augment, remark in (
        ("5a", "alexnet", 16384, None, 2.0, alexnet, "minimal", same),
        ("5b", "alexnet-bn", 32768, None, 5.0, normalised, "minimal", same),
        ("5c", "resnet50", 16384, 33.0, 12.0, resnet, "extended", "lr and warm-up of Table 4"),
    ):
        for epochs, accuracy in cells.items():
            rows.append(
                Row(table, str(epochs), network, "lars", batch, lr, warmup, epochs, accuracy,
                    augment, remark)
            )  # fmt: skip
    return rows


def _table_6() -> list[Row]:
    cells: tuple[tuple[int, float, int, float, float | None], ...] = (
        (256, 4.0, 100, 5.0, 70.3),
        (1024, 6.0, 100, 10.0, 69.7),
        (2048, 7.0, 150, 25.0, None),
        (4096, 10.0, 200, 30.0, 69.9),
        (8192, 10.0, 250, 60.0, 69.0),
        (16384, 10.0, 350, 110.0, 67.2),
    )
    baseline = Row("6", "256-sgd", "googlenet", "sgd", 256, 0.02, 0.0, 100, 69.2, "minimal")
    return [
        baseline,
        *(
            Row("6", str(batch), "googlenet", "lars", batch, lr, warmup, epochs, accuracy,
                "extended", "" if accuracy else "accuracy illegible in the source (Tn)")
            for batch, lr, epochs, warmup, accuracy in cells
        ),
    ]  # fmt: skip


ROWS = (*_table_1(), *_table_3(), *_table_4(), *_table_5(), *_table_6())
RECIPES = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Layer:
    """A column of Table 2: AlexNet after one iteration. None is illegible."""

    name: str
    weight: float | None
    gradient: float | None
    ratio: float | None
    remark: str = ""


_EXCHANGED = (
    "norms under .b are larger than under .w, so the two heads may be exchanged in the source"
)
TABLE_2 = (
    Layer("conv1.b", 1.86, 0.22, 8.48),
    Layer("conv1.w", 0.098, 0.017, 5.76),
    Layer("conv2.b", 5.546, 0.165, 33.6),
    Layer("conv2.w", None, 0.002, 83.5, "N(w) illegible: 036; 0.16 or 0.17 by the ratio"),
    Layer("conv3.b", 9.40, 0.135, 69.9),
    Layer("conv3.w", 0.196, 0.0015, 127.0),
    Layer("conv4.b", 8.15, 0.109, 74.6),
    Layer("conv4.w", 0.196, 0.0013, 148.0),
    Layer("conv5.b", 6.65, 0.09, 73.6),
    Layer("conv5.w", None, None, 69.0, "0.16, 0.0002 and 69 do not agree"),
    Layer("fc6.b", 30.7, 0.26, 117.0),
    Layer("fc6.w", 6.4, 0.005, 1345.0),
    Layer("fc7.b", 20.5, 0.30, 68.0),
    Layer("fc7.w", 6.4, 0.013, 489.0),
    Layer("fc8.b", 20.2, 0.22, 93.0),
    Layer("fc8.w", 0.316, 0.016, 19.0),
)
TABLE_2_REMARK = _EXCHANGED
TABLE_2_SPREAD = (5.76, 1345.0)
"""The smallest and the largest ratio, which the text repeats: a factor of 233."""


def recipe(name: str) -> Row:
    """The row called `name`.

    Raises:
        StudyError: there is none.
    """
    if name not in RECIPES:
        close = [other for other in RECIPES if other.startswith(name.split("-")[0])]
        raise StudyError(
            f"--recipe {name} is unknown; choose from {', '.join(close or RECIPES)}"
            if close
            else f"--recipe {name} is unknown; `lars-study recipes` lists them"
        )
    return RECIPES[name]
