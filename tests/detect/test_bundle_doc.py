"""docs/bundle.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from anomalyd.detect.bundle import MAX_BYTES, REQUIRED, read_bundle
from anomalyd.detect.manifest import Manifest
from anomalyd.detect.tables import Calibration, Golden

DOC = (Path(__file__).resolve().parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[str]:
    """First cells of the section's tables, in order."""
    return re.findall(r"^\| `([a-z_]+)` \|", section(title), re.MULTILINE)


def test_every_key_of_the_manifest_is_described():
    """The table has the manifest's keys, in the order of the code."""
    names = [field.name for field in fields(Manifest)]
    assert rows("manifest.json")[: len(names)] == names


def test_every_array_is_described():
    """The tables of arrays have exactly the arrays."""
    assert rows("calibration.npz") == [field.name for field in fields(Calibration)]
    assert rows("golden.npz") == [field.name for field in fields(Golden)]


def test_every_kind_of_file_and_every_required_one_is_described():
    """Limits and required files are those of the code."""
    for suffix in MAX_BYTES:
        assert f"`{suffix}`" in section("The folder")
    for name in REQUIRED:
        assert f"| `{name}` | MUST |" in section("The folder")


def test_the_contents_link_to_every_section():
    """No section is missing from the list at the top, and no link is dead."""
    titles = re.findall(r"^## (.+)$", DOC, re.MULTILINE)
    links = re.findall(r"^- \[(.+)\]\(#(.+)\)$", DOC, re.MULTILINE)
    assert [text for text, _ in links] == titles
    for text, anchor in links:
        assert anchor == re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")


def test_the_example_writes_a_bundle(tmp_path):
    """The code of the page runs as it stands and its result is read back."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    bundle = read_bundle(tmp_path / "independent-pixels")
    assert bundle.manifest.calibration_n == 250
