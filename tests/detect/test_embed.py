"""Embeddings of whole sources: every image its own vector, in order, in every format."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from onnx import TensorProto, helper

from anomalyd import cli
from anomalyd.detect.embed import embed, open_labelled
from anomalyd.detect.output import ROWS_AT_A_TIME
from anomalyd.detect.pipeline import AHEAD, LARGEST_SLAB
from anomalyd.errors import BundleError, UsageError
from anomalyd.sources import Item, open_paths

N = 60
IMAGES = tiny.draw(N, seed=70)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.tiny_autoencoder(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def source(tmp_path):
    """60 drawn images with a broken file between two arrays."""
    np.save(tmp_path / "a.npy", IMAGES[:10])
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.save(tmp_path / "c.npy", IMAGES[10:])
    return open_paths([tmp_path / name for name in ("a.npy", "b.png", "c.npy")])


def with_embedding() -> bytes:
    """The tiny density with an encoder: its embedding is its statistics."""
    model = tiny.tiny_model()
    model.graph.node.append(helper.make_node("Identity", ["statistics"], ["embedding"]))
    value = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 2])
    model.graph.output.append(value)
    return model.SerializeToString()


def test_parquet_has_a_row_an_input_in_order(bundle, source, tmp_path):
    """A list of float32 of fixed size; what cannot be read has its place and its error."""
    path, seen = tmp_path / "x.parquet", []
    done = embed(bundle, source, path, device="cpu", progress=seen.append)
    assert (done.images, done.unreadable, done.features) == (N + 1, 1, 2)
    assert sum(seen) == N + 1
    table = pq.read_table(path)
    assert table.column_names == ["source", "index", "label", "embedding", "error"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == [*range(10), None, *range(N - 10)]
    assert rows[10]["embedding"] is None
    assert rows[10]["source"].endswith("b.png")
    assert rows[10]["error"]
    vectors = [row["embedding"] for row in rows if row["error"] is None]
    np.testing.assert_allclose(vectors, tiny.embedding(IMAGES), rtol=1e-6)


def test_csv_and_json_lines_say_the_same(bundle, source, tmp_path):
    """A column a number, or a list; the float32 values themselves, to the last bit."""
    paths = [tmp_path / f"x.{ending}" for ending in ("parquet", "csv", "jsonl")]
    for path in paths:
        embed(bundle, source, path, device="cpu")
    expected = pq.read_table(paths[0])["embedding"].to_pylist()
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["source", "index", "label", "embedding_0", "embedding_1", "error"]
    found = [[float(row[f"embedding_{i}"]) for i in (0, 1)] for row in rows if not row["error"]]
    assert found == [vector for vector in expected if vector is not None]
    lines = [json.loads(line) for line in paths[2].read_text().splitlines()]
    assert [line.get("embedding") for line in lines] == expected
    assert set(lines[10]) == {"source", "index", "error"}


def test_labels_come_along_where_there_are_some(bundle, tmp_path):
    """An array of labels is a column; without one it is null."""
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=np.arange(N) % 3)
    np.savez(tmp_path / "y.npz", images=IMAGES)
    labels = {}
    for name in "xy":
        path = tmp_path / f"{name}.parquet"
        embed(bundle, open_labelled(tmp_path / f"{name}.npz"), path, device="cpu")
        labels[name] = pq.read_table(path)["label"].to_pylist()
    assert labels["x"] == [str(i % 3) for i in range(N)]
    assert labels["y"] == [None] * N
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "z.npy", IMAGES)
    done = embed(bundle, open_labelled(tmp_path / "arrays"), tmp_path / "z.csv", device="cpu")
    assert (done.images, done.unreadable) == (N, 0)


def test_every_kind_with_an_encoder_embeds(tmp_path):
    """A classifier does, and a density whose graph has the output."""
    np.save(tmp_path / "x.npy", IMAGES)
    outputs = tiny.tiny_manifest().outputs | {"embedding": {"unit": "mixed"}}
    density = tiny.tiny_bundle(tmp_path, outputs=outputs, files={"model.onnx": with_embedding()})
    expected = {tiny.tiny_classifier(tmp_path): tiny.embedding, density: tiny.statistics}
    for bundle, vectors in expected.items():
        path = tmp_path / "x.parquet"
        embed(bundle, open_paths([tmp_path / "x.npy"]), path, device="cpu")
        found = pq.read_table(path)["embedding"].to_pylist()
        np.testing.assert_allclose(found, vectors(IMAGES), rtol=1e-5)


def test_a_bundle_without_an_encoder_says_which_have_one(source, tmp_path):
    """One line, and no file."""
    bundle = tiny.tiny_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"no encoder .*classifiers, autoencoders") as caught:
        embed(bundle, source, tmp_path / "x.csv", device="cpu")
    tiny.check_line(caught.value)
    assert not (tmp_path / "x.csv").exists()


class Endless:
    """More images than memory holds, of which the reader may take only what it needs."""

    name = "endless"

    def __init__(self, count):
        self.count, self.read, self.dies = count, 0, False

    def __len__(self):
        return self.count

    def __iter__(self):
        for index in range(self.count):
            self.read += 1
            yield Item("x", index, IMAGES[index % N])
        if self.dies:
            raise KeyboardInterrupt


def test_no_more_is_in_memory_than_a_few_slabs(bundle, tmp_path):
    """Images read and not yet embedded stay below a bound, however many there are."""
    source, done, ahead = Endless(10_000), 0, 0

    def progress(count):
        nonlocal done, ahead
        done += count
        ahead = max(ahead, source.read - done)

    embed(bundle, source, tmp_path / "x.jsonl", device="cpu", progress=progress)
    assert done == 10_000
    assert ahead <= AHEAD * LARGEST_SLAB * 32 + ROWS_AT_A_TIME < 10_000


def test_an_interrupted_file_is_not_there(bundle, tmp_path):
    """The old file stays until the new one is whole, and nothing else is left."""
    path, source = tmp_path / "x.csv", Endless(5_000)
    path.write_text("old")
    source.dies = True
    with pytest.raises(KeyboardInterrupt):
        embed(bundle, source, path, device="cpu")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


def test_another_ending_is_refused_at_once(bundle, source, tmp_path):
    """The file's name says the format."""
    with pytest.raises(UsageError, match=r"must end in \.parquet, \.jsonl, \.csv"):
        embed(bundle, source, tmp_path / "x.npy", device="cpu")


def test_the_command_line(bundle, source, tmp_path, capfd):
    """0 done, 3 with unreadable inputs, 1 where none can be read; one line each on stderr."""
    for data, code, says in (
        (tmp_path / "c.npy", 0, "x.csv: 50 images, 2 numbers each\n"),
        (tmp_path, 3, "x.csv: 61 images, 2 numbers each, 1 could not be read\n"),
        (tmp_path / "b.png", 1, f"could be read; the first says: {tmp_path / 'b.png'}: "),
        (tmp_path / "none", 1, "no such file or folder; check the path\n"),
    ):
        output = tmp_path / "out" / "x.csv"
        output.parent.mkdir(exist_ok=True)
        command = ["embed", bundle, data, "--output", output, "--device", "cpu"]
        assert cli.main([str(word) for word in command]) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert says in err
        assert err.count("\n") == 1
