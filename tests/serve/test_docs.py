"""docs/serving.md says what the daemon can be told and asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from anomalyd.config import _shown
from anomalyd.serve.settings import ServeSettings

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_true():
    """One row a setting, in order, with its default and its help."""
    rows = []
    for field in dataclasses.fields(ServeSettings):
        default = "" if field.default in (None, ()) else _shown(field.default)
        rows.append(f"| `{field.name}` | {default} | {field.metadata['setting'].help} |")
    assert [line for line in TEXT.splitlines() if line.startswith("| `") and "` | " in line][
        -len(rows) :
    ] == rows


def test_every_probe_is_mentioned():
    """And every way to change what is served."""
    for word in ("/livez", "/startupz", "/readyz", "/metrics", "HUP", "--watch", "unload"):
        assert word in TEXT
