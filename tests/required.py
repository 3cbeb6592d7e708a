"""What a test does without a tool that it needs: it is passed over, and in .ci/run it fails."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

REQUIRED = "ANOMALYD_PROOFS_REQUIRED"


def missing(what: str) -> NoReturn:
    """Skip, or fail where nothing may be missing."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what} is missing, and {REQUIRED} is set")
    pytest.skip(f"needs {what}; `make test` and `make proofs` as root install it")
