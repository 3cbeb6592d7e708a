"""Every form of DATA and PATH: what it yields, in which order, and that it is streamed."""

from __future__ import annotations

import builtins
import gzip
import os
import re
import shutil
import struct
import tracemalloc
from collections import deque
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from anomalyd.errors import CorruptImage, FormatNotAllowed, MissingExtra, SourceError, UsageError
from anomalyd.images import ImageSpec, to_pixels
from anomalyd.sources import cut, listed, open_evaluation, open_paths, open_pieces, open_source

SPEC = ImageSpec(28, 28, 1)


def pixels_of(source):
    return np.stack([to_pixels(item.payload, SPEC) for item in source])


def idx(values) -> bytes:
    values = np.asarray(values, np.uint8)
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture(scope="module")
def shirts(request):
    """The 200 images of the fixture's Fashion-MNIST test split, (200, 28, 28, 1)."""
    return pixels_of(open_source(request.getfixturevalue("fixture_data") / "fashion-mnist:test"))


def save_png(folder: Path, images, names=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = names[i] if names else f"{i:03}.png"
        Image.fromarray(image[..., 0]).save(folder / name, "PNG")


def save_parquet(path: Path, folder: Path, *, struct_column=True, **columns) -> None:
    files = sorted(folder.iterdir())
    data = [file.read_bytes() for file in files]
    image = [{"bytes": d, "path": f.name} for d, f in zip(data, files, strict=True)]
    table = pyarrow.table({"image": image if struct_column else data, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=16)


# --- the forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "folder",
        "idx",
        "idx.gz",
        "npy",
        "npy colour axis",
        "npz",
        "npz packed",
        "parquet",
        "binary",
    ],
)
def test_every_form_yields_the_same_images(form, shirts, tmp_path):
    """One set of images in nine forms: same pixels, same order, right length, twice."""
    images = shirts[:40]
    data = tmp_path / "data"
    if form in ("folder", "parquet", "binary"):
        save_png(tmp_path / "png", images)
        data = tmp_path / "png"
    if form in ("parquet", "binary"):
        data = tmp_path / "data.parquet"
        save_parquet(data, tmp_path / "png", struct_column=form == "parquet")
    elif form.startswith("idx"):
        raw = idx(images[..., 0])
        data.write_bytes(gzip.compress(raw) if form == "idx.gz" else raw)
    elif form.startswith("npy"):
        data = tmp_path / "data.npy"
        np.save(data, images if form == "npy colour axis" else images[..., 0])
    elif form.startswith("npz"):
        data = tmp_path / "data.npz"
        (np.savez_compressed if form == "npz packed" else np.savez)(data, x=images[..., 0])
    source = open_source(data)
    assert source.name == str(data)
    assert len(source) == 40
    for _ in range(2):
        np.testing.assert_array_equal(pixels_of(source), images)
    items = list(source)
    if form == "folder":
        assert [item.source for item in items] == [str(p) for p in sorted(data.iterdir())]
        assert {item.index for item in items} == {None}
    else:
        assert {item.source for item in items} == {str(data)}
        assert [item.index for item in items] == list(range(40))
    assert {(item.label, item.group, item.error) for item in items} == {(None, None, None)}


@settings(max_examples=40)
@given(
    images=arrays(
        np.uint8,
        st.one_of(
            st.tuples(*[st.integers(1, 5)] * 3),
            st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3])),
        ),
    ),
    form=st.sampled_from(["idx", "idx.gz", "npy", "npz"]),
)
def test_any_array_comes_back_as_it_was(images, form, tmp_path_factory):
    """IDX, .npy and .npz of any shape are read back image by image, unchanged."""
    path = tmp_path_factory.mktemp("any") / f"images.{form}"
    if form == "npy":
        np.save(path, images)
    elif form == "npz":
        np.savez(path, images=images)
    else:
        path.write_bytes(gzip.compress(idx(images)) if form == "idx.gz" else idx(images))
    source = open_source(path)
    assert len(source) == len(images)
    np.testing.assert_array_equal(np.stack([item.payload for item in source]), images)


def test_one_image_is_a_source(fixture_data, shirts):
    """A single file is a source of one item without index."""
    path = fixture_data / "images" / "boot.png"
    (item,) = open_source(path)
    assert (item.source, item.index, item.payload) == (str(path), None, path)


def test_a_folder_keeps_what_might_be_an_image(tmp_path, shirts):
    """Hidden files and known texts are left out; anything else is an item that will be named."""
    save_png(tmp_path, shirts[:2], ["b.png", "notice board.png"])
    for name in ("README.md", "LICENSE", ".DS_Store", "labels.csv", "x.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "a.bin").write_bytes(b"not an image")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / ".hidden").mkdir()
    save_png(tmp_path / ".hidden", shirts[:1])
    items = list(open_source(tmp_path))
    assert [Path(item.source).name for item in items] == [
        "a.bin",
        "b.png",
        "c.png",
        "notice board.png",
    ]
    with pytest.raises(FormatNotAllowed):
        to_pixels(items[0].payload, SPEC)
    with pytest.raises(CorruptImage):
        to_pixels(items[2].payload, SPEC)


def test_a_folder_may_mix_forms(tmp_path, shirts):
    """Images, then arrays, then sub-folders, each sorted by name."""
    save_png(tmp_path, shirts[:2])
    np.save(tmp_path / "a.npy", shirts[2:4])
    np.savez(tmp_path / "b.npz", images=shirts[4:6])
    save_png(tmp_path / "more", shirts[6:8])
    np.testing.assert_array_equal(pixels_of(open_source(tmp_path)), shirts[:8])


def test_a_link_back_to_the_folder_is_not_followed_forever(tmp_path, shirts):
    """A folder that contains itself is listed once."""
    save_png(tmp_path / "a", shirts[:3])
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_source(tmp_path)) == 3


def test_names_that_are_not_unicode_are_kept(tmp_path, shirts):
    """A file name of odd bytes is still read, and shown as text that JSON can hold."""
    save_png(tmp_path, shirts[:1])
    os.rename(tmp_path / "000.png", os.fsencode(tmp_path) + b"/\xff.png")
    (item,) = open_source(tmp_path)
    item.source.encode("utf-8")
    np.testing.assert_array_equal(to_pixels(item.payload, SPEC), shirts[0])


@settings(max_examples=25)
@given(names=st.sets(st.text("abcXYZ019 é漢.-_", min_size=1, max_size=8), min_size=1, max_size=12))
def test_order_depends_on_names_alone(names, tmp_path_factory):
    """However the files were created, they come sorted, and each once."""
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / f"n{name}.png").touch()
    found = [Path(item.payload).name for item in open_source(folder)]
    assert found == sorted(f"n{name}.png" for name in names)


# --- splits -----------------------------------------------------------------------------------


def test_splits_of_an_idx_folder(fixture_data):
    """The suffix wins, then the command's default; without either the splits are listed."""
    root = fixture_data / "fashion-mnist"
    assert len(open_source(f"{root}:train")) == 300
    assert len(open_source(f"{root}:test", split="train")) == 200
    assert len(open_source(root, split="train")) == 300
    with pytest.raises(SourceError, match="splits train, test; say which"):
        open_source(root)
    with pytest.raises(SourceError, match="no split validation; it has train, test"):
        open_source(f"{root}:val")
    with pytest.raises(SourceError, match="no split is called 'foo'"):
        open_source(f"{root}:foo")


@pytest.mark.parametrize("form", ["npy", "npz", "parquet", "folders"])
def test_splits_of_other_forms(form, tmp_path, shirts):
    """train.X and test.X, and folders train/ and test/, are splits alike."""
    parts = {"train": shirts[:5], "test": shirts[5:7]}
    for name, images in parts.items():
        if form == "npy":
            np.save(tmp_path / f"{name}.npy", images)
        elif form == "npz":
            np.savez(tmp_path / f"{name}.npz", images=images)
        elif form == "folders":
            save_png(tmp_path / name / "class", images)
        else:
            save_png(tmp_path / f".{name}", images)
            save_parquet(tmp_path / f"{name}-00000-of-00001.parquet", tmp_path / f".{name}")
    for name, images in parts.items():
        np.testing.assert_array_equal(pixels_of(open_source(f"{tmp_path}:{name}")), images)
    with pytest.raises(SourceError, match="say which"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_a_split(name, tmp_path, shirts):
    """train/, val/ and test/ are not mixed, whatever the one between is called."""
    for folder, images in {"train": shirts[:5], name: shirts[5:8], "test": shirts[8:9]}.items():
        save_png(tmp_path / folder, images)
    assert len(open_source(tmp_path, split="train")) == 5
    assert len(open_source(f"{tmp_path}:val")) == len(open_source(f"{tmp_path}:validation")) == 3
    with pytest.raises(SourceError, match="splits validation, train, test; say which"):
        open_source(tmp_path)


def test_a_folder_with_one_split_is_that_split(tmp_path, shirts):
    """A lone test file needs no suffix, whatever the command would take by default."""
    np.save(tmp_path / "test.npy", shirts[:3])
    assert len(open_source(tmp_path)) == 3
    assert len(open_source(tmp_path, split="train")) == 3
    assert len(open_source(f"{tmp_path}:test")) == 3
    with pytest.raises(SourceError, match="no split train; it has test"):
        open_source(f"{tmp_path}:train")


def test_classes_that_are_called_like_splits_are_classes(tmp_path, shirts):
    """A class folder "train" beside "truck" is no split: nothing is left out."""
    for name in ("train", "truck", "test"):
        save_png(tmp_path / name, shirts[:2])
    source = open_source(tmp_path, split="train", labels=True)
    assert [item.label for item in source] == ["test", "test", "train", "train", "truck", "truck"]


def test_a_nameless_file_beside_one_split_is_not_left_out(tmp_path, shirts):
    """With one file called train and another called otherwise, both count."""
    np.save(tmp_path / "train.npy", shirts[:2])
    np.save(tmp_path / "more.npy", shirts[2:3])
    assert len(open_source(tmp_path, split="train")) == 3


def test_splits_below_the_folder_are_ambiguous(fixture_data):
    """A folder of folders with splits would mix train and test: it says so."""
    with pytest.raises(SourceError, match="has the splits"):
        open_source(fixture_data, split="train")


def test_a_packed_file_beside_its_unpacked_one_counts_once(fixture_data, tmp_path):
    """`gunzip -k` does not double the data."""
    name = "t10k-images-idx3-ubyte.gz"
    shutil.copy(fixture_data / "mnist" / name, tmp_path / name)
    (tmp_path / name[:-3]).write_bytes(gzip.decompress((tmp_path / name).read_bytes()))
    assert len(open_source(tmp_path)) == 200


def test_a_colon_in_a_name_is_no_split(tmp_path, shirts):
    """A path that exists is taken as it is."""
    save_png(tmp_path / "a:test", shirts[:1])
    assert len(open_source(tmp_path / "a:test")) == 1


# --- labels and groups ------------------------------------------------------------------------


def test_labels_of_idx_npz_and_parquet(fixture_data, tmp_path, shirts):
    """The label file, the array labels and the column label name the same classes."""
    root = fixture_data / "fashion-mnist"
    labels = [item.label for item in open_source(f"{root}:test", labels=True)]
    assert set(labels) == set("0123456789")
    np.savez(tmp_path / "a.npz", images=shirts, labels=np.array([int(x) for x in labels]))
    assert [item.label for item in open_source(tmp_path / "a.npz", labels=True)] == labels
    save_png(tmp_path / "png", shirts)
    save_parquet(tmp_path / "a.parquet", tmp_path / "png", label=[int(x) for x in labels])
    assert [item.label for item in open_source(tmp_path / "a.parquet", labels=True)] == labels
    alone = open_source(root / "t10k-images-idx3-ubyte.gz", labels=True)
    assert [item.label for item in alone] == labels


def test_class_names_of_a_hugging_face_file_are_used(tmp_path, shirts):
    """A ClassLabel's names, kept in the metadata, replace its numbers."""
    save_png(tmp_path / "png", shirts[:3])
    save_parquet(tmp_path / "a.parquet", tmp_path / "png", label=[1, 0, 7])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    meta = (
        b'{"info": {"features": {"label": {"names": ["shirt", "boot"], "_type": "ClassLabel"}}}}'
    )
    table = table.replace_schema_metadata({b"huggingface": meta})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [item.label for item in open_source(tmp_path / "a.parquet", labels=True)]
    assert found == ["boot", "shirt", "7"]


def test_a_truncated_label_file_is_named(fixture_data, tmp_path):
    """It is the labels that are to be got again, and not the images."""
    for kind in ("images-idx3", "labels-idx1"):
        name = f"t10k-{kind}-ubyte"
        data = gzip.decompress((fixture_data / "mnist" / f"{name}.gz").read_bytes())
        (tmp_path / name).write_bytes(data[: -7 if "labels" in kind else None])
    with pytest.raises(SourceError, match="labels-idx1-ubyte: 193 of 200 labels are there"):
        list(open_source(tmp_path, labels=True))


def test_labels_of_folders(tmp_path, shirts):
    """The class is the first sub-folder, however deep the image lies."""
    save_png(tmp_path / "bags", shirts[:1])
    save_png(tmp_path / "shirts" / "striped", shirts[1:3])
    assert [item.label for item in open_source(tmp_path, labels=True)] == [
        "bags",
        "shirts",
        "shirts",
    ]


def test_labels_of_bytes_are_text(tmp_path, shirts):
    """Of columns and arrays of bytes, as if they were of text."""
    names = ["Stiefel", "Stöckel", "Hemd"]
    coded = [name.encode() for name in names]
    save_png(tmp_path / "png", shirts[:3])
    save_parquet(tmp_path / "a.parquet", tmp_path / "png", label=coded)
    np.savez(tmp_path / "a.npz", images=shirts[:3], labels=np.array(coded))
    for name in ("a.parquet", "a.npz"):
        assert [item.label for item in open_source(tmp_path / name, labels=True)] == names


@pytest.mark.parametrize("label", [[[1], [2]], [{"a": 1}, {"a": 2}]])
def test_nested_columns_are_no_labels(tmp_path, shirts, label):
    """A list or a struct names no class and no group; unasked for it is none of our business."""
    save_png(tmp_path / "png", shirts[:2])
    save_parquet(tmp_path / "a.parquet", tmp_path / "png", label=label)
    for asked in ({"labels": True}, {"group": "label"}):
        with pytest.raises(SourceError, match=r"column label is .* a number or a short text"):
            open_source(tmp_path / "a.parquet", **asked)
    assert len(list(open_source(tmp_path / "a.parquet"))) == 2


def test_labels_that_are_not_there(tmp_path, shirts):
    """Labels that were asked for and cannot be found are an error, at once."""
    save_png(tmp_path / "png", shirts[:2])
    np.save(tmp_path / "a.npy", shirts)
    np.savez(tmp_path / "a.npz", images=shirts)
    np.savez(tmp_path / "b.npz", images=shirts, labels=np.arange(3))
    np.savez(tmp_path / "c.npz", images=shirts, labels=np.array([{}] * 200, object))
    save_parquet(tmp_path / "a.parquet", tmp_path / "png")
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(shirts[..., 0]))
    (tmp_path / "y-images-idx3-ubyte").write_bytes(idx(shirts[..., 0]))
    (tmp_path / "y-labels-idx1-ubyte").write_bytes(idx(np.zeros(199)))
    names = "png", "a.npy", "a.npz", "b.npz", "c.npz", "a.parquet", "png/000.png"
    for name in (*names, "x-images-idx3-ubyte", "y-images-idx3-ubyte"):
        with pytest.raises(SourceError):
            open_source(tmp_path / name, labels=True)


def test_groups_of_paths_and_columns(tmp_path, shirts):
    """A pattern on the path below DATA, or a column's value, is the group."""
    save_png(tmp_path / "png" / "a", shirts[:3], ["t1_0.png", "t1_1.png", "t2_0.png"])
    data = tmp_path / "png"
    assert [i.group for i in open_source(data, group=r"t(\d+)_")] == ["1", "1", "2"]
    assert [i.group for i in open_source(data, group=r"^a/t\d+")] == ["a/t1", "a/t1", "a/t2"]
    save_parquet(tmp_path / "a.parquet", data / "a", part=["x", "x", "y"])
    assert [i.group for i in open_source(tmp_path / "a.parquet", group="part")] == ["x", "x", "y"]
    np.savez(tmp_path / "a.npz", images=shirts[:3], part=[7, 7, 8])
    assert [i.group for i in open_source(tmp_path / "a.npz", group="part")] == ["7", "7", "8"]


def test_groups_that_cannot_be(tmp_path, shirts):
    """A pattern without a match, no such column, no columns at all, and no pattern."""
    save_png(tmp_path / "png", shirts[:3])
    save_parquet(tmp_path / "a.parquet", tmp_path / "png")
    np.save(tmp_path / "a.npy", shirts)
    with pytest.raises(SourceError, match=r"matches nothing in 000\.png"):
        list(open_source(tmp_path / "png", group="tile"))
    with pytest.raises(UsageError, match="not a regular expression"):
        list(open_source(tmp_path / "png", group="("))
    for name in ("a.parquet", "a.npy"):
        with pytest.raises(SourceError, match="group by"):
            open_source(tmp_path / name, group="tile")


# --- a root with train/good, test/KIND and ground_truth/KIND -------------------------------------


@pytest.fixture
def tiles(tmp_path, shirts):
    root = tmp_path / "tiles"
    save_png(root / "train" / "good", shirts[:4])
    save_png(root / "test" / "good", shirts[4:6])
    save_png(root / "test" / "crack", shirts[6:9])
    save_png(root / "test" / "dent", shirts[9:10])
    save_png(root / "ground_truth" / "crack", shirts[:2], ["000_mask.png", "002.png"])
    (root / "tiles.csv").write_text("file,tile\n")
    return root


def test_evaluation_of_such_a_root(tiles, shirts):
    """test/good is normal, every other folder an outlier set, with the masks that exist."""
    evaluation = open_evaluation(tiles)
    np.testing.assert_array_equal(pixels_of(evaluation.normal), shirts[4:6])
    assert {kind: len(source) for kind, source in evaluation.outliers.items()} == {
        "crack": 3,
        "dent": 1,
    }
    cracks, masks = tiles / "test" / "crack", tiles / "ground_truth" / "crack"
    assert evaluation.masks == {
        str(cracks / "000.png"): masks / "000_mask.png",
        str(cracks / "002.png"): masks / "002.png",
    }


def test_training_on_such_a_root(tiles, shirts):
    """train ROOT takes train/good."""
    source = open_source(tiles, split="train", labels=True)
    np.testing.assert_array_equal(pixels_of(source), shirts[:4])
    assert {item.label for item in source} == {"good"}
    assert [item.label for item in open_source(f"{tiles}:test", labels=True)] == [
        *["crack"] * 3,
        "dent",
        *["good"] * 2,
    ]


def test_evaluation_of_anything_else_is_all_normal(fixture_data):
    """Without test/good there are no outliers of its own, and the split must be clear."""
    evaluation = open_evaluation(f"{fixture_data / 'mnist'}:test")
    assert len(evaluation.normal) == 200
    assert (evaluation.outliers, evaluation.masks) == ({}, {})
    stored = open_evaluation((fixture_data / "images").as_uri())
    assert len(stored.normal) == len(open_source(fixture_data / "images"))
    with pytest.raises(SourceError, match="say which"):
        open_evaluation(fixture_data / "mnist")


# --- several paths ----------------------------------------------------------------------------


def test_paths_are_chained_in_their_order(fixture_data):
    """Files and sets in one go, in the order given."""
    images = fixture_data / "images"
    source = open_paths([images / "shirt.png", f"{fixture_data / 'mnist'}:test", images])
    assert len(source) == 1 + 200 + 5
    found = [Path(item.source).name for item in source]
    assert found[0] == "shirt.png"
    assert found[-5:] == sorted(path.name for path in images.glob("*.png"))


def test_an_unreadable_path_among_others_is_named_and_nothing_else_lost(fixture_data, tmp_path):
    """A missing path is an item with an error; a set that breaks off is followed by the next."""
    raw = gzip.decompress((fixture_data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "cut-idx3-ubyte.gz").write_bytes(gzip.compress(raw[: 16 + 784 * 50 + 9]))
    boot = fixture_data / "images" / "boot.png"
    items = list(open_paths([tmp_path / "missing", tmp_path / "cut-idx3-ubyte.gz", boot]))
    assert [item.error is None for item in items] == [False, *[True] * 50, False, True]
    assert (items[0].source, items[0].index) == (str(tmp_path / "missing"), None)
    assert items[51].index == 50
    assert "image 50 of 200 is not whole" in str(items[51].error)


def test_one_bad_entry_does_not_lose_its_folder(tmp_path, shirts, monkeypatch):
    """For scoring it is an item among the others; for training the folder is refused as ever."""
    save_png(tmp_path / "good", shirts[:2])
    np.save(tmp_path / "float.npy", np.zeros((5, 28, 28)))
    (tmp_path / "locked").mkdir()
    (tmp_path / "splits").mkdir()
    for name in ("train", "test"):
        np.save(tmp_path / "splits" / f"{name}.npy", shirts[..., 0])
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = open_paths([tmp_path])
    items = list(source)
    assert len(source) == len(items) == 5
    found = {item.source.removeprefix(f"{tmp_path}/"): str(item.error) for item in items}
    assert list(found) == ["float.npy", "good/000.png", "good/001.png", "locked", "splits"]
    assert "its values are float64" in found["float.npy"]
    assert "Permission denied" in found["locked"]
    assert "it has the splits" in found["splits"]
    for run in cut(source, 2):
        items = items[len(list(open_pieces(run))) :]
    assert items == []
    with pytest.raises(SourceError, match="float64"):
        open_source(tmp_path)


def test_a_link_to_itself_is_an_item_that_cannot_be_read(tmp_path, shirts):
    """Whatever the folder is opened for; the images beside it are there."""
    save_png(tmp_path, shirts[:1], ["a.png"])
    (tmp_path / "b").symlink_to("b")
    for source in (open_source(tmp_path), open_paths([tmp_path])):
        good, loop = source
        assert to_pixels(good.payload, SPEC).shape == (28, 28, 1)
        with pytest.raises(CorruptImage):
            to_pixels(loop.payload, SPEC)


def test_nothing_readable_at_all_is_an_error(tmp_path):
    """If not one path can be opened, there is nothing to go on with."""
    with pytest.raises(SourceError, match="no such file"):
        open_paths([tmp_path / "a"])
    with pytest.raises(SourceError, match="none of 2 paths"):
        open_paths([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(SourceError, match="no path was given"):
        open_paths([])


# --- bad data ---------------------------------------------------------------------------------


def bad_files(folder: Path) -> None:
    shirts = np.zeros((5, 28, 28), np.uint8)
    raw = idx(shirts)
    (folder / "magic-idx3-ubyte").write_bytes(b"\1\2\3\4" + raw)
    (folder / "empty-idx3-ubyte").write_bytes(b"")
    (folder / "header-idx3-ubyte").write_bytes(raw[:9])
    (folder / "float-idx3-ubyte").write_bytes(raw[:2] + b"\x0d" + raw[3:])
    (folder / "labels-only-idx1-ubyte").write_bytes(idx(np.zeros(5)))
    (folder / "none-idx3-ubyte").write_bytes(idx(shirts[:0]))
    (folder / "huge-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 1, 1 << 31, 1 << 31))
    (folder / "gzip.gz").write_bytes(gzip.compress(b"no IDX inside"))
    (folder / "broken.gz").write_bytes(b"\x1f\x8b and then nothing")
    np.save(folder / "float.npy", shirts.astype(np.float32))
    np.save(folder / "flat.npy", shirts.reshape(5, -1))
    np.save(folder / "rgba.npy", np.zeros((5, 8, 8, 4), np.uint8))
    np.save(folder / "fortran.npy", np.asfortranarray(shirts))
    np.save(folder / "object.npy", np.array([{}, {}], object))
    (folder / "header.npy").write_bytes((folder / "float.npy").read_bytes()[:20])
    np.savez(folder / "two.npz", a=shirts, b=shirts)
    np.savez(folder / "none.npz")
    (folder / "no.npz").write_bytes(b"PK\x03\x04 but no archive")
    (folder / "no.parquet").write_bytes(b"PAR1 but no table")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), folder / "columns.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""]})[:0], folder / "rows.parquet")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "README.md").write_text("nothing here")
    os.mkfifo(folder / "pipe")


def test_what_cannot_be_read_is_a_source_error_of_one_line(tmp_path):
    """Every broken container names itself, says why, and shows no traceback's words."""
    bad_files(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SourceError) as caught:
            open_source(path)
        message = str(caught.value)
        assert str(path) in message, path
        assert "\n" not in message


@pytest.mark.parametrize("form", ["idx", "idx.gz", "gz cut", "npy", "npz"])
def test_a_file_that_breaks_off_gives_what_it_has_and_then_an_error(form, tmp_path, shirts):
    """The images before the damage are yielded; then the error names the file."""
    raw = idx(shirts[..., 0])
    path = tmp_path / f"data.{form.split()[0]}"
    if form == "npy":
        np.save(path, shirts)
        path.write_bytes(path.read_bytes()[:-1000])
    elif form == "npz":
        np.savez(path, images=shirts)
        data = bytearray(path.read_bytes())
        data[-1000] ^= 255  # within the last image: found by the checksum
        path.write_bytes(data)
    elif form == "gz cut":
        path.write_bytes(gzip.compress(raw)[:-3000])
    else:
        path.write_bytes(gzip.compress(raw[:-1000]) if form == "idx.gz" else raw[:-1000])
    source = open_source(path)
    assert len(source) == 200
    found = []
    with pytest.raises(SourceError, match=path.name):
        deque(map(found.append, source))
    assert len(found) >= 50


def damaged_parquet(path: Path, shirts: np.ndarray) -> None:
    """200 rows in groups of 16, of which two or three have no sound page any more."""
    save_png(path.parent / "png", shirts)
    save_parquet(path, path.parent / "png")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)


def test_a_damaged_row_group_loses_its_own_rows_alone(tmp_path, shirts):
    """Every row of the group is an item that names it; those before and behind are images."""
    damaged_parquet(tmp_path / "data.parquet", shirts)
    items = list(open_source(tmp_path / "data.parquet"))
    assert [item.index for item in items] == list(range(200))
    bad = [item.index for item in items if item.error is not None]
    assert 1 <= len(bad) <= 48
    assert items[0].error is items[-1].error is None
    assert re.search(r"row group \d+ of the file is damaged", str(items[bad[0]].error))


@pytest.mark.parametrize("form", ["folder", "idx", "idx.gz", "gz cut", "npy", "npz", "parquet"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_put_together_are_the_source(form, size, tmp_path, shirts):
    """Cut into runs of any size, whole or damaged, each item comes once and in order."""
    raw = idx(shirts[..., 0])
    path = tmp_path / f"data.{form.split()[0]}"
    if form == "folder":
        save_png(path, shirts[:20])
        save_png(path / "below", shirts[20:30])
    elif form == "npy":
        np.save(path, shirts)
    elif form == "npz":
        np.savez(path, images=shirts)
    elif form == "parquet":
        damaged_parquet(path, shirts)
    elif form == "gz cut":
        path.write_bytes(gzip.compress(raw)[:-9000])
    else:
        path.write_bytes(gzip.compress(raw + b"!") if form == "idx.gz" else raw[:-78_411])
    source = open_paths([path, tmp_path / "missing"])
    runs = list(cut(source, size))
    assert [sum(piece.count for piece in run) for run in runs[:-1]] == [size] * (len(runs) - 1)

    def told(items):
        return [(i.source, i.index, not i.error and bytes(i.payload), str(i.error)) for i in items]

    assert told(chain.from_iterable(map(open_pieces, runs))) == told(source)


def test_a_file_that_has_gone_since_it_was_cut_is_named_image_by_image(tmp_path, shirts):
    """Whoever opens a piece answers for each of its items."""
    np.save(tmp_path / "a.npy", shirts[:10])
    (_, second) = cut(open_paths([tmp_path / "a.npy"]), 6)
    (tmp_path / "a.npy").unlink()
    items = list(open_pieces(second))
    assert [item.index for item in items] == [6, 7, 8, 9]
    assert "cannot be read" in str(items[0].error)


def test_a_list_stands_for_its_lines(tmp_path):
    """@LIST is replaced by the paths in it, as often as they are there; others are kept."""
    (tmp_path / "list.txt").write_text("a.png\n\n b/c.parquet \na.png\n")
    assert listed(["x", f"@{tmp_path}/list.txt"]) == ["x", "a.png", "b/c.parquet", "a.png"]
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n")
    assert listed([f"@{tmp_path}/windows.txt"]) == ["a.png"]
    with pytest.raises(SourceError, match=r"the list cannot be read: No such file"):
        listed([f"@{tmp_path}/none.txt"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SourceError, match="the list is empty"):
        listed([f"@{tmp_path}/empty.txt"])


def test_stores_that_cannot_be_are_one_line(tmp_path):
    """An unknown scheme and a folder that is not there name the URI."""
    for uri in ("nonsense://x/y", f"file://{tmp_path}/missing"):
        with pytest.raises(SourceError, match=re.escape(uri)) as error:
            open_source(uri)
        assert "\n" not in str(error.value)


def test_a_stored_folder_is_read_like_a_local_one(tmp_path, shirts):
    """The same images under a URI: names are URIs, the order and the content the same."""
    save_png(tmp_path / "data", shirts[:8])
    save_png(tmp_path / "data" / "below", shirts[8:12])
    (tmp_path / "data" / "README.md").write_text("no image")
    save_parquet(tmp_path / "data" / "more.parquet", tmp_path / "data" / "below")
    local = list(open_source(tmp_path / "data"))
    stored = list(open_source(f"file://{tmp_path}/data"))
    assert [f"file://{item.source}" for item in local] == [item.source for item in stored]
    for here, there in zip(local, stored, strict=True):
        payload = here.payload if isinstance(here.payload, bytes) else here.payload.read_bytes()
        assert payload == there.payload
    runs = list(cut(open_paths([f"file://{tmp_path}/data"]), 5))
    again = [item.source for run in runs for item in open_pieces(run)]
    assert again == [item.source for item in stored]


def test_more_data_than_the_header_says_is_an_error(tmp_path, shirts):
    """A header that promises too little is damage too, not a reason to drop images."""
    path = tmp_path / "a-idx3-ubyte"
    path.write_bytes(idx(shirts[..., 0]) + b"x")
    with pytest.raises(SourceError, match="more data than its header's 200 images"):
        list(open_source(path))


def test_a_row_without_bytes_is_an_item_with_an_error(tmp_path, shirts):
    """A null image keeps its place and says what is missing."""
    save_png(tmp_path / "png", shirts[:1])
    data = (tmp_path / "png" / "000.png").read_bytes()
    image = [{"bytes": data, "path": "a"}, {"bytes": None, "path": "b"}, None]
    pyarrow.parquet.write_table(pyarrow.table({"image": image}), tmp_path / "a.parquet")
    items = list(open_source(tmp_path / "a.parquet"))
    assert [type(item.error) for item in items] == [type(None), CorruptImage, CorruptImage]
    assert [item.index for item in items] == [0, 1, 2]


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    """Parquet without pyarrow says what to install."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def no_arrow(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_arrow)
    with pytest.raises(MissingExtra, match=r"pip install 'anomalyd\[evaluate\]'"):
        open_source(tmp_path / "a.parquet")


# --- streaming --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["idx", "idx.gz", "npy", "npz", "parquet"])
def test_no_form_is_held_in_memory(form, tmp_path):
    """Eight megabytes of images pass through one megabyte."""
    images = np.random.default_rng(1).integers(0, 256, (500, 128, 128), np.uint8)
    path = tmp_path / f"data.{form}"
    if form == "npy":
        np.save(path, images)
    elif form == "npz":
        np.savez_compressed(path, images=images)
    elif form == "parquet":
        data = [image.tobytes() for image in images]
        pyarrow.parquet.write_table(pyarrow.table({"image": data}), path, row_group_size=100)
    else:
        path.write_bytes(idx(images) if form == "idx" else gzip.compress(idx(images), 1))
    del images
    source = open_source(path)
    arrow_before = pyarrow.total_allocated_bytes()
    arrow_peak = 0
    tracemalloc.start()
    count = 0
    for _ in source:
        count += 1
        arrow_peak = max(arrow_peak, pyarrow.total_allocated_bytes() - arrow_before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == len(source) == 500
    assert peak < (3 << 20 if form == "parquet" else 1 << 20)
    assert arrow_peak < 6 << 20


def test_a_folder_is_listed_once_and_no_image_is_opened(tmp_path, monkeypatch):
    """Length and two iterations cost one listing a folder; names are kept packed."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(500):
            (tmp_path / folder / f"{i:06}.png").touch()
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), real(path))[1])
    monkeypatch.setattr(builtins, "open", lambda *_: pytest.fail("a file was opened"))
    tracemalloc.start()
    source = open_source(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 1000
    assert sum(1 for _ in source) == sum(1 for _ in source) == 1000
    assert sorted(map(str, listed)) == sorted(map(str, (tmp_path, tmp_path / "a", tmp_path / "b")))
    assert kept < 1000 * 40  # 10 bytes a name, and what does not grow


# --- the full sets ----------------------------------------------------------------------------


def test_full_sets(full_data):
    """The full sets have the sizes and the mean that their authors publish."""
    assert len(open_source(full_data / "fashion-mnist", split="train")) == 60_000
    total = sum(int(item.payload.sum()) for item in open_source(f"{full_data}/mnist:train"))
    assert total / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=1e-4)
    cifar = open_source(f"{full_data}/cifar10:test", labels=True)
    assert len(cifar) == 10_000
    first = next(iter(cifar))
    assert to_pixels(first.payload, ImageSpec(32, 32, 3)).shape == (32, 32, 3)
    assert first.label in set("0123456789")
    tiles = open_evaluation(full_data / "magnetic-tile")
    assert len(tiles.normal) == 195
    assert len(tiles.masks) == sum(map(len, tiles.outliers.values())) == 197
