"""Images that are not what they look like, folders as others make them, and files of bad intent."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from _images import (
    assert_images,
    idx,
    old_pickle,
    pixels,
    png,
    write_cifar_binary,
    write_folder,
    write_idx,
)
from torch.utils.data import DataLoader, TensorDataset

from fastbandit import data
from fastbandit.data import DataError, ImageSet, files

LABELS = [0, 1, 0, 1]


def refused(source: object, message: str, **arguments: object) -> None:
    with pytest.raises(DataError, match=message):
        data.load(source, **arguments)


# --- layouts --------------------------------------------------------------------------------


def test_tensors_with_their_channels_last_are_refused():
    images, labels = torch.from_numpy(pixels(4, 8, 8, 3)), torch.tensor(LABELS)
    refused((images, labels), r"\[8, 8, 3\], which looks like \[H, W, C\]; permute the channels")
    refused((images[..., :1], labels), r"\[8, 8, 1\], which looks like")
    items = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    refused(items, r"item 0: .*\[8, 8, 3\], which looks like")
    refused((images[0, 0], labels[:1]), r"expected a tensor of images \[N, H, W\]")
    # Three channels first are channels, whatever comes last.
    ambiguous = images.permute(0, 3, 1, 2)[..., :3]
    assert data.load((ambiguous, labels)).train.shape == (3, 8, 3)
    # An ImageSet says by its type what its axes are.
    assert data.load(ImageSet(images, labels)).train.shape == (8, 8, 3)


def test_the_layout_of_arrays_in_a_dataset():
    images = pixels(4, 3, 8, 6)
    for arrays in (images, images.transpose(0, 2, 3, 1), images / np.float32(255)):
        source = data.load(list(zip(arrays, LABELS, strict=True)))
        assert_images(source.train, images, LABELS)
    grey = list(zip(images[:, :1], LABELS, strict=True))
    assert data.load(grey).train.shape == (1, 8, 6)
    refused([(pixels(3, 8, 3), 0)], r"item 0: \[1, 3, 8, 3\] may be")
    refused([(pixels(8, 8, 4), 0)], r"item 0: .*with 1 or 3 channels, got \[1, 8, 8, 4\]")
    refused([(pixels(8), 0)], r"item 0: expected an image \[C, H, W\] or .*got ndarray \[8\]")


def test_a_list_of_images_beside_a_list_of_labels():
    from PIL import Image

    images = pixels(4, 3, 8, 6)
    tensors, labels = list(torch.from_numpy(images)), torch.tensor(LABELS)
    pillow = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    for given in (list(images), tuple(images), tensors, pillow):
        for beside in (LABELS, labels, list(labels), np.array(LABELS)):
            source = data.load((given, beside), test=[given, beside])
            assert_images(source.train, images, LABELS)
            assert_images(source.test, images, LABELS)
    named = data.load((pillow, ["b", "a", "b", "c"]))
    assert named.class_names == ("a", "b", "c")
    assert named.train.labels.tolist() == [1, 0, 1, 2]
    small = [Image.new("RGB", (9, 7)), *pillow[1:]]
    refused((small, LABELS), r"row 1: expected 9 x 7 pixels .*--image-size N .*brings all")
    assert data.load((small, LABELS), image_size=5).train.shape == (3, 5, 5)
    refused((pillow, LABELS[:3]), "expected as many labels as images, got 4 images and 3 labels")
    refused((tensors, 3), r"expected labels \[N\], integers or text, got int")
    # Two items (image, label) are a data set, whatever holds them.
    for hold in (list, tuple):
        items = hold([(images[0], 0), [images[1], 1]])
        assert data.load(items).train.labels.tolist() == [0, 1]
        arrays = hold([(images[0], np.array([0])), (images[1], np.array([1]))])
        assert data.load(arrays).train.labels.tolist() == [0, 1]


def test_values_of_all_kinds():
    black_white = np.array([[[False, True]], [[True, False]]])
    for images in (black_white, torch.from_numpy(black_white)):
        labels = torch.tensor([0, 1])
        pair = (images, labels) if isinstance(images, torch.Tensor) else (images, labels.numpy())
        assert data.load(pair).train.images.flatten().tolist() == [0, 255, 255, 0]
    # One scale for each kind, so that a dataset may mix them.
    mixed = [
        (torch.full((1, 2, 2), 51, dtype=torch.uint8), 0),
        (torch.full((1, 2, 2), 0.2), 1),
        (torch.full((1, 2, 2), 0.2, dtype=torch.bfloat16), 1),
        (np.full((2, 2), 51, np.int16), np.int32(0)),
    ]
    assert data.load(mixed).train.images.unique().tolist() == [51]
    labels = np.array([0, 1])
    for images, message in (
        (pixels(2, 3, 3).astype(np.float32), r"as float32.*pass values 0 .. 255 as integers"),
        (pixels(2, 3, 3).astype(np.int8), r"got -\d+ as int8"),
        (pixels(2, 3, 3).astype(np.uint16) * 257, r"expected .* 0 .. 255 \(integer\)"),
        (np.full((2, 3, 3), np.inf), "got inf"),
        (np.zeros((2, 3, 3), np.complex64), "got complex64"),
    ):
        refused((images, labels), message)
    refused((torch.zeros(2, 3, 3).to_sparse(), torch.tensor(labels)), "training data: .*numbers")
    with pytest.warns(UserWarning, match="test data: the brightest pixel is 1 of 255"):
        data.load((pixels(2, 3, 3), labels), test=(np.ones((2, 3, 3), np.uint8), labels))


def test_labels_of_other_kinds_are_refused():
    images = pixels(4, 3, 3)
    for labels, message in (
        (np.eye(2)[LABELS], r"float64 \[4, 2\]; for labels in one-hot form pass their argmax"),
        (np.eye(2, dtype=np.int64)[LABELS], r"int64 \[4, 2\]; for labels in one-hot form"),
        (np.array(LABELS) == 1, "expected integer labels .N., got bool"),
        (np.array([0, 2, 0, 2]), "none of class 1"),
    ):
        refused((images, labels), message)
        if labels.dtype.kind == "b" or labels.ndim == 2:
            items = list(zip(images, labels, strict=True))
            refused(items, "item 0: expected an integer label")
    assert data.load((images, np.array(LABELS)), classes=np.int64(3)).classes == 3
    for classes in (1, True, "10", 2.0):
        refused((images, np.array(LABELS)), "classes: expected an integer of", classes=classes)
    refused({"images": images}, "expected one column of labels of label, .* got images")
    refused((images, np.array(LABELS)), "test data: .*got str", test="digits")


# --- encoded images -------------------------------------------------------------------------


def as_folder(folder: Path, content: bytes, suffix: str = ".png") -> Path:
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"0{suffix}").write_bytes(content)
    return folder


def png_of_16_bits(array: np.ndarray) -> bytes:
    """``[H, W, C]`` as PNG, which Pillow cannot write: C is 1 to 4 for grey, LA, RGB and RGBA."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(chunk)) + name + chunk
        content += struct.pack(">I", zlib.crc32(name + chunk))
    return content


def tiff_of_16_bits(array: np.ndarray) -> bytes:
    """``[H, W, 3]`` as TIFF, which Pillow cannot write."""
    height, width, _ = array.shape
    pixel_bytes = array.astype("<u2").tobytes()
    extra = 8 + 2 + 9 * 12 + 4  # where the bits for each channel stand; the pixels follow
    entries = (
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, extra), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, extra + 6), (277, 3, 1, 3), (278, 3, 1, height),
        (279, 4, 1, len(pixel_bytes)),
    )  # fmt: skip
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return content + struct.pack("<I3H", 0, 16, 16, 16) + pixel_bytes


@pytest.mark.parametrize("kind", ["png1", "png2", "png3", "png4", "tiff", "ppm", "plain ppm"])
def test_images_of_16_bits_are_refused(tmp_path, kind):
    image_module = pytest.importorskip("PIL.Image")
    image = np.full((2, 2, 3), 0x1234)
    if kind.startswith("png"):
        image = np.full((2, 2, int(kind[3:])), 0x1234)
        content = png_of_16_bits(image)
    elif kind == "tiff":
        content = tiff_of_16_bits(image)
    elif kind == "ppm":
        content = b"P6 2 2 65535\n" + image.astype(">u2").tobytes()
    else:
        content = b"P3 2 2 65535\n" + b" ".join(b"%d" % v for v in image.flatten())
    refused(as_folder(tmp_path, content), "0.png: expected 8 bits for each channel, got 16")
    refused([(image_module.open(io.BytesIO(content)), 0)], "item 0: expected 8 bits")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", [[[0, 255]]]),
        ("L", [[[0, 255]]]),
        ("LA", [[[0, 255]]]),
        ("P", [[[0, 255]], [[0, 255]], [[0, 255]]]),
        ("RGBA", [[[0, 255]], [[0, 255]], [[0, 255]]]),
    ],
)
def test_modes_of_png(tmp_path, mode, expected):
    content = png(np.array([[0, 255]], np.uint8), mode)
    source = data.load(as_folder(tmp_path, content))
    assert source.train.images.tolist() == [expected, expected]


def test_colours_of_print_and_palettes(tmp_path):
    red = np.full((8, 8, 3), [255, 0, 0], np.uint8)
    source = data.load(as_folder(tmp_path, png(red, "CMYK", "jpeg"), ".jpg"))
    assert (source.train.images[0, :, 4, 4].int() - torch.tensor([255, 0, 0])).abs().max() <= 2
    for mode, kind in (("I;16", "png"), ("I", "tiff"), ("F", "tiff")):
        content = png(np.zeros((8, 8), np.uint8), mode, kind)
        for name in ("ant", "bee"):
            (tmp_path / name / "0.jpg").write_bytes(content)
        refused(tmp_path, "expected (8 bits|a grey or RGB image of 8 bits) for each channel")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied(tmp_path, kind, orientation):
    image_module = pytest.importorskip("PIL.Image")
    # Two halves, so that what a lossy format does to an edge is no question of the direction.
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255
    exif = image_module.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image_module.fromarray(image).save(file, kind, exif=exif)
    source = data.load(as_folder(tmp_path, file.getvalue()))
    # 6: what is stored is turned by a quarter to the right before it is shown.
    upright = np.rot90(image, {1: 0, 3: 2, 6: -1, 8: 1}[orientation]).transpose(2, 0, 1)
    assert source.train.shape == upright.shape
    assert ((source.train.images[0] > 127).numpy() == (upright > 127)).all()
    if orientation > 1 and kind != "tiff":  # Pillow turns TIFF by itself
        opened = image_module.open(io.BytesIO(file.getvalue()))
        for given in (opened, opened.convert("RGB")):
            refused([(given, 0)], f"EXIF orientation {orientation}; apply PIL.ImageOps")


@pytest.mark.parametrize("kind", ["gif", "png", "tiff", "webp", "mpo"])
def test_files_of_several_frames_are_refused(tmp_path, kind):
    image_module = pytest.importorskip("PIL.Image")
    first, *others = (image_module.fromarray(pixels(8, 8, 3, seed=i)) for i in range(3))
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=others)
    refused(as_folder(tmp_path, file.getvalue()), "0.png: .*one image, got a file of 3 frames")
    refused([(image_module.open(file), 0)], "item 0: .*one image, got a file of 3 frames")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "ppm", "tiff", "webp"])
def test_truncated_images_are_refused(tmp_path, kind):
    content = png(pixels(12, 12, 3), kind=kind)
    folder = as_folder(tmp_path, content)
    for end in (len(content) // 4, len(content) // 2, len(content) * 7 // 8):
        (folder / "bee" / "0.png").write_bytes(content[:end])
        refused(folder, r"bee.0.png: (damaged|cannot be read)")


# --- image folders --------------------------------------------------------------------------


def test_files_that_are_left_out_are_counted(tmp_path):
    images = write_folder(tmp_path, (4, 5))
    (tmp_path / "ant" / "0.png").rename(tmp_path / "ant" / "0.PNG")
    hidden = ["ant/.DS_Store", "ant/Thumbs.db", "bee/desktop.ini", "bee/._0.png", ".x.png"]
    for name in hidden:
        (tmp_path / name).write_text("")
    (tmp_path / "ant" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX" / "ant").mkdir(parents=True)
    source = data.load(tmp_path)
    assert_images(source.train, images[:, None], [0, 0, 1, 1])
    assert "eft out" not in source.description
    for name in ("bee/1.heic", "bee/notes.txt", "labels.csv", "loose.png"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=r"left out 4 files .*, .*labels.csv for one"):
        source = data.load(tmp_path)
    assert "Left out 4 files not read as an image of a class." in source.description


def test_folders_of_two_depths_are_refused(tmp_path):
    write_folder(tmp_path, (4, 5))
    (tmp_path / "bee" / "more").mkdir()
    (tmp_path / "bee" / "1.png").rename(tmp_path / "bee" / "more" / "1.png")
    refused(tmp_path, "bee: expected the images of a class in one folder, got the folder 'more'")


def test_a_class_without_test_images_is_refused(tmp_path):
    for part in ("train", "test"):
        write_folder(tmp_path / part, (4, 5))
    (tmp_path / "test" / "bee").rename(tmp_path / "bee")
    refused(tmp_path, r"test: expected a folder for each class of .*train, got none for 'bee'")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_held_out_folders(tmp_path, name):
    write_folder(tmp_path / "train", (4, 5))
    held_out = write_folder(tmp_path / name, (4, 5), per_class=1)
    source = data.load(tmp_path)
    assert source.test is not None
    assert_images(source.test, held_out[:, None], [0, 1])
    assert f"The test images are those of {name}; there are no others." in source.description
    tested = write_folder(tmp_path / "test", (4, 5), per_class=2)
    with pytest.warns(UserWarning, match=f"{name} is not read: the test images are those of test"):
        source = data.load(tmp_path)
    assert_images(source.test, tested[:, None], [0, 0, 1, 1])
    assert f"{name.title()} is not read" in source.description
    for inner in (tmp_path / "test").rglob("*.png"):
        inner.unlink()
    for folder in (*(tmp_path / "test").iterdir(), tmp_path / "test"):
        folder.rmdir()
    (tmp_path / {"val": "validation"}.get(name, "val")).mkdir()
    refused(tmp_path, "expected one part to test on, got val and valid")


def test_held_out_arrays(tmp_path):
    path = tmp_path / "a.NPZ"
    images, labels = pixels(4, 5, 6), np.array(LABELS)
    train = {"train_images": images, "train_labels": labels}
    held_out = {"val_images": images[:2], "val_labels": labels[:2]}
    test = {"test_images": images[1:], "test_labels": labels[1:]}

    def write(arrays: dict[str, np.ndarray]) -> None:
        file = io.BytesIO()
        np.savez(file, **arrays)
        path.write_bytes(file.getvalue())

    write(train | held_out)
    source = data.load(path)
    assert_images(source.test, images[:2, None], labels[:2])
    assert "The test images are those of val" in source.description
    write(train | held_out | test)
    with pytest.warns(UserWarning, match="val is not read"):
        assert_images(data.load(path).test, images[1:, None], labels[1:])
    write(train | {"test_labels": labels})
    refused(path, "expected the array test_images beside test_labels, got none")
    write(train | {"x_train": images, "y_train": labels})
    refused(path, "expected the arrays train_images")
    write(train | {"train_images": np.asfortranarray(images.astype(">i4"))})
    assert_images(data.load(path).train, images[:, None], labels)


def test_parquet_parts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = {"image": [png(image) for image in pixels(4, 3, 3)], "label": LABELS}

    def write(name: str) -> Path:
        pq.write_table(pa.table(table), tmp_path / name)
        return tmp_path / name

    write("train-00000-of-00002.parquet")
    refused(tmp_path, "expected each of 2 parquet files of one set, got 1: train-00000-of-00002")
    second = write("train-00001-of-00002.Parquet")
    write("validation-00000-of-00001-0123abcd.parquet")
    source = data.load(tmp_path)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (8, 4)
    assert "The test images are those of validation" in source.description
    write("extra-00000-of-00002.parquet")
    with pytest.warns(UserWarning, match="left out 1 other, extra-00000-of-00002.parquet for one"):
        assert "Not read: extra-00000-of-00002.parquet." in data.load(tmp_path).description
    write("test.parquet")
    (tmp_path / "extra-00000-of-00002.parquet").unlink()
    with pytest.warns(UserWarning, match="validation is not read"):
        data.load(tmp_path)
    second.rename(tmp_path / "train-00000-of-00001.parquet")
    refused(tmp_path, r"expected each of 1 parquet files of one set, got 2: .*00001.parquet, ")
    table["img"] = table["image"]
    refused(write("both.parquet"), r"expected the columns 'image' \(or 'img'\)")


# --- the folders of others ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_torchvision_folder(tmp_path, name):
    images, labels = pixels(4, 5, 5), np.array(LABELS)
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for gz in (False, True):  # torchvision leaves both
            write_idx(raw, part, images, labels, gz)
    for folder in (tmp_path, tmp_path / name, raw):
        source = data.load(folder)
        assert source.name == name
        assert_images(source.train, images[:, None], labels)
        assert_images(source.test, images[:, None], labels)
    source = data.load(raw / "train-images-idx3-ubyte")
    assert_images(source.train, images[:, None], labels)
    refused(raw / "train-labels-idx1-ubyte", "the IDX file of training images, or a folder")
    write_idx(raw, "test", images, labels, False)
    refused(raw, "expected one IDX file of test images, got t10k-images.* and test-images")


def test_torchvision_folder_of_two_data_sets(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, "train", pixels(4, 5, 5), np.array(LABELS), False)
    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (cifar / name).write_bytes(old_pickle(pixels(2, 3072), [0, 1]))
    refused(tmp_path, "one data set, got MNIST/raw: IDX files, cifar-10-batches-py: CIFAR-10")
    assert data.load(cifar).name == "cifar10"
    raw.rename(tmp_path / "elsewhere")
    assert data.load(tmp_path).name == "cifar10"
    (cifar / "train.parquet").write_bytes(b"")
    refused(cifar, "expected one data set, got CIFAR-10, parquet; name its folder")


def test_emnist(tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pixels(4, 5, 6), np.array([1, 26, 2, 1])
    write_idx(raw, "emnist-letters-train", images, labels, False)
    write_idx(raw, "emnist-letters-test", images[:1], labels[:1], True)
    # Stored column by column: the transpose stands upright.
    upright = images.transpose(0, 2, 1)[:, None]
    source = data.load(tmp_path)
    assert (source.name, source.classes) == ("emnist-letters", 26)
    assert (source.class_names[0], source.class_names[25]) == ("a", "z")
    assert_images(source.train, upright, [0, 25, 1, 0])
    assert_images(source.test, upright[:1], [0])
    assert "images turned upright, labels 1 .. 26 read as 0 .. 25" in source.description
    write_idx(raw, "emnist-balanced-train", images, np.array([0, 10, 36, 46]), True)
    refused(tmp_path, "IDX files emnist-balanced, EMNIST/raw: IDX files emnist-letters; name its")
    source = data.load(raw / "emnist-balanced-train-images-idx3-ubyte.gz")
    assert [source.class_names[i] for i in source.train.labels] == ["0", "A", "a", "t"]
    assert_images(source.train, upright, [0, 10, 36, 46])
    (raw / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx(labels - 1))
    refused(raw / "emnist-letters-train-images-idx3-ubyte", "expected labels 1 .. 26, got 0")


# --- files of bad intent --------------------------------------------------------------------


@pytest.fixture
def peak():
    """The bytes that a call takes at most, over those that were taken before it."""

    def measure(call: Callable[[], object]) -> int:
        tracemalloc.start()
        call()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    return measure


def test_idx_that_claims_more_than_it_holds(tmp_path, peak):
    write_idx(tmp_path, "train", pixels(4, 3, 3), np.array(LABELS), False)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    huge = b"\0\0\x08\x03" + struct.pack(">3I", 60000, 2**31, 2**31) + content[16:]
    path.write_bytes(huge)
    refused(tmp_path, "expected .* bytes for .60000, 2147483648, 2147483648., got 52")
    path.unlink()
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(huge))
    refused(tmp_path, r"expected to unpack to 268,435,456 bytes at most .*IDX files .* no such")
    # More than the header says: not a byte of it is kept.
    packed.write_bytes(gzip.compress(content + bytes(32 << 20), compresslevel=1))
    message = r"expected 52 bytes for \[4, 3, 3\], got 52 and more"
    assert peak(lambda: refused(tmp_path, message)) < 4 << 20


def test_what_may_be_unpacked_grows_with_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE", 1000)
    images = np.zeros((2, 200, 200), np.uint8)
    images[:, 0, 0] = 255
    write_idx(tmp_path, "train", images, np.array([0, 1]), True)
    refused(tmp_path, r"images-idx3-ubyte.gz: expected to unpack to .* got 80,000")
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=[0, 1])
    refused(tmp_path / "a.npz", r"a.npz: images: expected to unpack to")
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
    assert len(data.load(tmp_path / "a.npz").train) == 2
    noise = pixels(2, 200, 200)
    write_idx(tmp_path, "train", noise, np.array([0, 1]), True)
    assert_images(data.load(tmp_path).train, noise[:, None], [0, 1])


def npz_member(shape: tuple[int, ...], dtype: str = "|u1", content: bytes = b"") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npz_member((2**20, 2**20, 2**20)), "expected 1,152,921,504,606,846,976 bytes for uint8"),
        (npz_member((2, -3, -3), content=bytes(18)), r"bytes for uint8 \[2, -3, -3\], got 18"),
        (npz_member((0, 10**30)), "damaged, or not .npz"),
        (npz_member((4, 3, 3), content=bytes(35)), "expected 36 bytes .* got 35"),
        (npz_member((4, 3, 3), content=bytes(37)), "expected 36 bytes .* got 37"),
        (npz_member((4, 3, 3), "|O", content=b"cposix\nsystem\n"), "got pickled objects"),
        (npz_member((4, 3, 3), "<M8[s]", bytes(288)), "an array of numbers, got datetime64"),
        (b"\x93NUMPY\x03\x00", "expected an array of numbers, got version"),
        (b"", "damaged, or not .npz"),
    ],
)
def test_bad_members_of_an_npz(tmp_path, member, message, peak):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member)
        archive.writestr("labels.npy", npz_member((4,), content=bytes(LABELS)))
    assert peak(lambda: refused(path, f"a.npz: images: .*{message}")) < 4 << 20


def test_other_members_of_an_npz_are_never_read(tmp_path):
    path = tmp_path / "a.npz"
    images = pixels(4, 3, 3)
    np.savez(path, images=images, labels=LABELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.npy", npz_member((2**60,), "|O"))
    assert_images(data.load(path).train, images[:, None], LABELS)


def test_an_npz_directory_that_claims_another_size(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=pixels(4, 3, 3), labels=LABELS)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # the unpacked size of the first member
    struct.pack_into("<I", content, at, 2**31)
    path.write_bytes(content)
    refused(path, "a.npz: images: expected to unpack to")


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_that_unpack_to_far_more_than_their_files(tmp_path, monkeypatch, peak):
    image_module = pytest.importorskip("PIL.Image")
    content = bytearray(png(pixels(3, 3, 3)))
    for side, message in (
        (9_460, "expected to unpack to 268,435,456"),
        (20_000, "damaged, or not"),
    ):
        struct.pack_into(">II", content, 16, side, side)
        struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
        folder = as_folder(tmp_path, bytes(content))
        assert peak(lambda: refused(folder, f"ant.0.png: {message}")) < 4 << 20  # noqa: B023
    # All images of a data set count together.
    monkeypatch.setattr(files, "FREE", 20_000)
    file = io.BytesIO()
    image_module.new("L", (128, 128)).save(file, "png")
    monkeypatch.setattr(files, "EXPANSION", 1)
    refused(as_folder(tmp_path, file.getvalue()), r"bee.0.png: expected to .* got 34,816")


def test_parquet_that_unpacks_to_far_more_than_its_file(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    image = png(pixels(8, 8)) + bytes(2_000_000)
    table = pa.table({"image": [image, image], "label": [0, 1]})
    pq.write_table(table, path, compression="gzip")
    assert len(data.load(path).train) == 2
    monkeypatch.setattr(files, "FREE", 1000)
    refused(path, "a.parquet: expected to unpack to")
    # A dictionary names one image many times; what is decoded counts against the file.
    image = png(pixels(64, 64))
    pq.write_table(pa.table({"image": [image] * 500, "label": [0] * 500}), path)
    refused(path, r"a.parquet: row \d+: expected to unpack to")
    # So does each row, however small its image, before any is read.
    pq.write_table(pa.table({"image": [b""] * 9000, "label": [0] * 9000}), path)
    refused(path, r"a.parquet: expected to unpack to .* got 9,216,000")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("kind", ["idx", "idx.gz", "cifar", "npz", "png", "parquet", "jpeg copy"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    write_idx(tmp_path, "train", pixels(4, 3, 3), np.array(LABELS), False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.unlink()
    source = tmp_path
    if kind == "idx.gz":
        path = tmp_path / "train-images-idx3-ubyte.gz"
    elif kind != "idx":
        (tmp_path / "train-labels-idx1-ubyte").unlink()
        path = source = tmp_path / "a.npz"
    if kind == "png":
        source = as_folder(tmp_path, png(pixels(3, 3)))
        path = tmp_path / "bee" / "1.png"
    elif kind == "parquet":
        source, path = tmp_path, tmp_path / "train.parquet"
    elif kind == "jpeg copy":
        source, path = tmp_path, tmp_path / "cifar10-jpeg.npz"
    elif kind == "cifar":
        source, path = tmp_path, tmp_path / "data_batch_3.bin"
        write_cifar_binary(tmp_path)
        path.unlink()
    os.mkfifo(path)
    refused(source, f"{path.name}: (expected a regular file, got )?a pipe")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed_and_devices_refused(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    images, labels = pixels(4, 3, 3), np.array(LABELS)
    write_idx(real, "train", images, labels, False)
    (tmp_path / "linked").symlink_to(real)
    assert_images(data.load(tmp_path / "linked").train, images[:, None], labels)
    path = real / "train-images-idx3-ubyte"
    path.rename(tmp_path / "images")
    path.symlink_to(tmp_path / "images")
    assert_images(data.load(real).train, images[:, None], labels)
    (tmp_path / "images").unlink()
    refused(real, f"{path.name}: expected a regular file, got a link to nothing")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert stat.S_ISCHR(path.stat().st_mode)
    refused(real, f"{path.name}: expected a regular file, got a device")
    refused("/dev/zero", "a device; expected digits")
    # A picture that is gone must not make a data set smaller.
    folder = as_folder(tmp_path / "pictures", png(pixels(3, 3)))
    (folder / "ant" / "1.png").symlink_to(tmp_path / "gone.png")
    refused(folder, r"1.png: expected a regular file, got a link to nothing")


def test_cifar_files_have_a_largest_size(tmp_path):
    write_cifar_binary(tmp_path)
    with (tmp_path / "data_batch_2.bin").open("r+b") as file:
        file.truncate(3073 << 20)  # a hole: it takes no room on the disk
    refused(tmp_path, re.escape("data_batch_2.bin: expected 67,108,864 bytes at most, got"))


# --- objects that are no arrays ---------------------------------------------------------------

NAMES = ["bee", "ant", "bee", "ant"]


def rows(images, labels):
    return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def as_frame(images, labels):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"img": list(images), "target": labels})


KINDS = {
    "dict": lambda x, y: {"images": x, "labels": y},
    "dict of lists": lambda x, y: {"image": list(x), "y": list(y)},
    "dict of files": lambda x, y: {"image": [png(image) for image in x], "label": y},
    "frame": as_frame,
    "rows": rows,
    "rows of files": lambda x, y: rows([{"bytes": png(image), "path": None} for image in x], y),
    "loader": lambda x, y: DataLoader(list(zip(x, y, strict=True)), batch_size=3, shuffle=True),
    "loader of rows": lambda x, y: DataLoader(rows(x, y), batch_size=3),
    "items": lambda x, y: list(zip(x, y, strict=True)),
    "pair": lambda x, y: (x, np.asarray(y)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_rows_and_loaders(kind):
    images = pixels(4, 3, 5)
    read = data.load(KINDS[kind](images, LABELS), test=(images[:1], np.array([1])))
    assert_images(read.train, images[:, None], LABELS)
    assert read.class_names == ()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_text(kind):
    """Numbered in the order of the alphabet, and the test images by the training images' names."""
    images = pixels(4, 3, 5)
    test = KINDS[kind](images[:1], ["bee"])
    read = data.load(KINDS[kind](images, NAMES), test=test)
    assert_images(read.train, images[:, None], [1, 0, 1, 0])
    assert read.test.labels.tolist() == [1]
    assert read.class_names == ("ant", "bee")
    with pytest.raises(DataError, match=r"test data.*one of the .* 2 classes, got 'cow'"):
        data.load(KINDS[kind](images, NAMES), test=KINDS[kind](images[:1], ["cow"]))
    with pytest.raises(DataError, match="test data: expected labels as text, as in the training"):
        data.load(KINDS[kind](images, NAMES), test=KINDS[kind](images[:1], [0]))


def test_objects_that_say_too_little_or_too_much():
    images = pixels(4, 3, 5)
    refused({"picture": images, "label": LABELS}, "one column of images of image, .* got picture")
    refused({"image": images, "x": images, "label": LABELS}, "got image, x")
    refused({"image": list(images), "label": LABELS[:3]}, "as many labels as images, got 4 .* 3")
    refused(rows(images, ["a", 1, "b", "a"]), "item 1: expected a text label, got 1")
    refused(DataLoader(list(images), batch_size=2), r"expected \(images, labels\), got Ten")
    sizes = [(pixels(3, 5), 0), (pixels(4, 5), 1)]
    refused(DataLoader(sizes, batch_size=1), r"batch 1: expected \[C, H, W\] = \[1, 3, 5\]")
    refused(DataLoader(TensorDataset(torch.zeros(0, 1, 2, 2)), batch_size=1), "got none")
