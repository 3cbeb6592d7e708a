"""Files and folders by URI: s3://, gs:// and hdfs:// through pyarrow, any other through fsspec.

A plain path is one, too, so that what is written to a folder reads the same for all. A store is
asked as little as it goes: a folder is listed once, a file is written in one piece, and whole or
not at all.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from anomalyd.errors import AnomalydError, MissingExtra, SourceError, TooManyBytes

__all__ = ["Store", "fetched", "is_uri", "open_store"]

FETCHES = 32  # under way at once: a store answers in milliseconds, however little is asked
_NATIVE = ("file", "s3", "gs", "gcs", "hdfs", "viewfs")
_URI = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_REASONS = {
    "ACCESS_DENIED": "access is denied; check the credentials and what they may do there",
    "INVALID_ACCESS_KEY_ID": "the credentials are unknown there; check AWS_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH": "the credentials are wrong; check AWS_SECRET_ACCESS_KEY",
    "NO_SUCH_BUCKET": "there is no such bucket; check the name, or make it first",
    "NETWORK_CONNECTION": "the store does not answer; check the network and AWS_ENDPOINT_URL",
}


@dataclass(frozen=True)
class Store:
    """A file or folder somewhere.

    Attributes:
        uri: as the user named it.
        files: pyarrow's file system; it travels between processes.
        path: where it is in that.
    """

    uri: str
    files: Any
    path: str

    def is_file(self) -> bool:
        """Whether a file is there.

        Raises:
            SourceError: neither file nor folder, or the store refuses.
        """
        with _asking(self.uri):
            kind = self.files.get_file_info(self.path).type.name
        if kind == "NotFound":
            raise SourceError(f"{self.uri}: no such file or folder; check the path")
        return bool(kind == "File")

    def list(self) -> list[str]:
        """The path below of every file there, in no order; none where there is no such folder.

        Raises:
            SourceError: the store refuses.
        """
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        with _asking(self.uri):
            found = self.files.get_file_info(selector)
        start = len(self.path.rstrip("/")) + 1
        return [entry.path[start:] for entry in found if entry.type.name == "File"]

    def open(self, name: str = "") -> IO[bytes]:
        """A file, to be read at any place.

        Raises:
            SourceError: it is not there, or the store refuses.
        """
        with _asking(self._shown(name)):
            opened: IO[bytes] = self.files.open_input_file(self._inner(name))
        return opened

    def read(self, name: str = "", *, most: int | None = None) -> bytes:
        """All bytes of a file; errors as of `open`, and TooManyBytes where it has more."""
        with _asking(self._shown(name)), self.files.open_input_file(self._inner(name)) as file:
            if most is not None and file.size() > most:
                raise TooManyBytes(f"image has {file.size()} bytes; at most {most} are read")
            data: bytes = file.read()
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, whole or not at all; an older one of the name is replaced.

        Raises:
            AnomalydError: the store refuses.
        """
        place = self._inner(name)
        with _asking(self._shown(name), AnomalydError):
            if self.files.type_name != "local":
                # An object is there once its stream is closed, and is closed only when complete.
                stream = self.files.open_output_stream(place)
                stream.write(data)
                stream.close()
                return
            target = Path(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""
        for name in names:
            with _asking(self._shown(name), AnomalydError):
                try:
                    self.files.delete_file(self._inner(name))
                except FileNotFoundError:
                    continue

    def _inner(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _shown(self, name: str) -> str:
        return f"{self.uri.rstrip('/')}/{name}" if name else self.uri


def is_uri(text: str) -> bool:
    """Whether a DATA, PATH or --output argument names a place by scheme, as s3://bucket/key."""
    return _URI.match(text) is not None


def open_store(uri: str) -> Store:
    """The store that a URI or a plain path names; nothing is asked of it yet.

    Raises:
        MissingExtra: pyarrow, or the fsspec package of that scheme, is not installed.
        SourceError: an unknown scheme, or a URI that cannot be.
    """
    try:
        from pyarrow.fs import FileSystem, LocalFileSystem
    except ImportError:
        raise MissingExtra("pyarrow", "evaluate") from None
    scheme = _URI.match(uri)
    if scheme is None:
        return Store(uri, LocalFileSystem(), os.path.abspath(uri))
    known = scheme[1].lower() in _NATIVE
    with _asking(uri):
        try:
            files, path = FileSystem.from_uri(uri if known else f"fsspec+{uri}")
        except ImportError as error:
            raise SourceError(f"{uri}: its scheme needs a package: {_line(error)}") from None
    return Store(uri, files, path)


def fetched(
    store: Store, names: Iterable[str], most: int
) -> Iterator[tuple[str, bytes | AnomalydError]]:
    """The content of files of at most so many bytes, in order, `FETCHES` under way at once."""

    def fetch(name: str) -> bytes | AnomalydError:
        try:
            return store.read(name, most=most)
        except AnomalydError as error:
            return error

    ahead: deque[tuple[str, Future[bytes | AnomalydError]]] = deque()
    waiting = iter(names)
    pool = ThreadPoolExecutor(FETCHES, "fetch")
    try:
        ahead.extend((name, pool.submit(fetch, name)) for name in islice(waiting, FETCHES))
        while ahead:
            name, future = ahead.popleft()
            yield name, future.result()
            ahead.extend((name, pool.submit(fetch, name)) for name in islice(waiting, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _asking(uri: str, kind: type[AnomalydError] = SourceError) -> Iterator[None]:
    """Turns what file systems raise into one line that names the place."""
    try:
        yield
    except FileNotFoundError:
        raise kind(f"{uri}: no such file or folder; check the path") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are one or the other
        said = _line(error)
        reason = next((text for code, text in _REASONS.items() if f" {code} " in said), said)
        raise kind(f"{uri}: {reason}") from None


def _line(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())[:300]
