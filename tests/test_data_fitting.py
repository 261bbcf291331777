"""Images of any size and colour where that is asked for; arrays in files; published sets."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
import torch
from _images import assert_images, pixels, png, write_cifar_binary, write_folder, write_idx
from torch.utils.data import DataLoader

from fastbandit import data
from fastbandit.config import merge, to_plain
from fastbandit.data import DataError, ImageSet
from fastbandit.data.fitting import Fit
from fastbandit.data.published import PUBLISHED, Published, cache_folder, cached, download
from fastbandit.evaluate import EvaluateConfig
from fastbandit.runs.environment import run_id
from fastbandit.runs.training import TrainingConfig
from fastbandit.search import SearchConfig
from fastbandit.search import main as search
from fastbandit.study import main as study

LABELS = [0, 1, 0, 1]
PIL = pytest.importorskip("PIL.Image")


def mixed_folder(root):
    """Two classes; sizes and colours differ."""
    for name, shape in (("ant", (12, 8)), ("bee", (9, 15, 3))):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(png(pixels(*shape)))
    return root


def test_mixed_sizes_and_colours_are_refused_with_the_way_out_and_read_when_asked_for(tmp_path):
    root = mixed_folder(tmp_path / "set")
    with pytest.raises(DataError, match=r"expected a grey image .*; --image-color rgb \(or grey;"):
        data.load(root)
    with pytest.raises(DataError, match=r"expected 8 x 12 pixels .*; --image-size N \(image_size="):
        data.load(root, image_color="rgb")
    with pytest.raises(DataError, match="--image-color rgb"):
        data.load(root, image_size=6)
    read = data.load(root, image_size=6, image_color="rgb")
    assert read.train.images.shape == (2, 3, 6, 6)
    assert "brought to 6 x 6 pixels and made rgb" in read.description
    assert data.load(root, image_size=6, image_color="grey").train.images.shape == (2, 1, 6, 6)


def test_resized_as_torchvision_does():
    """The shorter side, antialiased, then the middle: by hand with Pillow."""
    wide = pixels(9, 15, 3)
    expected = PIL.fromarray(wide).resize((10, 6), PIL.Resampling.BILINEAR).crop((2, 0, 8, 6))
    found = Fit(6).array(wide.transpose(2, 0, 1), "x")
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))
    # Antialiased: a fine pattern of black and white becomes grey, and does not vanish.
    fine = np.indices((64, 64)).sum(0)[None] % 2 * np.uint8(255)
    small = Fit(8).array(fine.astype(np.uint8), "x")
    assert small.min() > 100
    assert small.max() < 155


@pytest.mark.parametrize(
    "given",
    [
        lambda x: (x, np.array(LABELS)),
        lambda x: list(zip(x, LABELS, strict=True)),
        lambda x: list(zip([PIL.fromarray(image) for image in x], LABELS, strict=True)),
        lambda x: {"image": [png(image) for image in x], "label": LABELS},
        lambda x: DataLoader(list(zip(x.transpose(0, 3, 1, 2), LABELS, strict=True)), batch_size=2),
        lambda x: ImageSet(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(LABELS)),
    ],
)
def test_arrays_files_and_objects_give_the_same(given):
    images = pixels(4, 10, 8, 3)
    read = data.load(given(images), image_size=5, image_color="grey")
    grey = [np.asarray(PIL.fromarray(image).convert("L")) for image in images]
    expected = np.stack([Fit(5).array(image[None], "x") for image in grey])
    assert_images(read.train, expected, LABELS)
    assert data.load(given(images), image_color="rgb").digest == data.load(given(images)).digest


def test_grey_to_colour_and_sizes_of_items():
    items = [(pixels(6, 6), 0), (pixels(9, 7), 1)]
    with pytest.raises(DataError, match=r"as in item 0.*; image_size=N and image_color='rgb' make"):
        data.load(items)
    read = data.load(items, image_size=4, image_color="rgb", test=items[:1])
    assert read.train.images.shape == (2, 3, 4, 4)
    assert torch.equal(read.train.images[:, 0], read.train.images[:, 2])
    assert read.test.images.shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size: expected an integer of at least 1, got 0"),
        ({"image_size": "8"}, "image_size: expected an integer of at least 1, got '8'"),
        ({"image_color": "red"}, "image_color: expected rgb or grey, got 'red'"),
    ],
)
def test_what_images_cannot_be_brought_to(settings, message):
    with pytest.raises(DataError, match=message):
        data.load("digits", **settings)
    with pytest.raises(DataError, match=r"image_color: expected images of 1 or 3 channels, got 2"):
        data.load((torch.rand(2, 2, 4, 4), torch.arange(2)), image_color="rgb")


def test_the_settings_of_commands(tmp_path, capsys):
    """Unset, they leave a configuration, and so a run id, what it was before they were there."""
    for kind in (SearchConfig, TrainingConfig, EvaluateConfig):
        plain = to_plain(kind())
        assert not {"image_size", "image_color"} & set(plain)
        asked = merge(kind(), {"image_size": 6, "image_color": "rgb"}, "test")
        assert to_plain(asked) == {**plain, "image_size": 6, "image_color": "rgb"}
        assert merge(kind(), to_plain(asked), "file") == asked
    assert run_id(to_plain(SearchConfig())) != run_id(to_plain(SearchConfig(image_size=6)))
    root = mixed_folder(tmp_path / "set")
    assert search(["--data", str(root), "--dry-run"]) == 1
    assert "--image-color rgb" in capsys.readouterr().err


# --- arrays in files --------------------------------------------------------------------------


def test_npz_of_x_and_y_and_text_labels(tmp_path):
    images, names = pixels(4, 3, 5), np.array(["bee", "ant", "bee", "ant"])
    np.savez(tmp_path / "a.npz", x=images, y=names)
    read = data.load(tmp_path / "a.npz")
    assert_images(read.train, images[:, None], [1, 0, 1, 0])
    assert read.class_names == ("ant", "bee")
    np.savez(
        tmp_path / "b.npz", x_train=images, y_train=names, x_test=images[:1], y_test=names[1:2]
    )
    assert data.load(tmp_path / "b.npz").test.labels.tolist() == [0]


def test_a_folder_of_npy_files(tmp_path):
    images = pixels(4, 3, 5)
    for name, array in (("x", images), ("y", np.array(LABELS))):
        np.save(tmp_path / f"{name}.npy", array)
    assert_images(data.load(tmp_path).train, images[:, None], LABELS)
    (tmp_path / "y.npy").unlink()
    with pytest.raises(DataError, match=r"expected the array y beside x, got none"):
        data.load(tmp_path)
    np.save(tmp_path / "y.npy", np.array([{}, {}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a .npy file of numbers"):
        data.load(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in ("train", "test"):
        np.save(parts / f"{part}_images.npy", images)
        np.save(parts / f"{part}_labels.npy", np.array(LABELS))
    assert len(data.load(parts).test) == 4


def test_text_labels_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = [png(image) for image in pixels(4, 3, 5)]

    def write(name, labels):
        parquet.write_table(
            pyarrow.table({"image": files[: len(labels)], "label": labels}), tmp_path / name
        )

    write("train.parquet", ["bee", "ant", "bee", "ant"])
    write("test.parquet", ["bee"])
    read = data.load(tmp_path)
    assert read.train.labels.tolist() == [1, 0, 1, 0]
    assert (read.test.labels.tolist(), read.class_names) == ([1], ("ant", "bee"))
    write("test.parquet", ["cow"])
    with pytest.raises(DataError, match="got 'cow'"):
        data.load(tmp_path)


def test_two_paths_and_the_layout_of_ultralytics(tmp_path):
    for part in ("a/train", "a/val", "b"):
        write_folder(tmp_path / part, (4, 4))
    both = data.load(tmp_path / "a" / "train", tmp_path / "b")
    assert len(both.train) == len(both.test) == 4
    assert "The test images are those of b." in both.description
    assert len(data.load(tmp_path / "a").test) == 4
    write_folder(tmp_path / "c", (4, 5))
    with pytest.raises(DataError, match="image_size and image_color make them alike"):
        data.load(tmp_path / "b", tmp_path / "c")
    (tmp_path / "b" / "ant").rename(tmp_path / "b" / "wasp")
    with pytest.raises(
        DataError, match=r"expected the classes of train \(2: ant, bee\), got 2: bee"
    ):
        data.load(tmp_path / "a" / "train", tmp_path / "b")
    with pytest.raises(DataError, match="test: expected a path as the training data, got tuple"):
        data.load(tmp_path / "b", (pixels(1, 4, 4), np.array([0])))


def test_a_source_prints_two_lines():
    source = data.load("digits")
    lines = repr(source).splitlines()
    assert lines[0] == "digits: 3,823 training and 1,797 test images [1, 8, 8], 10 classes"
    assert lines[1].startswith("  UCI Optical Recognition")
    assert len(lines) == 2
    assert len(lines[1]) < 95
    assert repr(source.train) == "ImageSet(3,823 images [1, 8, 8] on cpu)"


# --- published sets ---------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of ``served``, and a cache."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(served))
    monkeypatch.setenv("FASTBANDIT_DATA", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield served, f"http://127.0.0.1:{made.server_port}/"
        made.shutdown()
        thread.join()


def publish(monkeypatch, name, address, files, members=()):
    digests = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(PUBLISHED, name, Published(name.upper(), address, digests, members))


def test_what_a_preset_needs_is_said_and_fetched(server, monkeypatch, capsys, tmp_path):
    served, address = server
    monkeypatch.chdir(tmp_path)
    for part in ("train", "t10k"):
        write_idx(served, part, pixels(12, 8, 8), np.arange(12) % 10, gz=True)
    files = {path.name: path.read_bytes() for path in served.iterdir()}
    publish(monkeypatch, "mnist", address, files)
    arguments = ["--preset", "mnist", "--print-config"]
    assert search(["--preset", "mnist", "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert f"MNIST is published at {address} (t" in error
    assert "give --data FOLDER with its files, or --download to fetch them to" in error
    assert search([*arguments, "--download"]) == 0  # prints, and fetches nothing
    assert cached("mnist") is None
    said = []
    folder = download("mnist", say=said.append)
    assert len(said) == 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    read = data.load("mnist")
    assert (read.name, len(read.train), len(read.test)) == ("mnist", 12, 12)
    # Once fetched the network is not needed; a folder of that name goes first.
    assert download("mnist", address="http://127.0.0.1:9/", say=said.append) == folder
    assert len(said) == 4
    write_folder(tmp_path / "mnist", (4, 4))
    assert data.load("mnist").train.shape == (1, 4, 4)


def test_an_archive_is_fetched_and_only_what_is_needed_is_kept(server, monkeypatch, tmp_path):
    served, address = server
    (tmp_path / "made").mkdir()
    write_cifar_binary(tmp_path / "made")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(tmp_path / "made", "cifar-10-batches-bin")
        other = tarfile.TarInfo("../outside.txt")
        archive.addfile(other)
    (served / "c.tar.gz").write_bytes(content.getvalue())
    members = PUBLISHED["cifar10"].members
    publish(monkeypatch, "cifar10", address, {"c.tar.gz": content.getvalue()}, members)
    folder = download("cifar10")
    assert sorted(path.name for path in folder.iterdir()) == sorted(members)
    assert len(data.load("cifar10").train) == 10


def test_a_file_that_is_not_the_published_one_is_not_kept(server, monkeypatch):
    served, address = server
    publish(monkeypatch, "mnist", address, {"a-ubyte.gz": b"right"})
    (served / "a-ubyte.gz").write_bytes(b"wrong")
    with pytest.raises(DataError, match=r"expected the MD5 7c4f.*nothing was kept"):
        download("mnist")
    assert not list((cache_folder() / "mnist").iterdir())
    publish(monkeypatch, "mnist", address, {"absent": b"right"})
    with pytest.raises(DataError, match=r"absent: cannot be fetched: .*give --data FOLDER"):
        download("mnist")
    with pytest.raises(DataError, match="download: expected one of mnist, fashion-mnist, cifar10"):
        download("digits")
    with pytest.raises(DataError, match=r"got 'mnits'; did you mean mnist\?"):
        download("mnits")


def test_a_study_whose_images_are_published_fetches_them_too(server, monkeypatch, capsys, tmp_path):
    served, address = server
    monkeypatch.chdir(tmp_path)
    for part in ("train", "t10k"):
        write_idx(served, part, pixels(12, 8, 8), np.arange(12) % 10, gz=True)
    files = {path.name: path.read_bytes() for path in served.iterdir()}
    publish(monkeypatch, "fashion-mnist", address, files)
    arguments = ["--preset", "compare-fashion", "--dry-run"]
    assert study(arguments) == 1
    assert "or --download to fetch them to" in capsys.readouterr().err
    study([*arguments, "--download"])
    assert sorted(path.name for path in cached("fashion-mnist").iterdir()) == sorted(files)


def test_an_array_alone_is_no_data_set(tmp_path):
    np.save(tmp_path / "x.npy", pixels(12, 8, 8))
    with pytest.raises(DataError, match=r"for CIFAR-10 and \.npy files name the folder"):
        data.load(tmp_path / "x.npy")


def test_a_name_that_is_nearly_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder; .*; did you mean digits\?"):
        data.load("digts")
    assert search(["--data", "digts", "--dry-run"]) == 1
    assert "did you mean digits?" in capsys.readouterr().err
