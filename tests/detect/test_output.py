"""Rows in every format, and files that a kill leaves whole or resumable."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from anomalyd import Detector
from anomalyd.detect import output
from anomalyd.detect.conformal import benjamini_hochberg
from anomalyd.detect.output import Journal
from anomalyd.detect.score import Scoring, Summary, score_rows, score_to_file, score_to_stream
from anomalyd.errors import AnomalydError, UsageError
from anomalyd.sources import open_paths

N = 30


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


@pytest.fixture
def source(tmp_path):
    """29 drawn images, one of them bright, and a broken file between two arrays."""
    images = tiny.draw(N - 1, seed=80)
    images[3] = 255
    np.save(tmp_path / "a.npy", images[:10])
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.save(tmp_path / "c.npy", images[10:])
    return open_paths([tmp_path / name for name in ("a.npy", "b.png", "c.npy")])


def streamed(detector, source, kind, **options):
    stream = io.BytesIO()
    summary = score_to_stream(detector, source, Scoring(0.05, **options), kind, stream)
    return stream.getvalue().decode(), summary


def test_jsonl_has_the_keys_of_the_contract(detector, source):
    """One object an input, in order; what cannot be read has source, index and error only."""
    text, summary = streamed(detector, source, "jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == N == summary.images
    assert [row["index"] for row in rows] == [*range(10), None, *range(19)]
    assert set(rows[10]) == {"source", "index", "error"}
    assert list(rows[0]) == ["source", "index", *output.VERDICT]
    assert summary.unreadable == 1
    assert summary.outliers == sum(row.get("outlier", False) for row in rows)
    assert rows[3]["outlier"] is True


def test_rows_are_the_detectors_verdicts(detector, source):
    """The batch command and Python say the same."""
    text, _ = streamed(detector, source, "jsonl")
    rows = [row for row in map(json.loads, text.splitlines()) if "error" not in row]
    images = [item.payload for item in source if item.index is not None]
    for row, verdict in zip(rows, detector.score(images, alpha=0.05), strict=True):
        assert {key: row[key] for key in output.VERDICT} == verdict.to_dict()


def test_csv_and_table_hold_every_input(detector, source):
    """As many lines as inputs under one heading; the unreadable one says why."""
    text, _ = streamed(detector, source, "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == N
    assert rows[10]["error"]
    assert not rows[10]["p_value"]
    table, _ = streamed(detector, source, "table")
    assert len(table.splitlines()) == N + 1
    assert "OUTLIER" in table.splitlines()[4]
    assert "unreadable" in table.splitlines()[11]
    assert "\x1b" not in table


def test_a_name_with_line_ends_is_one_row_of_csv(detector, tmp_path):
    """Carriage returns and newlines in a file's name are quoted; rows end in a newline alone."""
    name = "a\rb\nc\r\n.png"
    Image.fromarray(tiny.draw(1, seed=81)[0, ..., 0]).save(tmp_path / name)
    text, _ = streamed(detector, open_paths([tmp_path]), "csv")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["source"] for row in rows] == [str(tmp_path / name)]
    assert text.count("\r\n") == 1


def test_explanations_are_part_of_the_row(detector, source):
    """An object in JSON, text in CSV, further lines in a table."""
    text, _ = streamed(detector, source, "jsonl", explain=True)
    assert set(json.loads(text.splitlines()[0])["explain"]) == set(tiny.STATISTICS)
    text, _ = streamed(detector, source, "csv", explain=True)
    row = next(csv.DictReader(io.StringIO(text)))
    assert set(json.loads(row["explain"])) == set(tiny.STATISTICS)
    text, _ = streamed(detector, source, "table", explain=True)
    assert len(text.splitlines()) == 1 + N + 2 * (N - 1)


def test_false_discovery_rate_decides_over_all_rows(detector, source):
    """q_value is Benjamini-Hochberg's over the readable rows, and outlier is q <= Q."""
    plain, _ = streamed(detector, source, "jsonl")
    text, summary = streamed(detector, source, "jsonl", fdr=0.2)
    rows = [row for row in map(json.loads, text.splitlines()) if "error" not in row]
    p = [row["p_value"] for row in map(json.loads, plain.splitlines()) if "error" not in row]
    np.testing.assert_allclose([row["q_value"] for row in rows], benjamini_hochberg(p))
    assert all(row["outlier"] is (row["q_value"] <= 0.2) for row in rows)
    assert summary.outliers == sum(row["outlier"] for row in rows)
    with pytest.raises(UsageError, match="--fdr"):
        Scoring(0.05, fdr=20)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("fdr", [None, 0.2])
def test_files_say_what_the_stream_says(detector, source, tmp_path, ending, fdr):
    """Each format holds the same rows, typed; nothing else is left beside it."""
    path = tmp_path / "out" / f"rows.{ending}"
    path.parent.mkdir()
    score_to_file(detector, source, Scoring(0.05, fdr=fdr), path)
    text, _ = streamed(detector, source, "jsonl", fdr=fdr)
    expected = [json.loads(line) for line in text.splitlines()]
    if ending == "parquet":
        rows = pq.read_table(path).to_pylist()
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        expected = [
            {key: value for key, value in row.items() if value is not None} for row in expected
        ]
        assert rows == expected
    elif ending == "csv":
        assert path.read_text() == streamed(detector, source, "csv", fdr=fdr)[0]
    else:
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


class Dies:
    """A source whose machine fails after a number of items."""

    def __init__(self, source, after):
        self.source, self.after, self.name = source, after, source.name

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        for count, item in enumerate(self.source):
            if count == self.after:
                raise KeyboardInterrupt
            yield item


@pytest.fixture
def small_batches(detector, monkeypatch):
    monkeypatch.setattr(detector.session, "batch", 1)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("fdr", [None, 0.2])
@pytest.mark.parametrize("half_line", [False, True])
def test_an_interrupted_file_is_resumed(detector, source, tmp_path, fdr, half_line):
    """The old file stays until the new one is whole; resuming scores only what is missing."""
    path = tmp_path / "rows.jsonl"
    path.write_text("the old file\n")
    scoring = Scoring(0.05, fdr=fdr)
    with pytest.raises(KeyboardInterrupt):
        score_to_file(detector, Dies(source, 28), scoring, path)
    assert path.read_text() == "the old file\n"
    part = tmp_path / "rows.jsonl.part"
    kept = part.read_bytes().count(b"\n") - 1
    assert kept >= 3
    if half_line:
        part.write_bytes(part.read_bytes() + b'{"source":"ha')
    fresh = []
    score_to_file(detector, source, scoring, path, resume=True, progress=fresh.append)
    assert fresh[0] == kept
    assert sum(fresh) == N
    assert path.read_text() == streamed(detector, source, "jsonl", fdr=fdr)[0]
    assert not part.exists()


@pytest.mark.usefixtures("small_batches")
def test_resuming_something_else_is_refused(detector, source, tmp_path):
    """Another alpha, or other inputs, would mix two answers in one file."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_to_file(detector, Dies(source, 28), Scoring(0.05), path)
    with pytest.raises(UsageError, match="another bundle, alpha"):
        score_to_file(detector, source, Scoring(0.1), path, resume=True)
    for other in (Scoring(0.05, fdr=0.2), Scoring(0.05, heatmaps=tmp_path / "maps")):
        with pytest.raises(UsageError, match="or other options"):
            score_to_file(detector, source, other, path, resume=True)
    other = open_paths([tmp_path / "c.npy"])
    with pytest.raises(UsageError, match="start without --resume"):
        score_to_file(detector, other, Scoring(0.05), path, resume=True)
    score_to_file(detector, other, Scoring(0.05), path)
    assert len(path.read_text().splitlines()) == 19


def test_resume_without_a_journal_starts(detector, source, tmp_path):
    """--resume may stand in a script from the first run on."""
    path = tmp_path / "rows.csv"
    summary = score_to_file(detector, source, Scoring(0.05), path, resume=True)
    assert summary.images == N


def test_heatmaps_are_written_for_every_readable_image(detector, source, tmp_path):
    """One PNG an image, named by its row, and nothing half written."""
    folder = tmp_path / "maps"
    streamed(detector, source, "jsonl", heatmaps=folder)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == N - 1
    assert names[0] == "000000-a-0.png"
    assert names[10] == "000011-c-0.png"


def test_a_map_is_there_before_its_row(detector, source, tmp_path):
    """What is journaled is not scored again by --resume: its map must be there by then."""
    folder = tmp_path / "maps"
    count = 0
    for rows in score_rows(detector, source, Scoring(0.05, heatmaps=folder), Summary()):
        count += len([row for row in rows if "error" not in row])
        assert len(list(folder.iterdir())) == count
    assert count == N - 1


def test_long_names_of_maps_are_cut_by_the_bytes_that_a_disk_counts(detector, tmp_path):
    """240 bytes of a name in 80 characters, and more, leave room for what is put around it."""
    for name in ("\N{SMILING FACE WITH SUNGLASSES}" * 60, "a" * 250):
        Image.fromarray(tiny.draw(1)[0, ..., 0]).save(tmp_path / f"{name}.png")
        streamed(detector, open_paths([tmp_path / f"{name}.png"]), "csv", heatmaps=tmp_path / "m")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names[0] == f"000000-{'a' * 160}.png"
    assert len(names) == 2


def test_unprintable_names_are_escaped_in_a_table_alone(detector, tmp_path):
    """A file name cannot draw on a terminal; files of rows have it as it is."""
    path = tmp_path / "a\x1b[2Jb\n.png"
    Image.fromarray(tiny.draw(1)[0, ..., 0]).save(path)
    (tmp_path / "c\x07.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paths = open_paths([path, tmp_path / "c\x07.png"])
    table, _ = streamed(detector, paths, "table")
    lines = table.split("\n")
    assert lines[1].endswith(r"a\x1b[2Jb\n.png")
    assert r"c\x07.png: " in lines[2]
    assert table.replace("\n", "").isprintable()
    text, _ = streamed(detector, paths, "jsonl")
    assert json.loads(text.splitlines()[0])["source"] == str(path)


def test_bad_places_are_told(detector, source, tmp_path):
    """A name without a known ending, a folder that is not there: one line each."""
    with pytest.raises(UsageError, match="the name must end in"):
        score_to_file(detector, source, Scoring(0.05), tmp_path / "rows.txt")
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(UsageError, match="a folder is there; name a file"):
        score_to_file(detector, source, Scoring(0.05), tmp_path / "rows.csv")
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(AnomalydError, match="cannot be written: No such file"):
        score_to_file(detector, source, Scoring(0.05), tmp_path / "none" / "rows.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(AnomalydError, match=r"--heatmaps .* cannot be made"):
        streamed(detector, source, "jsonl", heatmaps=tmp_path / "file" / "maps")


def test_journal_survives_an_unfinished_header(tmp_path):
    """Killed within its first line, it is refused as a beginning of anything."""
    (tmp_path / "x.csv.part").write_bytes(b'{"al')
    with pytest.raises(UsageError, match="start again without --resume"):
        Journal(tmp_path / "x.csv", {"alpha": 1}, resume=True)
