"""Where images come from: every form of the DATA and PATH arguments, streamed.

    a folder of images           sub-folders are classes when labels are asked for
    one image
    IDX, gzipped or not          alone, or a folder of pairs: train-images-..., t10k-labels-...
    .npy, .npz                   (N, H, W) or (N, H, W, C) uint8; .npz also `labels`
    Parquet                      an image column: bytes, or a struct with a field `bytes`
    a folder of those            train.parquet and test.parquet are its splits, say
    train/ and test/ folders     among them roots with train/good, test/KIND, ground_truth/KIND
    s3://, gs:// and the like    an image, a Parquet file or a folder of these
    @LIST                        a text file with one PATH a line, for scoring

`DATA:train` and `DATA:test` choose a split. A source never holds its images: it reads them one
after the other, in an order that depends on names alone, again for each iteration. A folder is
listed once, its names kept packed. Hidden files and files that are known to be no images (text,
tables, licences) are left out; any other file is an item, if only to be named as unreadable.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from anomalyd.containers import (
    Item,
    Source,
    Want,
    open_idx,
    open_npy,
    open_npz,
    open_parquet,
)
from anomalyd.errors import CorruptImage, ImageError, SourceError, UsageError
from anomalyd.images import Limits
from anomalyd.stores import Store, fetched, is_uri, open_store

__all__ = [
    "Evaluation",
    "Item",
    "Piece",
    "Source",
    "cut",
    "has_kinds",
    "listed",
    "open_evaluation",
    "open_paths",
    "open_pieces",
    "open_source",
]


@dataclass(frozen=True)
class Evaluation:
    """Normal images and what to tell them from.

    Attributes:
        normal: the normal images.
        outliers: kind of outlier -> its images; empty unless the folder itself has them.
        masks: `Item.source` of an outlier -> the image that marks its unusual pixels.
    """

    normal: Source
    outliers: dict[str, Source] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)


def open_source(
    data: str | Path,
    *,
    split: str | None = None,
    labels: bool = False,
    group: str | None = None,
) -> Source:
    """Returns the source that a DATA argument names.

    Args:
        data: `PATH` or `PATH:SPLIT`.
        split: the split to take where PATH has several and DATA names none.
        labels: whether items carry labels: from sub-folders, the IDX label file or the column.
        group: a regular expression on the path below DATA, of which the first group (or the
            whole match) counts; or TABLE.csv:COLUMN, a table whose first column names files as
            its own folder sees them; for Parquet and .npz the name of a column.

    Raises:
        SourceError: there is no such thing, nothing in it can be read, or the split is unclear.
        MissingExtra: Parquet or a store without pyarrow.
    """
    return _open(data, Want(labels, group), split)


def _open(data: str | Path, want: Want, split: str | None) -> Source:
    if is_uri(str(data)):
        return _open_stored(str(data), want)
    path, asked = _parse(data)
    if not os.path.isdir(path):
        if asked is not None:
            raise SourceError(f"{path}: a file has no splits; give it without :{asked}")
        return _Chain(str(data), (_open_file(path, want),))
    listing = _list(path)
    splits = _splits(listing)
    chosen = _choose(path, splits, asked, split)
    if chosen is None:
        return _open_folder(str(data), listing, want)
    members = splits[chosen]
    if members[0] in listing.folders:
        good = os.path.join(path, "train", "good")
        folder = good if chosen == "train" and has_kinds(path) else os.path.join(path, members[0])
        return _open_folder(str(data), _list(folder), want, label="good" if folder == good else "")
    return _open_folder(str(data), _Listing(path, members, []), want)


def open_paths(
    paths: Sequence[str | Path], *, labels: bool = False, group: str | None = None
) -> Source:
    """Returns the sources of several PATHs as one, in the order given.

    What cannot be opened, a file or a folder in a folder among it, or breaks off half way, is an
    item with its error among the others.

    Raises:
        SourceError: not one of the paths can be opened.
        MissingExtra: Parquet without pyarrow.
    """
    sources: list[Source] = []
    errors: list[SourceError] = []
    for path in paths:
        try:
            opened = _open(path, Want(labels, group, lenient=True), None)
            sources.extend(opened.sources if isinstance(opened, _Chain) else [opened])
        except SourceError as error:
            errors.append(error)
            sources.append(_Unreadable(str(path), str(error)))
    if len(errors) == 1 == len(paths):
        raise errors[0]
    if len(errors) == len(paths):
        first = errors[0] if errors else "no path was given"
        raise SourceError(f"none of {len(paths)} paths can be read; the first: {first}")
    return _Chain(", ".join(map(str, paths)), tuple(sources), lenient=True)


def listed(paths: Sequence[str | Path]) -> list[str]:
    """The PATHs, each @LIST among them replaced by the lines of that file.

    Raises:
        SourceError: a list that cannot be read or that is empty.
    """
    found: list[str] = []
    for path in map(str, paths):
        if not path.startswith("@") or os.path.exists(path):
            found.append(path)
            continue
        try:
            lines = Path(path[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SourceError(f"{path}: the list cannot be read: {reason}") from error
        named = [line.strip() for line in lines if line.strip()]
        if not named:
            raise SourceError(f"{path}: the list is empty; give it one path a line")
        found += named
    return found


def open_evaluation(data: str | Path, *, labels: bool = False) -> Evaluation:
    """Returns what a `--normal DATA` argument names.

    For a root with train/good and test/good: test/good as normal, every other folder in test/ as
    a kind of outlier, and the masks in ground_truth/KIND, NAME.png or NAME_mask.png. For
    anything else its images, all taken as normal.

    Raises:
        SourceError: as `open_source` does.
    """
    if is_uri(str(data)):
        return Evaluation(open_source(data, labels=labels))
    path, asked = _parse(data)
    if asked is not None or not has_kinds(path):
        return Evaluation(open_source(data, labels=labels))
    want = Want(labels, None)
    test = os.path.join(path, "test")
    kinds: dict[str, Source] = {
        kind: _open_folder(kind, _list(os.path.join(test, kind)), want, label=kind)
        for kind in _list(test).folders
    }
    masks = {}
    for kind, source in kinds.items():
        folder = os.path.join(path, "ground_truth", kind)
        if os.path.isdir(folder):
            found = {
                Path(name).stem.removesuffix("_mask"): Path(folder, name)
                for name in _list(folder).files
            }
            masks.update(
                {
                    item.source: found[stem]
                    for item in source
                    if (stem := Path(item.source).stem) in found
                }
            )
    return Evaluation(kinds.pop("good"), kinds, masks)


# --- names, splits and listings ---------------------------------------------------------------

_SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "t10k": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(_SPLIT_NAMES)})(?=[-_.]|$)", re.IGNORECASE)
_IDX = re.compile(r"[-_.](?:idx\d?|ubyte)(?:\.gz)?$", re.IGNORECASE)
_CONTAINER = re.compile(rf"(?:\.npy|\.npz|\.parquet|{_IDX.pattern[:-1]})$", re.IGNORECASE)
_NO_IMAGES = re.compile(
    r"^\.|^(?:readme|licen[cs]e|copying|notice|thumbs\.db)$"
    r"|\.(?:txt|csv|tsv|json|jsonl|md|rst|html|xml|ya?ml|toml|ini|log|py|sh|sha256|md5)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Listing:
    """One folder: the names of its files and sub-folders, sorted."""

    path: str
    files: list[str]
    folders: list[str]


def _parse(data: str | Path) -> tuple[str, str | None]:
    text = str(data)
    if os.path.exists(text):
        return text, None
    path, colon, split = text.rpartition(":")
    if colon and os.path.exists(path):
        if split not in _SPLIT_NAMES:
            known = ", ".join(sorted(set(_SPLIT_NAMES.values())))
            raise SourceError(f"{path}: no split is called {split!r}; there can be {known}")
        return path, _SPLIT_NAMES[split]
    raise SourceError(f"{text}: no such file or folder; check the path")


def _list(folder: str) -> _Listing:
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not entry.name.startswith("."):
                        folders.append(entry.name)
                elif not _NO_IMAGES.search(entry.name):
                    files.append(entry.name)
    except OSError as error:
        raise SourceError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    return _Listing(folder, sorted(files), sorted(folders))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: an item, to be named as unreadable
        return False


def _splits(listing: _Listing) -> dict[str, list[str]]:
    """Split -> its files, or its sub-folder."""
    splits: dict[str, list[str]] = {}
    nameless = False
    for name in filter(_many_images, listing.files):
        if found := _SPLIT.search(name):
            splits.setdefault(_SPLIT_NAMES[found[1].lower()], []).append(name)
        else:
            nameless = True
    if nameless and len(splits) == 1:
        splits = {}  # "train.npz" beside "more.npz" is a name, not one of several splits
    # Sub-folders are splits only where nothing else is: a class may be called "train".
    if not splits and "train" in listing.folders and not listing.files:
        folders = [name for name in listing.folders if name != "ground_truth"]
        named = {_SPLIT_NAMES.get(name, ""): [name] for name in folders}
        if "" not in named and len(named) == len(folders):
            splits = named
    return splits


def _many_images(name: str) -> bool:
    is_labels = _IDX.search(name) and "labels" in name.lower()
    return bool(_CONTAINER.search(name)) and not is_labels


def _choose(
    path: str, splits: dict[str, list[str]], asked: str | None, default: str | None
) -> str | None:
    there = ", ".join(sorted(splits, reverse=True))
    if asked is not None:
        if asked not in splits:
            has = f"it has {there}" if splits else "it has no splits: give it without a suffix"
            raise SourceError(f"{path}: there is no split {asked}; {has}")
        return asked
    if len(splits) <= 1:
        return next(iter(splits), None)
    if default is None or default not in splits:
        first = there.split(", ")[0]
        raise SourceError(f"{path}: it has the splits {there}; say which, as in {path}:{first}")
    return default


def has_kinds(path: str | Path) -> bool:
    """Whether a folder has train/good and test/good, and so its kinds of outliers beside them."""
    return all(os.path.isdir(os.path.join(path, part, "good")) for part in ("train", "test"))


# --- folders ----------------------------------------------------------------------------------


def _open_folder(name: str, listing: _Listing, want: Want, *, label: str = "") -> Source:
    members = tuple(_members(listing, listing.path, label, want, set()))
    if sum(map(len, members)) == 0:
        raise SourceError(f"{listing.path}: it holds no images; give a folder that does")
    return _Chain(name, members)


def _members(
    listing: _Listing, root: str, label: str, want: Want, seen: set[tuple[int, int]]
) -> Iterator[Source]:
    status = os.stat(listing.path)
    if (status.st_dev, status.st_ino) in seen:
        return  # a link back to a folder above, or a second way to the same one
    seen.add((status.st_dev, status.st_ino))
    names = [name for name in listing.files if not _CONTAINER.search(name)]
    if names:
        if want.labels and not label:
            raise SourceError(
                f"{root}: {len(names)} images are in no class folder, such as {names[0]}; "
                "labels need one sub-folder a class"
            )
        packed = b"\0".join(map(os.fsencode, names))
        yield _Files(listing.path, root, packed, len(names), label if want.labels else None, want)
    files = set(listing.files)
    for name in filter(_many_images, listing.files):
        if not (name.endswith(".gz") and name[:-3] in files):  # unpacked beside the packed one
            path = os.path.join(listing.path, name)
            try:
                yield _open_file(path, want)
            except SourceError as error:
                yield _named(path, error, want)
    for folder in listing.folders:
        path = os.path.join(listing.path, folder)
        try:
            inner = _without_splits(path)
        except SourceError as error:
            yield _named(path, error, want)
        else:
            yield from _members(inner, root, label or folder, want, seen)


def _without_splits(folder: str) -> _Listing:
    listing = _list(folder)
    if len(splits := _splits(listing)) > 1:
        raise SourceError(
            f"{folder}: it has the splits {', '.join(splits)}; "
            f"give one of them, as in {folder}:train"
        )
    return listing


def _named(path: str, error: SourceError, want: Want) -> _Unreadable:
    """A member that cannot be opened, as an item where the source is a lenient one."""
    if not want.lenient:
        raise error
    return _Unreadable(path, str(error))


@dataclass(frozen=True)
class _Files:
    """The image files of one folder."""

    name: str
    root: str
    packed: bytes  # names joined by NUL: a million of them take some 20 MB, as strings 80
    count: int
    label: str | None
    want: Want

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        group = _grouping(self.want.group, self.root)
        for name in islice(_unpack(self.packed), start, None):
            path = os.path.join(self.name, name)
            yield Item(_shown(path), None, Path(path), self.label, group(path))


def _unpack(packed: bytes) -> Iterator[str]:
    start = 0
    while start <= len(packed):
        end = packed.find(b"\0", start)
        end = len(packed) if end < 0 else end
        yield os.fsdecode(packed[start:end])
        start = end + 1


def _shown(path: str) -> str:
    """The path without the lone surrogates that stand for undecodable bytes in file names."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()


def _grouping(group: str | None, root: str) -> Callable[[str], str | None]:
    if group is None:
        return lambda _: None
    table, _, column = group.rpartition(":")
    if table.lower().endswith(".csv"):
        return _tabled(table, column)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--group {group}: not a regular expression: {error}") from error

    def of(path: str) -> str:
        below = os.path.relpath(path, root).replace(os.sep, "/")
        found = pattern.search(below)
        if found is None:
            raise SourceError(f"--group {group}: it matches nothing in {below}; widen it")
        return found[1] if pattern.groups and found[1] is not None else found[0]

    return of


def _tabled(table: str, column: str) -> Callable[[str], str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = list(rows.fieldnames or [])
            if column not in names:
                raise UsageError(
                    f"--group {table}:{column}: no such column; it has {', '.join(names)}"
                )
            groups = {os.path.normpath(row[names[0]] or ""): row[column] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--group {table}: cannot be read: {error}") from error
    folder = os.path.dirname(table) or "."

    def of(path: str) -> str:
        name = os.path.relpath(path, folder)
        if not groups.get(name):
            raise SourceError(f"--group {table}: it has no {column} for {name}; add a row")
        return groups[name]

    return of


# --- single files -----------------------------------------------------------------------------


def _open_file(path: str, want: Want) -> Source:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SourceError(f"{path}: neither a regular file nor a folder")
        with open(path, "rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise SourceError(f"{path}: the file cannot be read: {error.strerror}") from error
    lower = path.lower()
    if magic.startswith(b"PAR1") or lower.endswith(".parquet"):
        return open_parquet(path, want)
    if magic == b"\x93NUMPY" or lower.endswith(".npy"):
        return open_npy(path, want)
    if magic.startswith(b"PK") or lower.endswith(".npz"):
        return open_npz(path, want)
    if magic.startswith((b"\x1f\x8b", b"\0\0\x08")) or _IDX.search(path):
        return open_idx(path, want)
    if want.labels:
        raise SourceError(f"{path}: a single image has no label; give a folder of class folders")
    folder, name = os.path.split(path)
    return _Files(folder, folder or ".", os.fsencode(name), 1, None, want)


# --- several sources --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unreadable:
    """A path that could not be opened, as the one item that says so."""

    name: str
    why: str

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        if start == 0:
            yield Item(_shown(self.name), None, b"", error=CorruptImage(self.why))


@dataclass(frozen=True)
class _Chain:
    """Sources one after the other; a lenient one goes on behind a source that breaks off."""

    name: str
    sources: tuple[Source, ...]
    lenient: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        for source in self.sources:
            if start >= len(source):
                start -= len(source)
                continue
            yield from _leniently(source, start) if self.lenient else source.after(start)
            start = 0


def _leniently(source: Source, start: int) -> Iterator[Item]:
    """Items from a place on; where the source breaks off, its last one says so."""
    place = start
    try:
        for item in source.after(start):
            yield item
            place += 1
    except SourceError as error:
        index = None if isinstance(source, _Files) else place
        yield Item(_shown(source.name), index, b"", error=CorruptImage(str(error)))


# --- pieces, for several processes to read ----------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stretch of a source that any process opens by itself.

    Attributes:
        path: the file of many images, or the folder of the named ones.
        names: names of images in that folder, joined by NUL; None of a file of many images.
        start: place of the first item in the file; 0 for names.
        count: items, as names and headers promise them.
        last: nothing of the file comes after.
        error: why there are no images; one item says so.
    """

    path: str
    names: bytes | None = None
    start: int = 0
    count: int = 1
    last: bool = True
    error: str | None = None


def cut(source: Source, size: int) -> Iterator[list[Piece]]:
    """Cut a source from `open_paths` into runs of `size` items; the last one may be shorter.

    Put together, the items of all runs are those of the source, each of them once and in order.
    """
    run: list[Piece] = []
    left = size
    for leaf in _leaves(source):
        start = 0
        while start < len(leaf):
            taken = min(left, len(leaf) - start)
            run.append(_piece(leaf, start, taken))
            start, left = start + taken, left - taken
            if not left:
                yield run
                run, left = [], size
    if run:
        yield run


def open_pieces(pieces: Iterable[Piece]) -> Iterator[Item]:
    """The items of a run, in order; what has gone since it was cut is named item by item."""
    for piece in pieces:
        try:
            source = _opened(piece)
        except (SourceError, OSError) as error:
            for place in range(piece.start, piece.start + piece.count):
                yield Item(_shown(piece.path), place, b"", error=CorruptImage(str(error)))
            continue
        items = _leniently(source, piece.start)
        yield from items if piece.last else islice(items, piece.count)


def _leaves(source: Source) -> Iterator[Source]:
    if isinstance(source, _Chain):
        for inner in source.sources:
            yield from _leaves(inner)
    else:
        yield source


def _piece(leaf: Source, start: int, count: int) -> Piece:
    last = start + count == len(leaf)
    if isinstance(leaf, _Unreadable):
        return Piece(leaf.name, error=leaf.why)
    if isinstance(leaf, _Files | _Stored):
        names = b"\0".join(leaf.packed.split(b"\0")[start : start + count])
        return Piece(leaf.name, names, count=count, last=last)
    return Piece(leaf.name, start=start, count=count, last=last)


def _opened(piece: Piece) -> Source:
    want = Want(False, None)
    if piece.error is not None:
        return _Unreadable(piece.path, piece.error)
    if piece.names is None:
        return (
            open_parquet(piece.path, want) if is_uri(piece.path) else _open_file(piece.path, want)
        )
    if is_uri(piece.path):
        return _Stored(open_store(piece.path), piece.path, piece.names, piece.count, None, want)
    return _Files(piece.path, piece.path or ".", piece.names, piece.count, None, want)


# --- stores -----------------------------------------------------------------------------------


def _open_stored(uri: str, want: Want) -> Source:
    store = open_store(uri)
    if store.is_file():
        folder, _, name = uri.rpartition("/")
        if name.lower().endswith(".parquet"):
            return _Chain(uri, (open_parquet(uri, want),))
        if _CONTAINER.search(name):
            raise SourceError(f"{uri}: of files of many images only Parquet is read from a store")
        if want.labels:
            raise SourceError(f"{uri}: a single image has no label; give a folder of them")
        stored = _Stored(open_store(folder), folder, name.encode(), 1, None, want)
        return _Chain(uri, (stored,))
    folders: dict[tuple[str, ...], list[str]] = {}
    for below in store.list():
        *above, name = below.split("/")
        if not any(part.startswith(".") for part in above) and not _NO_IMAGES.search(name):
            folders.setdefault(tuple(above), []).append(name)
    if not folders:
        raise SourceError(f"{uri}: it holds no images; give a folder that does")
    top = sorted({above[0] for above in folders if above})
    splits = _splits(_Listing(uri, sorted(folders.get((), [])), top))
    if len(splits) > 1:
        one = next(iter(splits.values()))[0]
        raise SourceError(
            f"{uri}: it has the splits {', '.join(splits)}; give one of them, as in "
            f"{uri.rstrip('/')}/{one}"
        )
    members: list[Source] = []
    for parts in sorted(folders):
        place = "/".join([uri.rstrip("/"), *parts])
        label = parts[0] if parts else None
        if want.labels and label is None:
            raise SourceError(f"{uri}: images are in no class folder; labels need one a class")
        names = sorted(name for name in folders[parts] if not _CONTAINER.search(name))
        if names:
            packed = "\0".join(names).encode()
            inner = open_store(place)
            stored = _Stored(inner, uri, packed, len(names), label if want.labels else None, want)
            members.append(stored)
        for name in sorted(filter(_many_images, folders[parts])):
            if name.lower().endswith(".parquet"):
                members.append(open_parquet(f"{place}/{name}", want))
            else:
                why = "of files of many images only Parquet is read from a store"
                members.append(_Unreadable(f"{place}/{name}", why))
    return _Chain(uri, tuple(members))


@dataclass(frozen=True)
class _Stored:
    """The image files of one folder in a store, fetched some way ahead."""

    store: Store
    root: str
    packed: bytes
    count: int
    label: str | None
    want: Want

    @property
    def name(self) -> str:
        return self.store.uri

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        group = _grouping(self.want.group, self.root)
        names = islice((name.decode() for name in self.packed.split(b"\0")), start, None)
        for name, found in fetched(self.store, names, Limits().max_bytes):
            path = f"{self.store.uri.rstrip('/')}/{name}"
            if isinstance(found, bytes):
                yield Item(path, None, found, self.label, group(path))
            else:
                error = found if isinstance(found, ImageError) else CorruptImage(str(found))
                yield Item(path, None, b"", self.label, group(path), error)
