"""Reading and writing bundles: what comes back, what bytes are written, what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.detect import bundle as module
from anomalyd.detect.bundle import (
    Calibration,
    Golden,
    find_bundles,
    glance,
    pack_calibration,
    pack_golden,
    read_bundle,
    write_bundle,
)
from anomalyd.detect.manifest import dump_manifest, parse_manifest
from anomalyd.errors import BundleError

TESTS = Path(__file__).resolve().parents[1]
FORMAT_1 = TESTS / "data" / "format-1" / "tiny"


def rewrite(path: Path, **changes) -> None:
    bundle = read_bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    manifest = tiny.tiny_manifest(**{"name": path.name, **changes})
    write_bundle(path, manifest, files, replace=True)


class TestReading:
    def test_what_is_written_comes_back(self, tmp_path):
        """Manifest, model and tables are read as they were given."""
        path = tiny.tiny_bundle(tmp_path, licence="CC0-1.0")
        bundle = read_bundle(path)
        given = tiny.tiny_manifest(licence="CC0-1.0", files=bundle.manifest.files)
        assert bundle.manifest == given
        assert bundle.path == path
        assert bundle.model == tiny.tiny_files()["model.onnx"]
        assert np.array_equal(bundle.calibration.scores, tiny.tiny_calibration().scores)
        assert np.array_equal(bundle.golden.images, tiny.tiny_golden().images)

    def test_arrays_are_read_only(self, tmp_path):
        """Nobody changes a verified table by accident."""
        bundle = read_bundle(tiny.tiny_bundle(tmp_path))
        with pytest.raises(ValueError, match="read-only"):
            bundle.calibration.scores[0] = 0

    def test_the_graph_gives_the_golden_scores(self, tmp_path):
        """The tiny density's closed form and its graph agree."""
        assert golden_error(read_bundle(tiny.tiny_bundle(tmp_path))) < 1e-5

    def test_other_files_are_read_on_demand(self, tmp_path):
        """A listed file can be asked for; one that is not there is named."""
        bundle = read_bundle(tiny.tiny_bundle(tmp_path))
        assert bundle.read("CARD.md").startswith(b"# tiny")
        with pytest.raises(BundleError, match=r"no explain\.onnx in it; it has CARD\.md, "):
            bundle.read("explain.onnx")

    def test_a_file_changed_after_reading_is_refused(self, tmp_path):
        """What is read on demand is verified then."""
        bundle = read_bundle(tiny.tiny_bundle(tmp_path))
        (bundle.path / "CARD.md").write_bytes(b"# Tiny" + bundle.read("CARD.md")[6:])
        with pytest.raises(BundleError, match=r"CARD\.md has the SHA-256"):
            bundle.read("CARD.md")

    def test_private_keys_are_ignored(self, tmp_path):
        """Keys that start with x- may hold anything."""
        path = tiny.tiny_bundle(tmp_path)
        tiny.rewrite_manifest(path, **{"x-line": {"camera": 4}})
        assert read_bundle(path).manifest.name == "tiny"

    def test_a_link_to_a_bundle_is_followed(self, tmp_path):
        """Which folder is meant is the operator's choice; links are refused inside only."""
        (tmp_path / "current").symlink_to(tiny.tiny_bundle(tmp_path))
        assert read_bundle(tmp_path / "current").manifest.name == "tiny"

    def test_a_missing_folder_is_named(self, tmp_path):
        """The error says which path and why."""
        with pytest.raises(BundleError, match=r"none: cannot be listed: No such file"):
            read_bundle(tmp_path / "none")


class TestFormat1:
    def test_it_stays_readable(self):
        """The committed bundle reads, and its graph still gives its golden scores."""
        bundle = read_bundle(FORMAT_1)
        assert bundle.manifest.format_version == 1
        assert bundle.manifest.calibration_n == len(bundle.calibration.scores) == 99
        assert golden_error(bundle) < 1e-5

    def test_golden_bytes_of_the_manifest(self):
        """Reading and writing the committed manifest gives the same bytes."""
        data = (FORMAT_1 / "manifest.json").read_bytes()
        assert dump_manifest(parse_manifest(data)) == data

    def test_golden_bytes_of_the_tables(self):
        """Reading and packing the committed tables gives the same bytes."""
        bundle = read_bundle(FORMAT_1)
        assert pack_calibration(bundle.calibration) == bundle.read("calibration.npz")
        assert pack_golden(bundle.golden) == bundle.read("golden.npz")

    def test_golden_bytes_from_literals(self):
        """The bytes of a table depend on nothing but its arrays."""
        golden = Golden(
            np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1),
            np.array([[-1.5], [-2.5]]),
            np.array([[0.5], [1.5]], np.float32),
        )
        assert hashlib.sha256(pack_golden(golden)).hexdigest() == GOLDEN_SHA256

    def test_numpy_reads_the_tables(self):
        """The files are ordinary .npz files for everyone else."""
        with np.load(FORMAT_1 / "calibration.npz", allow_pickle=False) as arrays:
            assert arrays["p_table"][-1] == 1.0
            assert arrays["training_hashes"].dtype == np.uint64


GOLDEN_SHA256 = "20b3b0d60becf154ecd6ec34af8f1f5643d233e9ceb7e6b4b679b6e634ba73ea"


def golden_error(bundle) -> float:
    """Largest error of the golden log-likelihoods, bits/dim."""
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    golden = bundle.golden
    found, statistics = session.run(
        ["log_likelihood", "statistics"], {"image": np.asarray(golden.images)}
    )
    assert np.allclose(statistics, golden.statistics, rtol=1e-5)
    dimensions = golden.images[0].size
    return float(np.abs(found - golden.log_likelihood).max() / dimensions / np.log(2))


class TestTables:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**32))
    def test_they_survive_the_round_trip(self, n, m, width, seed):
        """Whatever the sizes, the arrays come back bit for bit."""
        from anomalyd.detect.tables import unpack_calibration

        rng = np.random.default_rng(seed)
        given = Calibration(
            fit_nll=np.sort(rng.normal(size=m)),
            fit_statistics=rng.normal(size=(m, width)).astype(np.float32),
            scores=np.sort(rng.normal(size=n)),
            p_table=np.arange(1, n + 2) / (n + 1),
            training_hashes=np.sort(rng.integers(0, 2**64, m, np.uint64)),
            calibration_hashes=np.array([], np.uint64),
        )
        manifest = tiny.tiny_manifest(
            calibration_n=n, default_alpha=0.5, statistics=[f"s{i}" for i in range(width)]
        )
        found = unpack_calibration(pack_calibration(given), manifest)
        for key, array in vars(given).items():
            if array is None:
                assert getattr(found, key) is None
                continue
            assert np.array_equal(getattr(found, key), array)
            assert getattr(found, key).dtype == array.dtype


class TestFinding:
    def test_a_bundle_finds_itself(self, tmp_path):
        """A bundle folder stands for itself."""
        path = tiny.tiny_bundle(tmp_path)
        assert find_bundles(path) == [path]

    def test_a_folder_finds_the_bundles_inside(self, tmp_path):
        """Sorted by name; hidden folders, files and other folders are passed over."""
        for name in ("b", "a", ".hidden"):
            (tmp_path / tiny.tiny_bundle(tmp_path, name=name.strip(".")).name).rename(
                tmp_path / name
            )
        (tmp_path / "notes").mkdir()
        (tmp_path / "README.md").touch()
        assert find_bundles(tmp_path) == [tmp_path / "a", tmp_path / "b"]

    @pytest.mark.parametrize("read", [find_bundles, read_bundle, glance])
    @pytest.mark.parametrize("place", ["/", ".", "x" * 253, "x" * 300])
    def test_odd_places_end_in_one_line(self, tmp_path, monkeypatch, read, place):
        """The root folder, by name or from within, and names too long for what stands beside."""
        monkeypatch.chdir("/" if place == "." else tmp_path)
        if read is find_bundles and place in ("/", "."):
            assert find_bundles(place) == []
            return
        with pytest.raises(BundleError) as caught:
            read(place)
        tiny.check_line(caught.value)

    def test_nothing_is_written_to_odd_places(self):
        """The root folder is not replaced, whatever was asked."""
        bundle = read_bundle(FORMAT_1)
        files = {name: bundle.read(name) for name in bundle.manifest.files}
        for replace in (False, True):
            with pytest.raises(BundleError):
                write_bundle("/", bundle.manifest, files, replace=replace)

    def test_a_folder_that_may_not_be_entered_is_named(self, tmp_path, monkeypatch):
        """Nor does it hide the bundles beside it."""
        path = tiny.tiny_bundle(tmp_path)
        (tmp_path / "locked").mkdir(mode=0)
        assert find_bundles(tmp_path) == [path]

        def refuses(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", refuses)
        with pytest.raises(BundleError, match="cannot be listed: Permission denied"):
            find_bundles(tmp_path)

    def test_a_missing_folder_is_an_error(self, tmp_path):
        """A mistyped path is not a folder without bundles."""
        with pytest.raises(BundleError, match="no such folder"):
            find_bundles(tmp_path / "none")


class TestWriting:
    def test_nothing_is_replaced_unasked(self, tmp_path):
        """A bundle that is there stays unless replacing it was meant."""
        path = tiny.tiny_bundle(tmp_path)
        with pytest.raises(BundleError, match="something is there already"):
            tiny.tiny_bundle(tmp_path)
        rewrite(path, version="2")
        assert read_bundle(path).manifest.version == "2"

    def test_nothing_but_a_bundle_is_ever_replaced(self, tmp_path):
        """A folder with someone's files in it is not taken for a bundle."""
        path = tiny.tiny_bundle(tmp_path)
        (path / "notes.txt").write_text("mine")
        bundle_files = tiny.tiny_files()
        with pytest.raises(BundleError, match=r"'notes\.txt' in it is no part of the bundle"):
            write_bundle(path, tiny.tiny_manifest(), bundle_files, replace=True)
        other = tmp_path / "photos"
        other.mkdir()
        (other / "cat.png").write_bytes(b"meow")
        with pytest.raises(BundleError, match=r"manifest\.json is missing"):
            write_bundle(other, tiny.tiny_manifest(), bundle_files, replace=True)
        assert (path / "notes.txt").read_text() == "mine"
        assert (other / "cat.png").read_bytes() == b"meow"

    def test_what_the_reader_would_refuse_is_not_written(self, tmp_path):
        """A wrong table, manifest or file name leaves nothing behind."""
        with pytest.raises(BundleError, match="calibration_n 200"):
            write_bundle(tmp_path / "a", tiny.tiny_manifest(calibration_n=200), tiny.tiny_files())
        with pytest.raises(BundleError, match="default_alpha must be within"):
            tiny.tiny_bundle(tmp_path, default_alpha=1.5)
        with pytest.raises(BundleError, match="not a file name"):
            tiny.tiny_bundle(tmp_path, files={"../evil.txt": b""})
        with pytest.raises(BundleError, match="of no kind that a bundle may hold"):
            tiny.tiny_bundle(tmp_path, files={"weights.pkl": b""})
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_refuses_is_reported(self, tmp_path):
        """A file in the place of the parent folder ends in one line."""
        (tmp_path / "file").touch()
        with pytest.raises(BundleError, match="cannot be written"):
            tiny.tiny_bundle(tmp_path / "file")

    def test_a_daemon_under_another_user_can_read_it(self, tmp_path):
        """The folder is readable by all, unlike the temporary one it was."""
        assert tiny.tiny_bundle(tmp_path).stat().st_mode & 0o777 == 0o755

    def test_the_same_input_gives_the_same_bytes(self, tmp_path):
        """Two writes of one bundle do not differ in a byte."""
        one, two = tiny.tiny_bundle(tmp_path / "1"), tiny.tiny_bundle(tmp_path / "2")
        for file in one.iterdir():
            assert file.read_bytes() == (two / file.name).read_bytes()


class TestKilledWriter:
    """A writer sets the old bundle aside before it moves the new one in."""

    def test_readers_look_where_it_was_set_aside(self, tmp_path):
        """Killed between the two renames, the old bundle is still found and read."""
        path = tiny.tiny_bundle(tmp_path)
        path.rename(tmp_path / ".tiny.old")
        assert find_bundles(tmp_path) == find_bundles(path) == [path]
        bundle = read_bundle(path)
        assert bundle.path == path
        assert bundle.read("CARD.md").startswith(b"# tiny")

    def test_a_bundle_that_is_set_aside_while_it_is_read_is_read_there(
        self, tmp_path, monkeypatch
    ):
        """The path it had is empty for the moment between a writer's two renames."""
        path = tiny.tiny_bundle(tmp_path)
        read_folder = module._read_folder

        def set_aside_first(folder):
            monkeypatch.setattr(module, "_read_folder", read_folder)
            path.rename(tmp_path / ".tiny.old")
            return read_folder(folder)

        monkeypatch.setattr(module, "_read_folder", set_aside_first)
        assert read_bundle(path).manifest.name == "tiny"

    def test_the_next_writer_tidies_up(self, tmp_path):
        """It takes the set-aside bundle for the one to replace, and leaves one folder."""
        path = tiny.tiny_bundle(tmp_path)
        path.rename(tmp_path / ".tiny.old")
        with pytest.raises(BundleError, match="something is there already"):
            tiny.tiny_bundle(tmp_path)
        path.rename(tmp_path / ".tiny.old")
        rewrite(path, version="2")
        assert read_bundle(path).manifest.version == "2"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_failed_move_puts_the_old_one_back(self, tmp_path, monkeypatch):
        """When the new folder cannot be moved in, the old bundle stands again."""
        path = tiny.tiny_bundle(tmp_path)
        rename = Path.rename

        def fail(self, target):
            if self.name.endswith(".new"):
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(BundleError, match="cannot be written: Input/output error"):
            rewrite(path, version="2")
        assert read_bundle(path).manifest.version == "1"
        assert list(tmp_path.iterdir()) == [path]

    def test_killed_at_any_time_one_whole_bundle_is_left(self, tmp_path):
        """Writers killed at random, a reader beside them: every read gives a whole bundle."""
        path = tiny.tiny_bundle(tmp_path)
        script = tmp_path / "writer.py"
        script.write_text(
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "import tiny\n"
            "from anomalyd.detect.bundle import write_bundle\n"
            "files = tiny.tiny_files()\n"
            "print('ready', flush=True)\n"
            "for version in range(10**6):\n"
            "    manifest = tiny.tiny_manifest(version=str(version))\n"
            "    write_bundle(Path(sys.argv[2]), manifest, files, replace=True)\n"
        )
        rng = np.random.default_rng(0)
        for _ in range(3):
            writer = subprocess.Popen(
                [sys.executable, script, TESTS, path], stdout=subprocess.PIPE, text=True
            )
            with writer:
                try:
                    assert writer.stdout.readline() == "ready\n"
                    stop = time.monotonic() + rng.uniform(0.1, 0.5)
                    while time.monotonic() < stop:
                        assert read_bundle(path).manifest.name == "tiny"
                finally:
                    os.kill(writer.pid, signal.SIGKILL)
            assert read_bundle(path).manifest.name == "tiny"
            assert find_bundles(tmp_path) == [path]


class TestManifest:
    def test_numbers_from_numpy_are_numbers(self):
        """What was measured with NumPy is written as plain JSON."""
        manifest = tiny.tiny_manifest(default_alpha=np.float64(0.5), parameters=np.int64(7))
        assert parse_manifest(dump_manifest(manifest)).parameters == 7

    @given(st.binary(max_size=300))
    def test_arbitrary_bytes_end_in_a_bundle_error(self, data):
        """Whatever stands in manifest.json, no other error comes out."""
        with pytest.raises(BundleError):
            parse_manifest(data)

    @given(st.data())
    def test_any_value_at_any_key_is_read_or_refused(self, data):
        """One key of a good manifest takes any JSON value: it fits, or a BundleError names it."""
        good = json.loads(dump_manifest(tiny.tiny_manifest()))
        values = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        )
        good[data.draw(st.sampled_from(sorted(good)))] = data.draw(values)
        try:
            manifest = parse_manifest(json.dumps(good).encode("utf-8", "surrogatepass"))
        except BundleError as error:
            tiny.check_line(error)
        else:
            assert parse_manifest(dump_manifest(manifest)) == manifest
