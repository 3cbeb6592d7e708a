"""Writes tests/data/format-1/tiny, the bundle that keeps format 1 readable.

    python tests/make_format1.py FOLDER

It was run once. Every later anomalyd must read the committed bundle as it is, so it is never
written again: a change of format makes a new folder beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import tiny_bundle

if __name__ == "__main__":
    print(tiny_bundle(Path(sys.argv[1]), n=99))
