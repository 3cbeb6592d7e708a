"""What every test may ask for: the committed fixture, the full data sets, strict arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
pytest_plugins = ["table"]

# Of torch, here and in every process that a test starts: threads are slower than none on images
# of a few pixels, and a second worker of pytest-xdist needs the other core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Neither a deadline nor "too slow": how fast the machine is today says nothing about a law.
settings.register_profile(
    "anomalyd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("anomalyd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that workers end together.
    items.sort(key=lambda item: "train" not in item.path.parts)
    for item in items:
        if "full_data" in getattr(item, "fixturenames", ()):
            item.add_marker("full_data")


@pytest.fixture(scope="session", autouse=True)
def strict_arithmetic() -> Iterator[None]:
    """Overflow, division by zero and NaN are errors; underflow to zero is what exp() is for."""
    with np.errstate(all="raise", under="ignore"):
        yield


@pytest.fixture(scope="session")
def fixture_data() -> Path:
    """The committed fixture: fashion-mnist/ and mnist/ as IDX pairs, images/ as PNG."""
    return TESTS / "fixtures"


@pytest.fixture(scope="session")
def full_data() -> Path:
    """The folder of the full data sets, or a skip that says where it was looked for."""
    root = Path(os.environ.get("ANOMALYD_DATA") or TESTS.parents[1] / "shared" / "data")
    if not (root / "fashion-mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"needs the full data sets: none at {root}; set ANOMALYD_DATA to their folder")
    return root
