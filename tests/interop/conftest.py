"""A daemon that the proofs ask, and what it says by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import CLASSES, PATHS, TRAINED, VAE, Daemon, daemon


@pytest.fixture(scope="session")
def served() -> Iterator[Daemon]:
    """A daemon that every proof only asks: a model without classes, and one with ten."""
    with daemon(TRAINED / VAE, TRAINED / CLASSES, default_model=VAE) as running:
        yield running


@pytest.fixture(scope="session")
def expected(served: Daemon) -> dict[str, dict[str, list[Any]]]:
    """What its own API says of `PATHS`, by model, as columns."""
    found = {}
    for model in (VAE, CLASSES):
        rows = [served.score(path.read_bytes(), model) for path in PATHS]
        found[model] = {name: [row[name] for row in rows] for name in rows[0]}
    return found
