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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

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
from anomalyd.detect.onnxfile import check_graph, scan_model
from anomalyd.detect.tables import (
    Calibration,
    Golden,
    pack_calibration,
    pack_golden,
    unpack_calibration,
    unpack_golden,
)
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
    "glance",
    "pack_calibration",
    "pack_golden",
    "read_bundle",
    "write_bundle",
]

MANIFEST, MODEL = "manifest.json", "model.onnx"
REQUIRED = (MODEL, "calibration.npz", "golden.npz", "CARD.md")
SAMPLER, CACHED = "sampler.onnx", frozenset({"row.onnx", "step.onnx"})
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

    @property
    def graphs(self) -> list[str]:
        """The names of its graphs; model.onnx is the one that scores."""
        return [name for name in self.manifest.files if name.endswith(".onnx")]

    def graph(self, name: str) -> bytes:
        """The same of a graph, which is seen to hold nothing but what `scan_model` allows.

        Raises:
            BundleError: as `read`; a graph that is not what its name says.
        """
        data = self.read(name)
        try:
            check_graph(scan_model(data, name), self.manifest, name)
        except BundleError as error:
            raise BundleError(f"bundle {self.path}: {error}") from None
        return data


# Reading


def find_bundles(path: str | Path) -> list[Path]:
    """The bundle folder itself, or every bundle folder directly inside, sorted by name.

    Raises:
        BundleError: no such folder, or one that cannot be listed.
    """
    root = Path(path)
    if _is_bundle(root):
        return [root]
    try:
        if not root.is_dir():
            raise BundleError(
                f"bundle {root}: no such folder; name a bundle or a folder of bundles"
            )
        names = {_name_of(entry.name) for entry in root.iterdir()}
    except OSError as error:
        raise BundleError(f"bundle {root}: cannot be listed: {error.strerror}") from None
    inside = [root / name for name in names if name is not None]
    return sorted(entry for entry in inside if _is_bundle(entry))


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
            # A writer may have put another bundle here while this one was being read, or be
            # about to: between its two renames this one stands at another path.
            if _standing(root) == folder and _identity(folder) == before:
                raise BundleError(f"bundle {root}: {error}") from None


def glance(path: str | Path) -> tuple[Manifest, tuple[tuple[str, int, int, int], ...]]:
    """What the bundle in a folder says about itself, with nothing verified, and the state of it.

    Returns:
        its manifest, and name, bytes, time of change (ns) and inode of every file: a bundle that
        was written anew differs.

    Raises:
        BundleError: no manifest there, or one that cannot be read.
    """
    folder = _standing(Path(path))
    try:
        manifest = parse_manifest(_read_file(folder / MANIFEST, MAX_MANIFEST))
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError as error:
        raise BundleError(f"bundle {path}: cannot be listed: {error.strerror}") from None
    except BundleError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    return manifest, tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in found))


def _read_folder(folder: Path) -> Bundle:
    present = _list(folder)
    manifest = parse_manifest(_read_file(folder / MANIFEST, MAX_MANIFEST))
    _check_listing(manifest, present)
    content = {}
    for name, entry in manifest.files.items():
        if name == MODEL or name.endswith(".npz"):
            content[name] = _read_verified(folder / name, entry)
        else:  # read by who uses it
            _verify(folder / name, entry)
    # From here on every byte is what the manifest promised, and parsing may begin.
    calibration = unpack_calibration(content["calibration.npz"], manifest)
    golden = unpack_golden(content["golden.npz"], manifest)
    check_graph(scan_model(content[MODEL], MODEL), manifest, MODEL)
    return Bundle(folder, manifest, content[MODEL], calibration, golden)


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
    if not CACHED.isdisjoint(files) and not CACHED | {SAMPLER} <= files.keys():
        absent = min((CACHED | {SAMPLER}) - files.keys())
        raise BundleError(
            f"{absent} is missing from the files in {MANIFEST}: {' and '.join(sorted(CACHED))} "
            f"are there together, beside {SAMPLER}; export it again"
        )
    if len(files) >= MAX_FILES:
        raise BundleError(f"{len(files)} files listed; at most {MAX_FILES - 1} are allowed")


def _read_verified(path: Path, entry: FileEntry) -> bytes:
    data = _read_file(path, entry["bytes"])
    _compare(path.name, entry, len(data), hashlib.sha256(data).hexdigest())
    return data


def _verify(path: Path, entry: FileEntry) -> None:
    with _opened(path, entry["bytes"]) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _compare(path.name, entry, file.tell(), digest)


def _compare(name: str, entry: FileEntry, size: int, digest: str) -> None:
    if size != entry["bytes"]:
        raise BundleError(
            f"{name} has {size} bytes where {MANIFEST} says {entry['bytes']}; "
            "it is truncated or altered, copy the bundle again"
        )
    if digest != entry["sha256"]:
        raise BundleError(
            f"{name} has the SHA-256 {digest[:16]}... where {MANIFEST} says "
            f"{entry['sha256'][:16]}...; it is damaged or altered, copy the bundle again"
        )


def _read_file(path: Path, limit: int) -> bytes:
    with _opened(path, limit) as file:
        return file.read(limit + 1)


@contextmanager
def _opened(path: Path, limit: int) -> Iterator[BufferedReader]:
    """A plain file of at most `limit` bytes, opened without following a link or waiting."""
    flags = os.O_RDONLY
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # each where the system has it
        flags |= getattr(os, flag, 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_plain(path.name, status)
            if status.st_size > limit:
                raise BundleError(
                    f"{path.name} has {status.st_size} bytes where at most {limit} are expected; "
                    "it is altered or no bundle, copy the bundle again"
                )
            yield file
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}") from None


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
    target = _resolved(Path(path))
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
    return path.parent / f".{path.name}.old"  # with_name refuses the root folder, which has none


def _standing(path: Path) -> Path:
    """Where the bundle of that path stands: there, or set aside by a writer that was killed."""
    resolved = _resolved(path)
    old = _old(resolved)
    try:
        aside = old.is_dir() and not resolved.exists()
    except OSError:  # no way in, or a name too long: so says whoever reads the path itself
        aside = False
    return old if aside else path


def _is_bundle(path: Path) -> bool:
    """Whether one stands there, looked for twice: a writer may move it between two looks."""
    places = (path, _old(_resolved(path)), path)
    # Unlike Path.is_file, does not mind a folder that may not be entered, or a name too long.
    return any(os.path.isfile(place / MANIFEST) for place in places)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, does not mind a loop of links


def _name_of(entry: str) -> str | None:
    """Name of the bundle that a folder entry stands for, None for hidden entries."""
    if entry.startswith(".") and entry.endswith(".old"):
        return entry[1:-4] or None
    return None if entry.startswith(".") else entry


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What another folder at the same path differs in, even one with a removed one's inode."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
