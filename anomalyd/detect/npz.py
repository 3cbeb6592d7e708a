"""Plain arrays in a zip, read without trusting a byte of it.

The subset of NumPy's .npz that bundles use: entries stored, not compressed, so that no entry is
larger than the file; C order, little-endian, NPY 1.0 headers matched literally, so that nothing
is ever evaluated or unpickled. `np.load` reads it and `np.savez` writes it.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalyd.errors import BundleError

__all__ = ["pack_arrays", "unpack_arrays"]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip entry can carry
_MAX_DIRECTORY = 4096
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9]{1,2})', 'fortran_order': False, "
    rb"'shape': \(((?:[0-9]{1,12}, ?)*(?:[0-9]{1,12})?)\), \} *\n"
)
_BAD_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,  # an unknown compression method or zip version
    RuntimeError,  # an encrypted entry
    EOFError,
    OSError,
    ValueError,
    IndexError,
    OverflowError,
    struct.error,
)


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Deterministic .npz bytes: the order given, stored, with a fixed time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            entry = zipfile.ZipInfo(f"{key}.npy", date_time=_EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, _npy(array))
    return buffer.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def unpack_arrays(
    data: bytes,
    expected: Mapping[str, tuple[str, int]],
    what: str,
    later: Collection[str] = (),
) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz that holds exactly the expected keys, read-only.

    Args:
        data: bytes of the file.
        expected: key -> (dtype in NumPy's spelling, e.g. "<f8"; number of dimensions).
        what: name of the file, for messages.
        later: those of the keys that older files lack, all of them.

    Raises:
        BundleError: not such a file, or a key, dtype or shape other than expected.
    """
    names = {f"{key}.npy" for key in expected}
    try:
        members = _members(data, names, names - {f"{key}.npy" for key in later})
    except _BAD_ZIP as error:
        raise BundleError(f"{what}: not a plain .npz file: {error}; copy it again") from None
    return {
        key: _array(members[f"{key}.npy"], dtype, ndim, f"{what}: {key}")
        for key, (dtype, ndim) in expected.items()
        if f"{key}.npy" in members
    }


def _members(data: bytes, names: set[str], older: set[str]) -> dict[str, bytes]:
    _check_directory(data, {len(names), len(older)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        found = sorted(entry.filename for entry in entries)
        if found not in (sorted(names), sorted(older)):
            raise ValueError(f"it must hold {sorted(names)}, not {found}")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise ValueError(f"{entry.filename} must be stored, not compressed")
        return {entry.filename: archive.read(entry) for entry in entries}


def _check_directory(data: bytes, counts: set[int]) -> None:
    """Bound the zip's directory before `zipfile` reads it into objects."""
    end = data[-22:]
    if len(end) < 22 or not end.startswith(b"PK\x05\x06"):
        raise ValueError("it does not end in a zip directory")
    _, _, _, here, total, size, _, comment = struct.unpack("<4s4H2LH", end)
    if data[-42:-38] == b"PK\x06\x07" or comment or size > _MAX_DIRECTORY:
        raise ValueError("its zip directory is not a plain one")
    if here not in counts or total != here:
        raise ValueError(f"it must hold {max(counts)} arrays, not {total}")


def _array(data: bytes, dtype: str, ndim: int, what: str) -> NDArray[Any]:
    header = _HEADER.match(data, 10)
    length = int.from_bytes(data[8:10], "little")
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None or header.end() != 10 + length:
        raise BundleError(f"{what}: not a plain NPY 1.0 array; write it with np.savez")
    found = header[1].decode()
    shape = tuple(int(side) for side in header[2].split(b",") if side.strip())
    if found != dtype or len(shape) != ndim:
        raise BundleError(
            f"{what}: must be {np.dtype(dtype)} with {ndim} dimensions, "
            f"not {found} with shape {shape}"
        )
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data) - header.end():
        raise BundleError(f"{what}: shape {shape} does not fit its {len(data)} bytes")
    # Copied, because the payload need not be aligned inside the file.
    array = np.frombuffer(data, dtype, offset=header.end()).reshape(shape).copy()
    array.setflags(write=False)
    return array
