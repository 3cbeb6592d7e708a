"""The wheel: complete, and useful without any extra."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "google", "matplotlib", "onnx", "onnxscript", "pandas", "pyarrow", "ray", "safetensors",
    "scipy", "sklearn", "torch",
)  # fmt: skip

# Run with only the base packages: what an extra brings cannot be imported.
BARE = f"""
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Bare())
sys.path.insert(0, sys.argv.pop(1))
import anomalyd
assert anomalyd.__file__.startswith(sys.path[0]), anomalyd.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    # Of what a wheel is built from alone: setuptools would add what an older build/ has left.
    source = folder / "source"
    shutil.copytree(ROOT / "anomalyd", source / "anomalyd", ignore=shutil.ignore_patterns("__py*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def bare(wheel: Path, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", BARE + code, str(wheel), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=wheel)


RUN = "from anomalyd.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_wheel_holds_data_files_and_licence(wheel):
    """Recipes, the page, the type marker and the licence travel; tests and bundles do not."""
    names = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}

    assert {"anomalyd/py.typed", "anomalyd/serve/page.html"} <= names
    assert "anomalyd/train/recipes/vae.toml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "trained")) for name in names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "anomalyd").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_base_install_scores_without_extras(wheel, fixture_data):
    """A bundle verifies and scores with the base packages alone."""
    bundle = ROOT / "tests" / "data" / "format-1" / "tiny"
    images = fixture_data / "mnist" / "t10k-images-idx3-ubyte.gz"
    verified = bare(wheel, RUN, "bundle", "verify", bundle)
    scored = bare(wheel, RUN, "score", bundle, images, "--format", "jsonl")

    assert verified.returncode == 0, verified.stderr
    assert scored.returncode == 0, scored.stderr
    rows = [json.loads(line) for line in scored.stdout.splitlines()]
    assert len(rows) == 200
    assert all(0 < row["p_value"] <= 1 for row in rows)


def test_import_has_no_side_effects(wheel):
    """`import anomalyd` loads no heavy package and configures no logging."""
    code = (
        "import logging\n"
        "heavy = {'numpy', 'onnxruntime', 'PIL', 'click', 'starlette'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not logging.root.handlers\n"
    )
    done = bare(wheel, code)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "{data}", "--model", "vae", "--out", "x"), "anomalyd[train]"),
        (("export", "{bundle}"), "anomalyd[train]"),
        (("score", "{bundle}", "{data}", "--output", "{out}"), "anomalyd[evaluate]"),
        (
            ("score", "{bundle}", "{data}", "--engine", "ray", "--output", "{parts}"),
            "anomalyd[ray]",
        ),
        (("score", "{bundle}", "s3://bucket/x"), "anomalyd[evaluate]"),
        (
            ("evaluate", "{bundle}", "--normal", "{data}", "--report", "{page}"),
            "anomalyd[evaluate]",
        ),
    ],
)
def test_missing_extra_is_named(wheel, fixture_data, tmp_path, arguments, extra):
    """What needs an extra says which one, in one line."""
    places = {
        "data": fixture_data / "mnist" / "t10k-images-idx3-ubyte.gz",
        "bundle": ROOT / "tests" / "data" / "format-1" / "tiny",
        "out": tmp_path / "scores.parquet",
        "parts": tmp_path / "parts",
        "page": tmp_path / "report.html",
    }
    done = bare(wheel, RUN, *(argument.format(**places) for argument in arguments))

    assert done.returncode == 1
    assert extra in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
