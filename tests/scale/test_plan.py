"""What a run keeps where its results go."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own, for arrow's threads stay where any test before has started them.
READ = """
import io, os
import pyarrow as pa, pyarrow.parquet as pq
from anomalyd.scale.plan import read_table

buffer = io.BytesIO()
pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"], "c": [None, 1.0]}), buffer)
before = set(os.listdir("/proc/self/task"))
print(read_table(buffer.getvalue(), ["a", "b"]).to_pydict())
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_a_part_is_read_without_threads():
    """None is left that could still hold the bytes when the interpreter is gone."""
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'a': [1, 2], 'b': ['x', 'y']}", "0"]
