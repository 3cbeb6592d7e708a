"""The bundle: a folder that carries one model from whoever trained it to whoever scores with it.

    model.onnx  manifest.json  calibration.npz  golden.npz  CARD.md        and what else it lists

A bundle comes from strangers, so reading it trusts nothing: what the folder holds, the sizes and
the hashes are checked before any file is parsed, the bytes that were hashed are the bytes that
are used, and no file is ever evaluated or unpickled. What it does not do: prove who made the
bundle (sign the folder for that) or bound the work that a well-formed graph asks for.

docs/bundle.md is the format; this module is one reader and one writer of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalyd.detect.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Guarantee,
    Manifest,
    Output,
    check_manifest,
    dump_manifest,
    parse_manifest,
)
from anomalyd.detect.npz import pack_arrays, unpack_arrays
from anomalyd.detect.onnxfile import check_graph, scan_model
from anomalyd.errors import BundleError

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "Calibration",
    "FileEntry",
    "Golden",
    "Guarantee",
    "Manifest",
    "Output",
    "find_bundles",
    "pack_calibration",
    "pack_golden",
    "read_bundle",
    "write_bundle",
]

MANIFEST = "manifest.json"
REQUIRED = ("model.onnx", "calibration.npz", "golden.npz", "CARD.md")
MAX_FILES = 64
_MIB = 1 << 20
MAX_MANIFEST = 1 * _MIB
# Data, never code: suffix -> most bytes that a file of its kind may have.
MAX_BYTES = {
    ".onnx": 1024 * _MIB,
    ".safetensors": 4096 * _MIB,
    ".npz": 256 * _MIB,
    ".md": 16 * _MIB,
    ".toml": 1 * _MIB,
    ".json": 16 * _MIB,
    ".csv": 64 * _MIB,
    ".txt": 1 * _MIB,
    ".png": 16 * _MIB,
}
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_CALIBRATION = {
    "fit_nll": ("<f8", 1),
    "fit_statistics": ("<f4", 2),
    "scores": ("<f8", 1),
    "p_table": ("<f8", 1),
    "training_hashes": ("<u8", 1),
    "calibration_hashes": ("<u8", 1),
}
_GOLDEN = {"images": ("|u1", 4), "log_likelihood": ("<f8", 2), "statistics": ("<f4", 2)}


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns raw scores into p-values, the content of `calibration.npz`.

    Attributes:
        fit_nll: float64 (m,), nats, ascending: -log-likelihood of the fit split.
        fit_statistics: float32 (m, S): the graph's statistics on the fit split.
        scores: float64 (n,), ascending: verdict scores of the calibration split.
        p_table: float64 (n + 1,), strictly increasing in (0, 1]; the p-value of a score s is
            p_table[number of calibration scores >= s].
        training_hashes: uint64, ascending: images of train, validation and fit split.
        calibration_hashes: uint64, ascending: images of the calibration split.
    """

    fit_nll: NDArray[np.float64]
    fit_statistics: NDArray[np.float32]
    scores: NDArray[np.float64]
    p_table: NDArray[np.float64]
    training_hashes: NDArray[np.uint64]
    calibration_hashes: NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Golden:
    """Images and the raw scores that the graph must give them, the content of `golden.npz`.

    Attributes:
        images: uint8 (g, H, W, C), g >= 1.
        log_likelihood: float64 (g, K), nats.
        statistics: float32 (g, S).
    """

    images: NDArray[np.uint8]
    log_likelihood: NDArray[np.float64]
    statistics: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle whose every byte has been verified.

    Attributes:
        path: the folder.
        manifest: what it says about itself.
        model: bytes of model.onnx, scanned.
        calibration: content of calibration.npz, checked.
        golden: content of golden.npz, checked.
    """

    path: Path
    manifest: Manifest
    model: bytes
    calibration: Calibration
    golden: Golden

    def read(self, name: str) -> bytes:
        """Verified bytes of one listed file, such as "explain.onnx" or "weights.safetensors".

        Raises:
            BundleError: the bundle lists no such file, or it changed since the bundle was read.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                f"bundle {self.path}: no {name} in it; it has {', '.join(self.manifest.files)}"
            )
        try:
            return _read_verified(_standing(self.path) / name, entry)
        except BundleError as error:
            raise BundleError(f"bundle {self.path}: {error}") from None


def pack_calibration(calibration: Calibration) -> bytes:
    """Bytes of `calibration.npz`; the same arrays always give the same bytes."""
    return _pack(calibration, _CALIBRATION)


def pack_golden(golden: Golden) -> bytes:
    """Bytes of `golden.npz`; the same arrays always give the same bytes."""
    return _pack(golden, _GOLDEN)


def _pack(record: Calibration | Golden, expected: Mapping[str, tuple[str, int]]) -> bytes:
    return pack_arrays(
        {key: np.asarray(getattr(record, key), dtype) for key, (dtype, _) in expected.items()}
    )


# Reading


def find_bundles(path: str | Path) -> list[Path]:
    """The bundle folder itself, or every bundle folder directly inside, sorted by name.

    Raises:
        BundleError: no such folder.
    """
    root = Path(path)
    if (_standing(root) / MANIFEST).is_file():
        return [root]
    if not root.is_dir():
        raise BundleError(f"bundle {root}: no such folder; name a bundle or a folder of bundles")
    names = {_name_of(entry.name) for entry in root.iterdir()}
    inside = [root / name for name in names if name is not None]
    return sorted(entry for entry in inside if (_standing(entry) / MANIFEST).is_file())


def read_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder, verified before it is parsed.

    Raises:
        BundleError: what is wrong with it, why that matters and what to do.
    """
    root = Path(path)
    while True:
        folder = _standing(root)
        before = _identity(folder)
        try:
            return dataclasses.replace(_read_folder(folder), path=root)
        except BundleError as error:
            # A writer may have put another bundle here while this one was being read.
            if before is None or _identity(_standing(root)) == before:
                raise BundleError(f"bundle {root}: {error}") from None


def _read_folder(folder: Path) -> Bundle:
    present = _list(folder)
    manifest = parse_manifest(_read_file(folder / MANIFEST, MAX_MANIFEST))
    _check_listing(manifest, present)
    content = {}
    for name, entry in manifest.files.items():
        data = _read_verified(folder / name, entry)
        if name.endswith((".onnx", ".npz")):  # the rest is carried, not used
            content[name] = data
    # From here on every byte is what the manifest promised, and parsing may begin.
    calibration = Calibration(
        **unpack_arrays(content["calibration.npz"], _CALIBRATION, "calibration.npz")
    )
    golden = Golden(**unpack_arrays(content["golden.npz"], _GOLDEN, "golden.npz"))
    _check_calibration(manifest, calibration)
    _check_golden(manifest, golden)
    for name in content:
        if name.endswith(".onnx"):
            graph = scan_model(content[name], name)
            if name == "model.onnx":
                check_graph(graph, manifest, name)
    return Bundle(folder, manifest, content["model.onnx"], calibration, golden)


def _list(folder: Path) -> set[str]:
    """Names in the folder, every one a plain file of its own."""
    names: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                _check_plain(entry.name, entry.stat(follow_symlinks=False))
                names.add(entry.name)
                if len(names) > MAX_FILES:
                    raise BundleError(
                        f"more than {MAX_FILES} files in the folder; is it a bundle at all?"
                    )
    except OSError as error:
        raise BundleError(f"cannot be listed: {error.strerror}; is the path right?") from None
    if MANIFEST not in names:
        raise BundleError(f"{MANIFEST} is missing; a bundle is a folder that has one")
    return names


def _check_plain(name: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(
            f"{reprlib.repr(name)} is a symbolic link, which may point out of the bundle; "
            "put the file itself in its place"
        )
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{reprlib.repr(name)} is not a regular file; a bundle has only those")
    if status.st_nlink > 1:
        raise BundleError(
            f"{reprlib.repr(name)} is a hard link ({status.st_nlink} names), which can be changed "
            "from outside the bundle; copy the file itself"
        )


def _check_listing(manifest: Manifest, present: set[str]) -> None:
    _check_files(manifest.files)
    for name in manifest.files:
        if name not in present:
            raise BundleError(f"{name} is listed in {MANIFEST} but missing; copy the bundle again")
    extra = sorted(present - manifest.files.keys() - {MANIFEST})
    if extra:
        raise BundleError(
            f"{reprlib.repr(extra[0])} is not listed in {MANIFEST}; "
            "a bundle holds nothing unverified, remove it"
        )


def _check_files(files: Mapping[str, FileEntry]) -> None:
    """Refuse names that leave the folder, kinds that are not data, sizes beyond the limits."""
    for name, entry in files.items():
        shown = reprlib.repr(name)
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise BundleError(
                f"{shown} is not a file name in the bundle's own folder (like {_FILE.pattern}); "
                "a bundle is flat and nothing in it points elsewhere"
            )
        limit = MAX_BYTES.get(Path(name).suffix)
        if limit is None:
            kinds = " ".join(sorted(MAX_BYTES))
            raise BundleError(f"{shown} is of no kind that a bundle may hold ({kinds}); remove it")
        if not 0 <= entry["bytes"] <= limit:
            raise BundleError(f"{shown} has {entry['bytes']} bytes; at most {limit} are allowed")
        if not _SHA256.fullmatch(entry["sha256"]):
            raise BundleError(f"{shown}: sha256 must be 64 lower-case hexadecimal digits")
    for name in REQUIRED:
        if name not in files:
            raise BundleError(f"{name} is missing from the files in {MANIFEST}; export it again")
    if len(files) >= MAX_FILES:
        raise BundleError(f"{len(files)} files listed; at most {MAX_FILES - 1} are allowed")


def _read_verified(path: Path, entry: FileEntry) -> bytes:
    data = _read_file(path, entry["bytes"])
    if len(data) != entry["bytes"]:
        raise BundleError(
            f"{path.name} has {len(data)} bytes where {MANIFEST} says {entry['bytes']}; "
            "copy the bundle again"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise BundleError(
            f"{path.name} has the SHA-256 {found[:16]}... where {MANIFEST} says "
            f"{entry['sha256'][:16]}...; it was altered or damaged, copy the bundle again"
        )
    return data


def _read_file(path: Path, limit: int) -> bytes:
    # Non-blocking, so that a FIFO cannot hang us; links are refused by the kernel where it can.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            _check_plain(path.name, status)
            if status.st_size > limit:
                raise BundleError(
                    f"{path.name} has {status.st_size} bytes; at most {limit} are expected"
                )
            return file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}") from None


def _check_calibration(manifest: Manifest, c: Calibration) -> None:
    n, width = len(c.scores), len(manifest.statistics)
    expected = manifest.calibration_n
    table = np.arange(1, n + 2) / (n + 1)
    marginal = manifest.guarantee["kind"] == "marginal"
    rules: list[tuple[bool, str]] = [
        (len(c.fit_nll) >= 1, "fit_nll must not be empty"),
        (n == expected, f"{n} scores where {MANIFEST} says calibration_n {expected}"),
        (
            c.fit_statistics.shape == (len(c.fit_nll), width),
            f"fit_statistics must be {(len(c.fit_nll), width)}, not {c.fit_statistics.shape}",
        ),
        (len(c.p_table) == n + 1, f"p_table must have {n + 1} entries, not {len(c.p_table)}"),
    ]
    rules += [
        (bool(np.isfinite(getattr(c, key)).all()), f"{key} must be finite")
        for key, (dtype, _) in _CALIBRATION.items()
        if dtype[1] == "f"
    ]
    rules += [
        (_ascends(getattr(c, key)), f"{key} must be sorted in ascending order")
        for key in ("fit_nll", "scores", "training_hashes", "calibration_hashes")
    ]
    _first_broken("calibration.npz", rules)
    _first_broken(
        "calibration.npz",
        [
            (
                bool((c.p_table[1:] > c.p_table[:-1]).all() and 0 < c.p_table[0])
                and c.p_table[-1] <= 1,
                "p_table must increase strictly within (0, 1]",
            ),
            (
                not marginal or bool(np.abs(c.p_table - table).max() <= 1e-12),
                "p_table must be r / (n + 1) under a marginal guarantee",
            ),
            (
                manifest.default_alpha >= c.p_table[0] * (1 - 1e-12),
                f"default_alpha {manifest.default_alpha:g} is below the smallest p-value "
                f"{c.p_table[0]:g}, so nothing could ever be flagged",
            ),
        ],
    )


def _check_golden(manifest: Manifest, g: Golden) -> None:
    image = manifest.image
    shape = (image.height, image.width, image.channels)
    count, width = len(g.images), len(manifest.statistics)
    rows = g.log_likelihood.shape
    classes = manifest.classes
    _first_broken(
        "golden.npz",
        [
            (count >= 1, "images must not be empty"),
            (g.images.shape[1:] == shape, f"images must be {shape}, not {g.images.shape[1:]}"),
            (rows[0] == count and rows[1] >= 1, f"log_likelihood must have {count} rows"),
            (
                classes is None or rows[1] == len(classes),
                f"log_likelihood must have one column per class, not {rows[1]}",
            ),
            (
                g.statistics.shape == (count, width),
                f"statistics must be {(count, width)}, not {g.statistics.shape}",
            ),
            (bool(np.isfinite(g.log_likelihood).all()), "log_likelihood must be finite"),
            (bool(np.isfinite(g.statistics).all()), "statistics must be finite"),
        ],
    )


def _first_broken(what: str, rules: list[tuple[bool, str]]) -> None:
    for holds, message in rules:
        if not holds:
            raise BundleError(f"{what}: {message}; export the bundle again")


def _ascends(array: NDArray[Any]) -> bool:
    return bool((array[1:] >= array[:-1]).all())


# Writing
#
# A bundle is replaced in two renames, NAME -> .NAME.old and .NAME.<random>.new -> NAME. Killed
# between them, NAME is missing and .NAME.old is whole: readers look there, and the next writer
# puts it back. So there is always one whole bundle to be read, the old or the new.


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, bytes], *, replace: bool = False
) -> None:
    """Write a bundle that appears at `path` whole or not at all.

    Args:
        path: the folder to be; missing parents are made.
        manifest: its `files` is filled in from the files.
        files: name -> bytes of everything but manifest.json.
        replace: put it in the place of a bundle that is there; a folder with anything else in
            it is never replaced.

    Raises:
        BundleError: `read_bundle` would refuse the result, something is there already, or the
            disk refuses.
    """
    target = Path(path).resolve()
    complete = _with_files(manifest, files)
    check_manifest(complete)
    _check_files(complete.files)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _check_target(target, replace)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent)
        )
        try:
            _write_folder(temporary, {**files, MANIFEST: dump_manifest(complete)})
            _read_folder(temporary)
            _move_in(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except BundleError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    except OSError as error:
        raise BundleError(f"bundle {path}: cannot be written: {error.strerror}") from None


def _with_files(manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    entries: dict[str, FileEntry] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in sorted(files.items())
    }
    return dataclasses.replace(manifest, files=entries)


def _check_target(target: Path, replace: bool) -> None:
    """Refuse to replace what is no bundle: `--out .` must not cost anyone a folder."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not replace:
        raise BundleError("something is there already; replace it on purpose or name another path")
    if not target.is_dir():
        raise BundleError("a file is there, not a bundle; name another path")
    present = _list(target)
    listed = parse_manifest(_read_file(target / MANIFEST, MAX_MANIFEST)).files
    foreign = sorted(present - listed.keys() - {MANIFEST})
    if foreign:
        raise BundleError(
            f"{reprlib.repr(foreign[0])} in it is no part of the bundle and would be lost; move it"
        )


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    folder.chmod(0o755)  # mkdtemp's 0700 would keep a daemon under another user out
    _sync(folder)


def _move_in(new: Path, target: Path) -> None:
    old = _old(target)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(target: Path) -> None:
    """Finish what a writer that was killed left undone."""
    old = _old(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _standing(path: Path) -> Path:
    """Where the bundle of that path stands: there, or set aside by a writer that was killed."""
    resolved = path.resolve()
    old = _old(resolved)
    return old if old.is_dir() and not resolved.exists() else path


def _name_of(entry: str) -> str | None:
    """Name of the bundle that a folder entry stands for, None for hidden entries."""
    if entry.startswith(".") and entry.endswith(".old"):
        return entry[1:-4] or None
    return None if entry.startswith(".") else entry


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
