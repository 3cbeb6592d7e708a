"""The command line from outside: exit codes, one-line errors, what goes to which stream."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from anomalyd import cli
from anomalyd.detect.bundle import read_bundle
from anomalyd.errors import AnomalydError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 drawn images as PNG, and one all white."""
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(tiny.draw(20, seed=5)):
        Image.fromarray(pixels[..., 0]).save(folder / f"{i:02d}.png")
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(folder / "white.png")
    return folder


@pytest.fixture
def run(capfdbinary):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return call


@contextlib.contextmanager
def spawned(*arguments):
    """The command in a process of its own, which does not outlive the test."""
    command = [sys.executable, "-m", "anomalyd", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(part, size, process):
    """Until a journal has grown to `size` bytes."""
    while not part.exists() or part.stat().st_size < size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "trained" / "mnist-pixelcnn"
BAYES = ROOT / "trained" / "mnist-bayes"
COMMANDS = [[], ["train"], ["export"], ["calibrate"], ["evaluate"], ["score"], ["serve"]]
COMMANDS += [["sample"], ["embed"], ["bundle"], ["bundle", "inspect"], ["bundle", "verify"]]
COMMANDS += [["config"], ["config", "check"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(run, command):
    """--help ends with 0 and says how to call it."""
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: " + " ".join(["anomalyd", *command]))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "train",
            "--model --out --labels --image-size --channels --minutes --epochs --device --group "
            "--exclude --init --resume --recipe --per-folder --ray-address",
        ),
        ("calibrate", "--confidence --refit --group"),
        ("evaluate", "--normal --outliers --labels --alpha --limit --seed --format --report"),
        (
            "score",
            "--alpha --fdr --format --output --heatmaps --explain --device --resume --engine "
            "--ray-address",
        ),
        ("serve", "--host --port --default-model --device --config"),
        ("sample", "--label --seed --output"),
        ("embed", "--output --device"),
    ],
)
def test_options_of_the_contract(run, command, options):
    """Names that scripts rely on."""
    _, out, _ = run(command, "--help")
    assert [option for option in options.split() if option not in out] == []


def imported(*arguments):
    """Modules that a command imports, in a process of its own."""
    program = (
        "import sys; from anomalyd.cli import main; main(sys.argv[1:]); "
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("command", [["--help"], ["score", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(command):
    """Help is answered without numpy, onnxruntime, rich or torch."""
    heavy = {"numpy", "onnxruntime", "rich", "torch", "PIL", "starlette", "msgspec"}
    assert imported(*command) & heavy == set()


def test_the_import_budget_can_fail(bundle):
    """The same measurement sees numpy where it is used, and never torch."""
    modules = imported("bundle", "verify", bundle)
    assert {"numpy", "onnxruntime"} <= modules
    assert modules & {"torch", "onnx", "scipy", "sklearn", "matplotlib", "pyarrow"} == set()


def test_version(run):
    """The name and the version, and 0."""
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("anomalyd 0.")


def test_score_prints_data_on_stdout_and_a_summary_on_stderr(run, bundle, images):
    """Every line of stdout is a row."""
    code, out, err = run("score", bundle, images, "--format", "jsonl")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 21
    assert rows[-1]["outlier"] is True
    assert err.startswith("21 images, ")
    assert "outliers at alpha 0.01" in err


def test_score_says_what_a_false_discovery_rate_promises(run, bundle, images):
    """The promise, and the fewest flags that n calibration and m batch images allow."""
    code, out, err = run("score", bundle, images, "--format", "jsonl", "--fdr", "0.1")
    assert code == 0
    assert "on average over batches at most 0.1 of the flags are false" in err
    assert "with 199 calibration and 21 batch images no fewer than 2 flags are possible" in err
    assert err.splitlines()[-1].startswith("21 images, ")
    assert sum(json.loads(line)["outlier"] for line in out.splitlines()) in (0, *range(2, 22))


def test_score_counts_the_images_that_fit_several_classes(run):
    """Beside the outliers, and none of them twice."""
    data = ROOT / "tests/fixtures/mnist:test"
    _, out, err = run("score", BAYES, data, "--format", "jsonl", "--alpha", 0.05)
    rows = [json.loads(line) for line in out.splitlines()]
    said = [sum(row["outlier"] for row in rows), sum(r["reason"] == "ambiguous" for r in rows)]
    assert min(said) > 0
    assert err.endswith("200 images, {} outliers at alpha 0.05, {} ambiguous\n".format(*said))


def test_evaluation_of_a_single_image(run, tmp_path):
    """It says little, and is drawn all the same."""
    data = ["--normal", ROOT / "tests/fixtures/mnist:test", "--limit", 1]
    page = tmp_path / "page.html"
    assert run("evaluate", BAYES, "--labels", *data, "--report", page)[0] == 0
    assert page.exists()


def test_unreadable_inputs_are_exit_code_3(run, bundle, images, tmp_path):
    """Named in their rows, and nothing else is lost."""
    (tmp_path / "broken.png").write_bytes((images / "white.png").read_bytes()[:40])
    code, out, err = run("score", bundle, images, tmp_path, "--format", "jsonl")
    assert code == 3
    assert len(out.splitlines()) == 22
    assert json.loads(out.splitlines()[-1])["source"].endswith("broken.png")
    assert "1 could not be read" in err


def test_errors_are_one_line(run, bundle, images, tmp_path):
    """What, why, what to do; 1 for what failed, 2 for what cannot be meant; never a traceback."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("empty", "d.csv", "r.html"):
        (tmp_path / name).mkdir()
    data = images
    sampler = tiny.tiny_sampler().SerializeToString()
    drawn = tiny.tiny_bundle(tmp_path, name="drawn", files={"sampler.onnx": sampler})
    cases = [
        (["score", bundle], 2, "PATH"),
        (["score", bundle, tmp_path / "nothing"], 1, "no such file"),
        (["score", tmp_path / "none", images], 1, "none"),
        (["score", bundle, tmp_path / "empty"], 1, "holds no images"),
        (["score", bundle, tmp_path / "broken.png"], 1, "none of 1 inputs could be read"),
        (["score", bundle, images, "--alpha", "1e-9"], 1, "needs 999999999 calibration images"),
        (["score", bundle, images, "--alpha", "2"], 2, "between 0 and 1"),
        (["score", bundle, images, "--alpha", "9.19e-32"], 2, "at least 1e-12"),
        (["score", bundle, images, "--fdr", "9.19e-32"], 2, "at least 1e-12"),
        (["score", bundle, images, "--output", tmp_path / "d.csv"], 2, "a folder is there"),
        (["score", bundle, images, "--alpha", "x"], 2, "--alpha"),
        (["score", bundle, images, "--fdr", "2"], 2, "--fdr"),
        (["score", bundle, images, "--fdr", "1e-3"], 1, "--fdr 0.001 needs 999 calibration"),
        (["score", bundle, images, "--output", tmp_path / "x.txt"], 2, ".parquet"),
        (["score", bundle, images, "--output", tmp_path / "no/x.csv"], 1, "cannot be written"),
        (["score", bundle, images, "--resume"], 2, "--output"),
        (["score", bundle, data, "--format", "csv", "--output", tmp_path / "x.jsonl"], 2, "ends"),
        (["score", bundle, images, "--flips", "--engine", "ray", "--output", "x"], 2, "--flips"),
        (["evaluate", bundle, "--normal", data, "--reject-cost", "0.5"], 2, "no labels"),
        (["evaluate", BAYES, "--normal", data, "--reject-cost", "0.5"], 2, "add --labels"),
        (["evaluate", bundle, "--nonsense"], 2, "--nonsense"),
        (["evaluate", bundle], 2, "--normal"),
        (["evaluate", bundle, "--normal", data, "--outliers", "x"], 2, "NAME=DATA"),
        (["evaluate", bundle, "--normal", data, "--outliers", "a=x", "--outliers", "a=y"], 2, "a"),
        (["evaluate", bundle, "--normal", data, "--outliers", f"normal={data}"], 2, "normal"),
        (["evaluate", bundle, "--normal", data, "--limit", "0"], 2, "--limit"),
        (["evaluate", bundle, "--normal", data, "--seed", "-1"], 2, "--seed"),
        (["evaluate", bundle, "--normal", data, "--report", tmp_path / "r.html"], 2, "a folder"),
        (["evaluate", bundle, "--normal", tmp_path / "nothing"], 1, "no such file"),
        (["evaluate", bundle, "--normal", tmp_path / "empty"], 1, "holds no images"),
        (["evaluate", bundle, "--normal", data, "--alpha", "1e-3"], 1, "needs 999 calibration"),
        (["evaluate", bundle, "--normal", data, "--fdr", "1e-3"], 1, "--fdr 0.001 needs 999"),
        (["evaluate", bundle, "--normal", data, "--base-rate", "2"], 2, "--base-rate"),
        (["evaluate", bundle, "--normal", data, "--report", tmp_path / "x.pdf"], 2, ".html"),
        (["evaluate", bundle, "--normal", data, "--report", tmp_path / "no/x.html"], 1, "folder"),
        (["calibrate", bundle, data, "--confidence", "95"], 2, "0.95"),
        (["calibrate", bundle, data, "--confidence", "0.9999999999"], 2, "at most 1 - 1e-9"),
        (["calibrate", bundle, data, "--group", "x"], 2, "--refit"),
        (["calibrate", bundle, images / "00.png"], 1, "1 images are left to calibrate on, and 10"),
        (["sample", bundle], 1, "no sampler"),
        (["sample", bundle, "-n", "0"], 2, "-n"),
        (["sample", bundle, "-n", "10001"], 2, "-n"),
        (["sample", bundle, "--seed", "-1"], 2, "--seed"),
        (["sample", drawn, "--complete", tmp_path / "nope.png"], 2, "from the top down"),
        (["sample", DIGITS, "--complete", tmp_path / "nope.png"], 1, "nope.png: "),
        (["sample", drawn, "--output", tmp_path / "no/x.png"], 1, "there is no folder"),
        (["bundle", "verify", "/"], 1, "bundle /: "),
        (["bundle", "verify", "x" * 253], 1, "cannot be listed: No such file"),
        (["bundle", "verify", "a\x1b[2Jb"], 1, r"bundle a\x1b[2Jb: "),
        (["bundle", "verify", tmp_path], 1, "is not a regular file"),
        (["serve", "--config", tmp_path / "none.toml"], 2, "none.toml"),
        (["frobnicate"], 2, "frobnicate"),
    ]
    for arguments, expected, text in cases:
        code, out, err = run(*arguments)
        assert code == expected, (arguments, err)
        assert err.count("\n") == 1, err
        assert err.startswith("anomalyd: "), err
        assert text in err, err
        assert "Traceback" not in out + err
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "x.csv"), "x.csv: No space left on device"),
        (MemoryError(), "out of memory"),
        (MemoryError("9 GiB for an array"), "out of memory: 9 GiB for an array"),
    ],
)
def test_a_machine_that_refuses_is_one_line(run, bundle, monkeypatch, error, says):
    """A disk that is full, a memory that is used up."""

    def refuses(_):
        raise error

    monkeypatch.setattr("anomalyd.detect.bundle.read_bundle", refuses)
    assert run("bundle", "inspect", bundle) == (1, "", f"anomalyd: {says}\n")


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [("> /dev/full", 1, "anomalyd: No space left on device\n"), (">&-", 0, "")],
)
def test_a_stdout_that_takes_nothing_is_no_traceback(bundle, redirection, code, says):
    """A full disk is one line; where it was closed, nobody waits for what would be printed."""
    command = f"{sys.executable} -m anomalyd bundle inspect {bundle} {redirection}"
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, says)


def test_a_photograph_is_not_completed_by_a_density_of_tiles(run, images, tmp_path):
    """It draws tiles: an image to complete is refused, in one line, whatever its size."""
    path = tiny.tiny_tiled(tmp_path)
    tiny.put(path, "sampler.onnx", tiny.tiny_sampler().SerializeToString())
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "large.png")
    command = ["sample", path, "--output", tmp_path / "x.png", "--complete"]
    code, _, err = run(*command, tmp_path / "large.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "a density of tiles" in err


def test_a_report_that_cannot_be_written_loses_no_evaluation(run, bundle, images, monkeypatch):
    """It is printed first; the exit code tells."""

    def refuses(*_, **__):
        raise AnomalydError("--report x.html cannot be written: No space left on device")

    monkeypatch.setattr("anomalyd.detect.report.write_report", refuses)
    command = ["evaluate", bundle, "--normal", images, "--format", "json"]
    code, out, err = run(*command, "--report", "x.html")
    assert code == 1
    assert json.loads(out)["n"] == 21
    assert err.endswith("cannot be written: No space left on device\n")


def test_bundle_inspect_and_verify(run, bundle):
    """A summary for people, the manifest for machines, and a check of both files and graph."""
    code, out, _ = run("bundle", "inspect", bundle)
    assert code == 0
    for text in ("tiny 1", "0.01 by default, 0.005 at the smallest", "exact", "exchangeable"):
        assert text in out
    code, out, _ = run("bundle", "inspect", "--format", "json", bundle, bundle)
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["tiny", "tiny"]
    code, out, _ = run("bundle", "verify", bundle, bundle)
    assert code == 0
    assert out.count("good") == 2


@pytest.mark.parametrize("make", [tiny.tiny_classifier, tiny.tiny_autoencoder])
def test_what_has_no_density_is_described_and_refused(run, images, tmp_path, make):
    """Inspected and verified as any bundle; what needs a density says so in one line."""
    path = make(tmp_path)
    code, out, _ = run("bundle", "inspect", path)
    assert code == 0
    assert f"  kind       {path.name}, 256 parameters" in out
    assert "  seen       400 images in training, 199 held out" in out
    assert "guarantee" not in out
    assert run("bundle", "verify", path)[0] == 0
    for command in (["score", path, images], ["evaluate", path, "--normal", images]):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert err.startswith(
            f"anomalyd: bundle {path}: of kind {path.name}, which has no density"
        )
        assert err.count("\n") == 1
    assert run("calibrate", path, images)[0] == 1


def test_a_broken_bundle_does_not_hide_the_others(run, bundle, tmp_path):
    """Each is named; the exit code is the worst."""
    other = tiny.tiny_bundle(tmp_path, name="other")
    tiny_model = other / "model.onnx"
    tiny_model.write_bytes(tiny_model.read_bytes()[:-1])
    code, out, err = run("bundle", "verify", other, bundle)
    assert code == 1
    assert "model.onnx" in err
    assert "good" in out


def test_calibrate_reports_what_it_did(run, tmp_path):
    """Refused images, the new alpha and the promise, on stderr."""
    path = tiny.tiny_bundle(tmp_path)
    seen, new = tiny.draw(400, seed=1)[:5], tiny.draw(299, seed=90)
    np.save(tmp_path / "x.npy", np.concatenate([seen, new]))
    code, out, err = run("calibrate", path, tmp_path / "x.npy", "--confidence", "0.95")
    assert (code, out) == (0, "")
    assert "5 images refused" in err
    assert "on 299 images: false alarms at most alpha with 0.95 confidence" in err
    assert read_bundle(path).manifest.default_alpha == 0.01
    assert err.endswith("default alpha 0.01, smallest 0.00997\n")
    np.save(tmp_path / "few.npy", new[:60])
    code, _, err = run("calibrate", path, tmp_path / "few.npy")
    assert "default alpha 0.0164, smallest 0.0164\n" in err
    assert "for an alpha of 0.01 calibrate with 99 images\n" in err
    np.save(tmp_path / "other.npy", tiny.draw(20, seed=91))
    assert run("score", path, tmp_path / "other.npy", "--alpha", "0.0164")[0] == 0
    code, _, err = run("calibrate", path, tmp_path / "x.npy", "--refit", "--group", r"\d")
    assert code == 1
    assert "group" in err


def test_evaluate_prints_one_object_or_a_table(run, bundle, tmp_path):
    """The same numbers twice, and twice the same bytes for a sample."""
    np.save(tmp_path / "normal.npy", tiny.draw(300, seed=91))
    np.save(tmp_path / "white.npy", np.full((40, 4, 4), 255, np.uint8))
    command = ["evaluate", bundle, "--normal", tmp_path / "normal.npy"]
    command += ["--outliers", f"white={tmp_path / 'white.npy'}", "--limit", "30"]
    code, out, _ = run(*command, "--format", "json")
    result = json.loads(out)
    assert code == 0
    assert result["n"] == 30
    assert result["auroc"] == {"white": 1.0}
    assert run(*command, "--format", "json")[1] == out
    assert run(*command, "--format", "json", "--seed", "1")[1] != out
    code, table, _ = run(*command)
    assert code == 0
    assert "white" in table
    assert "99.9 %" in table
    rows = [line.split() for line in table.splitlines()]
    assert ["nll", "1.0000"] in rows
    assert ["max_pixel_nll", "1.0000"] in rows


def test_evaluate_prints_names_as_they_are(run, bundle, tmp_path):
    """No name is read as mark-up, and no row is cut where the output is no terminal."""
    np.save(tmp_path / "x.npy", tiny.draw(30, seed=91))
    names = ["[red]x[/red]", ":smile:", "a name that takes more than a third of a line"]
    command = ["evaluate", bundle, "--normal", tmp_path / "x.npy"]
    for name in names:
        command += ["--outliers", f"{name}={tmp_path / 'x.npy'}"]
    code, table, _ = run(*command)
    assert code == 0
    assert [name for name in names if table.count(name) != 3] == []


def test_evaluate_writes_a_report(run, bundle, images, tmp_path):
    """One file, said on stderr; with warnings there, and without images if so asked."""
    np.save(tmp_path / "normal.npy", tiny.draw(300, seed=91))
    command = ["evaluate", bundle, "--normal", tmp_path / "normal.npy", "--format", "json"]
    command += ["--outliers", f"larger={tmp_path / 'larger'}"]
    (tmp_path / "larger").mkdir()
    for i, pixels in enumerate(tiny.draw(40, seed=92)):
        Image.fromarray(pixels[..., 0]).resize((8, 8)).save(tmp_path / f"larger/{i}.png")
    report = tmp_path / "report.html"
    code, out, err = run(*command, "--report", report)
    assert code == 0
    (warning,) = json.loads(out)["warnings"]
    assert warning.startswith("larger: width alone tells these outliers with AUROC 1.000")
    assert f"warning: {warning}\n" in err
    assert f"{report} written" in err
    text = report.read_text(encoding="utf-8")
    assert warning in text
    assert text.count("<img") == 16
    assert run(*command, "--report", report, "--no-thumbnails")[1] == out
    assert "<img" not in report.read_text(encoding="utf-8")


def test_an_evaluation_root_brings_its_outliers(run, bundle, tmp_path):
    """train/good, test/good and test/KIND are enough alone."""
    for folder, seed in (("train/good", 1), ("test/good", 92), ("test/scratch", 93)):
        (tmp_path / folder).mkdir(parents=True)
        for i, pixels in enumerate(tiny.draw(12, seed=seed)):
            Image.fromarray(pixels[..., 0]).save(tmp_path / folder / f"{i}.png")
    code, out, _ = run("evaluate", bundle, "--normal", tmp_path, "--format", "json")
    assert code == 0
    assert set(json.loads(out)["auroc"]) == {"scratch"}


def test_a_closed_pipe_is_no_error(bundle, tmp_path):
    """`anomalyd score ... | head -1` ends quietly."""
    np.save(tmp_path / "x.npy", tiny.draw(20_000, seed=94))
    with spawned("score", bundle, tmp_path / "x.npy", "--format", "jsonl") as process:
        assert process.stdout.readline().startswith('{"source"')
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_interrupted_is_130(bundle, tmp_path):
    """Ctrl-C: one line, 130, the journal kept, no file."""
    np.save(tmp_path / "x.npy", tiny.draw(400_000, seed=95))
    part = tmp_path / "x.csv.part"
    with spawned("score", bundle, tmp_path / "x.npy", "--output", tmp_path / "x.csv") as process:
        wait_for(part, 10_000, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "anomalyd: interrupted\n"
    assert part.exists()
    assert not (tmp_path / "x.csv").exists()


def test_a_killed_output_is_resumed(run, bundle, tmp_path):
    """SIGKILL half way leaves the old file; --resume ends with what one run would have written."""
    count = 40_000
    np.save(tmp_path / "x.npy", tiny.draw(count, seed=96))
    path, part = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.part"
    path.write_text("old\n")
    with spawned("score", bundle, tmp_path / "x.npy", "--output", path) as process:
        wait_for(part, 100_000, process)
        os.kill(process.pid, signal.SIGKILL)
    assert path.read_text() == "old\n"
    assert len(part.read_bytes().splitlines()) < count  # half way, not after the end
    code, out, _ = run("score", bundle, tmp_path / "x.npy", "--output", path, "--resume")
    assert (code, out) == (0, "")
    assert not part.exists()
    run("score", bundle, tmp_path / "x.npy", "--output", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == count
    assert path.read_bytes() == whole


def test_no_command_shows_the_help(run):
    """`anomalyd` alone is a question, answered on stderr."""
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: anomalyd")


@pytest.mark.parametrize(("asked", "threads"), [(None, "1"), ("2", "2")])
def test_numpy_spins_on_no_core_that_the_model_needs(bundle, images, asked, threads):
    """Products run in one thread, unless the environment says how many."""
    code = (
        "import sys; from anomalyd.cli import main; assert main(sys.argv[1:]) == 0\n"
        "from threadpoolctl import threadpool_info as info\n"
        "print(*{pool['num_threads'] for pool in info() if pool['internal_api'] == 'openblas'})"
    )
    environment = {k: v for k, v in os.environ.items() if "BLAS" not in k and "OMP" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code, "score", str(bundle), str(images / "00.png")],
        env=environment | ({} if asked is None else {"OPENBLAS_NUM_THREADS": asked}),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == threads
