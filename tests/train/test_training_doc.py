"""docs/training.md says what a recipe can say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from anomalyd.config import _shown
from anomalyd.images import _ON_MISMATCH
from anomalyd.train.models import MODELS
from anomalyd.train.recipe import IMAGE_KEYS, TABLES
from anomalyd.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_table_of_training_settings_is_true():
    """One row a setting, in order, with its default and its help."""
    rows = []
    for field in dataclasses.fields(TrainSettings):
        default = "" if field.default in (None, ()) else _shown(field.default)
        help = field.metadata["setting"].help.replace("|", r"\|")
        rows.append(f"| `{field.name}` | {default} | {help} |")
    assert "\n".join(rows) in TEXT


def test_every_table_image_key_and_policy_is_explained():
    """And every model, here or in the README's table."""
    for word in (*IMAGE_KEYS, *(f"[{table}]" for table in TABLES[1:])):
        assert f"`{word}`" in TEXT
    for policy in _ON_MISMATCH:
        assert f"| `{policy}` |" in TEXT
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{model}`" in TEXT + readme for model in MODELS)
