"""Scoring on a simulated cluster: the local engine's rows, each once, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_nodes import ROOT, VAE, WHOLE, parts_of, rows_of, run, start, wait_for_parts

pytestmark = pytest.mark.by("Ray")

BAYES = ROOT / "trained" / "fashion-mnist-bayes"
FIXTURES = ROOT / "tests" / "fixtures"
TOLERANCE = json.loads((VAE / "manifest.json").read_text())["tolerance"]["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """408 inputs: IDX, Parquet with a damaged row group, PNG files, junk, a missing path."""
    folder = tmp_path_factory.mktemp("data")
    images = [path.read_bytes() for path in sorted((FIXTURES / "images").glob("*.png"))]
    table = pa.table({"image": (images * 40)[:200]})
    path = folder / "some.parquet"
    pq.write_table(table, path, row_group_size=20, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(4).column(0)
    damaged[chunk.data_page_offset : chunk.data_page_offset + 64] = bytes(64)
    path.write_bytes(damaged)
    (folder / "pictures").mkdir()
    for number, image in enumerate(images):
        (folder / "pictures" / f"{number}.png").write_bytes(image)
    (folder / "pictures" / "junk.png").write_bytes(b"no image")
    lines = [f"{FIXTURES}/fashion-mnist:test", path, folder / "pictures", folder / "missing"]
    (folder / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def same(local: list[dict], remote: list[dict]) -> None:
    """The same inputs in the same order with the same verdicts, to the bundle's tolerance."""
    assert [(r["source"], r["index"], r["error"]) for r in local] == [
        (r["source"], r["index"], r["error"]) for r in remote
    ]
    assert list(local[0]) == list(remote[0])
    for here, there in zip(local, remote, strict=True):
        if here["error"] is None:
            assert here["bits_per_dim"] == pytest.approx(there["bits_per_dim"], abs=TOLERANCE)
            assert here["score"] == pytest.approx(there["score"], rel=1e-3, abs=1e-4)
            assert here["outlier"] == there["outlier"]
            assert here["p_value"] == pytest.approx(there["p_value"], abs=2e-3)
            for name in ("label", "rejected", "reason"):
                assert here.get(name) == there.get(name)


@pytest.mark.parametrize(("bundle", "fdr"), [(VAE, None), (VAE, 0.3), (BAYES, 0.3)])
def test_rows_are_those_of_the_local_engine(nodes, data, tmp_path, bundle, fdr):
    """Nine parts from every kind of input, read on another node, are one local file."""
    asked = [bundle, f"@{data}/list.txt", *(["--fdr", fdr] if fdr else []), "--alpha", 0.05]
    code, said = run("score", *asked, "--output", tmp_path / "local.parquet")
    assert code == 3, said
    again = [
        "score", *asked, "--engine", "ray", "--ray-address", nodes.address,
        "--output", tmp_path / "parts",
    ]  # fmt: skip
    remote, heard = run(*again)
    assert (remote, heard.splitlines()[-1]) == (3, said.splitlines()[-1]), heard
    assert len(parts_of(tmp_path / "parts")) == 9
    if bundle == VAE:  # one that was decided and then damaged is decided again
        (tmp_path / "parts" / "_manifest.json").unlink()
        parts_of(tmp_path / "parts")[3].write_bytes(b"PAR1 half")
        assert run(*again)[0] == 3
    local = pq.read_table(tmp_path / "local.parquet").to_pylist()
    same(local, rows_of(tmp_path / "parts"))
    assert sum("row group 4 of the file is damaged" in (r["error"] or "") for r in local) == 20
    assert not list((tmp_path / "parts").glob("_scored/*"))


def test_a_finished_folder_is_not_scored_again(nodes, data, tmp_path):
    """The same command answers from the manifest; another question is refused in one line."""
    asked = ["score", VAE, f"{data}/pictures", "--engine", "ray", "--output", tmp_path / "parts"]
    first = run(*asked, "--ray-address", nodes.address)
    written = [(path, path.stat().st_mtime_ns) for path in parts_of(tmp_path / "parts")]
    assert run(*asked, "--ray-address", "127.0.0.1:1") == first
    assert written == [(path, path.stat().st_mtime_ns) for path in parts_of(tmp_path / "parts")]
    code, said = run(*asked, "--alpha", 0.2)
    assert code == 2
    assert "it holds scores with another alpha; name another folder" in said
    assert len(said.splitlines()) == 1


# 6,000 images in 120 parts, or 60,000 in 300.
TIMES, SIZE = (150, 200) if WHOLE else (15, 50)
IMAGES, PARTS = 400 * TIMES, 400 * TIMES // SIZE


def many(folder: Path) -> Path:
    """A list of the fixture's 200 clothes and 200 digits, over and over."""
    lines = [f"{FIXTURES}/{name}:test" for name in ("fashion-mnist", "mnist")] * TIMES
    (folder / "many.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder / "many.txt"


def test_a_node_that_dies_loses_and_duplicates_nothing(nodes, tmp_path):
    """Three nodes, one of them killed in the middle: every input has one row, in order."""
    doomed, _ = nodes.add(), nodes.add()
    process = start(
        "score", VAE, f"@{many(tmp_path)}", "--engine", "ray",
        "--ray-address", nodes.address, "--output", tmp_path / "parts", size=SIZE,
    )  # fmt: skip
    wait_for_parts(tmp_path / "parts", 20, process)
    nodes.kill(doomed)
    left = PARTS - len(parts_of(tmp_path / "parts"))
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert left > 10
    assert said.startswith(f"{IMAGES} images"), said
    indices = [row["index"] for row in rows_of(tmp_path / "parts")]
    assert indices == list(range(200)) * (2 * TIMES)


def test_a_driver_that_is_killed_leaves_only_unfinished_parts(nodes, tmp_path):
    """SIGKILL in the middle; the same command scores the parts that are missing, no other."""
    asked = [
        "score", VAE, f"@{many(tmp_path)}", "--engine", "ray",
        "--ray-address", nodes.address, "--output", tmp_path / "parts",
    ]  # fmt: skip
    process = start(*asked, size=SIZE)
    wait_for_parts(tmp_path / "parts", 20, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "parts" / "_manifest.json").exists()
    # One that was cut off on its way, as by a file system without rename, is no part.
    parts_of(tmp_path / "parts")[0].write_bytes(b"PAR1 half")
    kept = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "parts")[1:]}
    code, said = run(*asked, size=SIZE)
    assert code == 0, said
    assert said.startswith(f"{IMAGES} images"), said
    now = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "parts")}
    assert len(now) == PARTS
    # Actors of the dead driver may have finished a part after its death; none is written twice.
    assert {path: now[path] for path in kept} == kept
    rows = rows_of(tmp_path / "parts")
    assert [row["index"] for row in rows] == list(range(200)) * (2 * TIMES)
    scores = np.array([row["score"] for row in rows]).reshape(TIMES, 400)
    np.testing.assert_allclose(scores, np.broadcast_to(scores[0], (TIMES, 400)), atol=1e-4)


def test_the_bundle_travels_with_the_job(nodes, data, tmp_path):
    """A node has no copy of the bundle and needs none: it is sent, and verified there."""
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(VAE, mine)
    process = start(
        "score", mine, f"{data}/pictures", "--engine", "ray",
        "--ray-address", nodes.address, "--output", tmp_path / "parts",
    )  # fmt: skip
    while not (tmp_path / "parts" / "_plan.parquet").exists():
        assert process.poll() is None, process.communicate()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 3, said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--ray-address", "127.0.0.1:1"], 1, "no Ray cluster answers there (Connection refused)"),
        (["--ray-address", "nowhere"], 2, "say HOST:PORT"),
        (["--ray-address", "auto", "--heatmaps", "maps"], 2, "maps are drawn by the local engine"),
        (["--ray-address", "{address}", "--device", "cuda"], 2, "the Ray cluster has no GPU"),
        (["--ray-address", "{address}", "--output", "/proc/scores"], 1, "/proc/scores"),
        (["--output", ""], 2, "name it with --output"),
    ],
)
def test_bad_questions_are_one_line(nodes, data, tmp_path, arguments, code, says):
    """Nothing is scored, and the line says what to do."""
    given = [a.format(address=nodes.address) for a in arguments]
    output = [] if "--output" in given else ["--output", tmp_path / "parts"]
    found, said = run("score", VAE, f"{data}/pictures", "--engine", "ray", *output, *given)
    assert (found, len(said.splitlines())) == (code, 1), said
    assert says in said


def test_a_half_written_plan_is_one_line(data, tmp_path):
    """A plan that is no Parquet, and parts without a plan."""
    asked = ["score", VAE, f"{data}/pictures", "--engine", "ray", "--output", tmp_path / "parts"]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "_plan.parquet").write_bytes(b"PAR1 half")
    code, said = run(*asked)
    assert (code, len(said.splitlines())) == (1, 1)
    assert "its plan, _plan.parquet, is damaged" in said
    (tmp_path / "parts" / "_plan.parquet").rename(tmp_path / "parts" / "part-000000.parquet")
    code, said = run(*asked)
    assert (code, len(said.splitlines())) == (2, 1)
    assert "it holds parts, but not their plan" in said
