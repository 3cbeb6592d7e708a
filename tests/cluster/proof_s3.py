"""Images in and scores out of an S3 server that runs beside the cluster."""

from __future__ import annotations

import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import S3FileSystem
from ray_nodes import KEYS, ROOT, VAE, png, rows_of, run

from anomalyd.sources import open_source

pytestmark = pytest.mark.by("Ray, moto")


@pytest.fixture(scope="module")
def bucket(store) -> S3FileSystem:
    """A bucket with 60 PNG in two folders, a file that is none, and a Parquet file of 60 more."""
    files = store
    files.create_dir("pictures")
    items = list(open_source(ROOT / "tests/fixtures/fashion-mnist", split="test"))[:60]
    images = []
    for number, item in enumerate(items):
        images.append(png(item.payload))
        folder = "day" if number % 2 else "night"
        with files.open_output_stream(f"pictures/{folder}/{number:03d}.png") as stream:
            stream.write(images[-1])
    with files.open_output_stream("pictures/night/notes.bin") as stream:
        stream.write(b"no image")
    with files.open_output_stream("pictures/more.parquet") as stream:
        pq.write_table(pa.table({"image": images}), stream, row_group_size=16)
    return files


def keys(endpoint: str) -> dict[str, str]:
    return KEYS | {"AWS_ENDPOINT_URL": endpoint}


def test_a_bucket_is_scored_into_a_bucket(nodes, bucket, s3, tmp_path):
    """The rows of the local engine, from s3:// to s3://; the second run has nothing to do."""
    asked = ["score", VAE, "s3://pictures"]
    code, said = run(*asked, "--output", tmp_path / "local.parquet", **keys(s3))
    assert code == 3, said
    remote = [
        *asked, "--engine", "ray", "--ray-address", nodes.address, "--output", "s3://pictures-scores/run/",
    ]  # fmt: skip
    bucket.create_dir("pictures-scores")
    code, heard = run(*remote, size=25, **keys(s3))
    assert (code, heard) == (3, said), heard
    names = sorted(i.base_name for i in bucket.get_file_info(_below("pictures-scores/run")))
    assert names[:2] == ["_manifest.json", "_plan.parquet"]
    parts = [name for name in names if name.startswith("part-")]
    assert len(parts) == 5
    for name in parts:
        (tmp_path / name).write_bytes(
            bucket.open_input_stream(f"pictures-scores/run/{name}").read()
        )
    local, rows = pq.read_table(tmp_path / "local.parquet").to_pylist(), rows_of(tmp_path)
    places = [(row["source"], row["index"], row["error"]) for row in rows]
    assert places == [(row["source"], row["index"], row["error"]) for row in local]
    assert len(rows) == 121
    assert sum(row["error"] is not None for row in rows) == 1
    scores = np.array([[r["score"] for r in part if r["error"] is None] for part in (local, rows)])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    # In a file and as a file it is the same image.
    by_name = {row["source"][-7:]: row["score"] for row in rows if row["index"] is None}
    stored = [row["score"] for row in rows if row["index"] is not None]
    assert stored == pytest.approx([by_name[f"{n:03d}.png"] for n in range(60)], abs=1e-4)
    assert run(*remote, **keys(s3)) == (3, said)


def _below(path: str):
    from pyarrow.fs import FileSelector

    return FileSelector(path)


@pytest.mark.parametrize(
    ("path", "output", "says"),
    [
        ("s3://nothing-here/x", "{tmp}", "no such file or folder"),
        ("s3://pictures/more.parquet", "s3://nothing-here/x", "there is no such bucket"),
        ("s3://pictures/night/notes.bin", "{tmp}", "none of 1 inputs could be read"),
    ],
)
def test_buckets_that_are_not_there_are_one_line(nodes, bucket, s3, tmp_path, path, output, says):
    """The line names the URI."""
    output = output.format(tmp=tmp_path / "out")
    code, said = run(
        "score", VAE, path, "--engine", "ray", "--ray-address", nodes.address, "--output", output,
        **keys(s3),
    )  # fmt: skip
    assert (code, len(said.splitlines())) == (1, 1), said
    assert says in said


def test_a_bucket_without_rights_is_one_line(bucket, s3, tmp_path):
    """Once the server checks keys, ours are refused; the line says what to check."""

    def check_keys(after: str) -> None:
        asked = urllib.request.Request(f"{s3}/moto-api/reset-auth", after.encode())
        asked.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(asked, timeout=30).close()

    check_keys("0")
    try:
        code, said = run("score", VAE, "s3://pictures/more.parquet", **keys(s3))
    finally:
        check_keys("inf")
    assert (code, len(said.splitlines())) == (1, 1), said
    assert "s3://pictures/more.parquet: " in said
    assert "check the credentials" in said or "the credentials are unknown" in said
