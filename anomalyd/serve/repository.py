"""The bundles on disk, and which of them are served: load -> verify -> check -> warm -> swap.

    models/shirts/manifest.json             a bundle under the name and version in its manifest
    models/boots/1/  models/boots/2/        or versions side by side: the folders say which

Of a model the newest version is served, by natural order of the version, unless another one was
asked for by `load`. A version that cannot be loaded never takes the place of one that is served.
Who changes what is served calls `refresh`, `load` or `unload`, from a thread that may wait.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from anomalyd.detect.bundle import find_bundles, glance
from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import AnomalydError, BundleError, UsageError
from anomalyd.serve.models import Key, by_age, newest
from anomalyd.serve.problems import Problem
from anomalyd.serve.settings import ServeSettings

__all__ = ["Fleet", "Found", "Repository", "scan"]

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

REMEDY = (
    "name a bundle, or a folder of bundles, "
    "or make one with: anomalyd train DATA --model NAME --out PATH"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
Mark = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Found:
    """A bundle on disk, not verified.

    Attributes:
        key: what it is served as.
        path: its folder.
        mark: the state of its files; another state is another bundle.
        kind: of graph.
        named: whether it was named itself and not found in a folder.
        flaw: what can be seen to be wrong with it.
    """

    key: Key
    path: Path
    mark: Mark = ()
    kind: str = "density"
    named: bool = False
    flaw: str | None = None


class Fleet(Protocol):
    """Whoever serves what the repository says: the models of one process, or of several."""

    def load(self, key: Key, path: Path, settings: ServeSettings) -> None:
        """Make a bundle ready to be published.

        Raises:
            AnomalydError: what is wrong with it.
        """

    def publish(
        self, keys: Collection[Key], current: Mapping[str, str], leaving: Collection[str] = ()
    ) -> None:
        """Serve these from now on, all at once."""


class Repository:
    """What is on disk, what is served, and why the rest is not.

    Args:
        settings: which folders, and how to load.
        fleet: who serves it.
        loaded: called with whether a load was a success.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        settings: ServeSettings,
        fleet: Fleet,
        *,
        loaded: Callable[[bool], object] = lambda good: None,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._loaded = loaded
        self._pause = pause
        self._lock = threading.RLock()
        self._served: dict[Key, Found] = {}
        self._flawed: dict[Key, Found] = {}
        self._seen: dict[Key, Mark] = {}  # by the last look
        self._missing: set[Key] = set()  # served, and not there at the last look
        self._chosen: dict[str, str] = {}
        self._off: set[Key | str] = set()
        self._rows: list[dict[str, Any]] = []

    def start(self) -> None:
        """Load everything for the first time.

        Raises:
            BundleError: nothing there, a model without one good version, or a bundle that was
                named itself and is no density.
            UsageError: two bundles of one name and version, or a device that is not here.
        """
        with self._lock:
            there = scan(self._settings.bundles)
            twins = _twins(there)
            if twins is not None:
                raise UsageError(
                    f"two bundles are called {twins[0].key.name}: "
                    f"{twins[0].path} and {twins[1].path}"
                )
            if not any(found.kind == "density" or found.named for found in there):
                where = ", ".join(self._settings.bundles)
                raise BundleError(f"{where}: no density there; {REMEDY}")
            others = [f"{found.path} ({found.kind})" for found in there if not _scores(found)]
            if others:
                logger.warning("not served, for they have no density: %s", ", ".join(others))
            wanted = list(filter(_scores, there))
            errors = zip(wanted, _side_by_side(self._load, wanted), strict=True)
            failures = {found.key: error for found, error in errors if error is not None}
            for key, failure in failures.items():
                if not any(served.name == key.name for served in self._served):
                    raise failure
                logger.error("not served: %s", failure)
            self._publish()

    def refresh(self, *, settle: bool = False) -> None:
        """Look what is on disk, load what is new or changed, and drop what is gone.

        Args:
            settle: act on what two looks in a row have seen alike only, and do not try again
                what has failed before.
        """
        with self._lock:
            try:
                there = self._by_key()
            except (AnomalydError, OSError) as error:
                # A folder that is gone as a whole is a mount that is away, more often than not.
                logger.error("the models stay as they are: %s", error)
                return
            self._forget_flaws(there)
            for key, found in there.items():
                settled = not settle or self._seen.get(key) == found.mark
                if settled and self._is_new(found, again=not settle):
                    failure = self._load(found)
                    if failure is not None:
                        logger.error("not served: %s", failure)
            gone = {key for key in self._served if key not in there}
            for key in gone if not settle else gone & self._missing:
                del self._served[key]
            self._missing = gone
            self._seen = {key: found.mark for key, found in there.items()}
            self._publish()

    def restart(self) -> None:
        """Load everything anew, for all who served it are gone; what fails is left out.

        Raises:
            BundleError: nothing there, or nothing that can be loaded.
            OSError: a folder that cannot be read.
        """
        with self._lock:
            there = self._by_key()
            self._forget_flaws(there)
            self._served.clear()  # there is nothing that could be served on
            failure: AnomalydError | None = None
            for found in there.values():
                if self._is_new(found, again=True) and (error := self._load(found)) is not None:
                    logger.error("not served: %s", error)
                    failure = error
            if failure is not None and not self._served:
                raise failure
            self._missing.clear()
            self._publish()

    def check_unchanged(self) -> None:
        """Refuse to go on where what is served is not what is on disk.

        Raises:
            BundleError: the first of which that is so.
        """
        with self._lock:
            there = self._by_key()
            for key, served in self._served.items():
                found = there.get(key)
                if found is None or found.mark != served.mark:
                    raise BundleError(f"bundle {served.path}: it was changed while it was loaded")

    def load(self, name: str, version: str | None = None) -> None:
        """Serve a version of a model, or its newest, from now on: this rolls back, too.

        Raises:
            Problem: 404 there is no such bundle, 400 it cannot be loaded.
        """
        with self._lock:
            wanted = [
                found
                for key, found in self._by_key().items()
                if key.name == name and version in (None, key.version)
            ]
            if not wanted:
                what = f"model {name[:80]}" + (f" version {version[:80]}" if version else "")
                raise Problem(404, "unknown_model", f"no {what} in the repository")
            newest_first = sorted(wanted, key=lambda f: by_age(f.key.version), reverse=True)
            for found in newest_first:
                if found.key not in self._served or self._is_new(found, again=True):
                    error = self._load(found)
                    if error is not None and (version is not None or found is newest_first[0]):
                        self._publish()
                        raise Problem(400, "bundle", str(error))
                self._off.discard(found.key)
            self._off.discard(name)
            if version is None:
                self._chosen.pop(name, None)
            else:
                self._chosen[name] = version
            self._publish()

    def unload(self, name: str, version: str | None = None) -> None:
        """Serve a version of a model, or all of it, no more, until `load` asks for it.

        Raises:
            Problem: 404 it is not served.
        """
        with self._lock:
            going = {
                key for key in self._served if key.name == name and version in (None, key.version)
            }
            if not going:
                raise Problem(404, "unknown_model", "nothing like that is served")
            stays = any(key.name == name for key in self._served.keys() - going)
            if not stays:
                # Not ready first: who balances load is to hear of it before requests fail.
                self._publish(leaving={name})
                self._pause(self._settings.drain_delay)
            self._off |= going if version is not None else going | {name}
            for key in going:
                del self._served[key]
            if self._chosen.get(name) == version or version is None:
                self._chosen.pop(name, None)
            self._publish()

    def index(self) -> list[dict[str, Any]]:
        """Name, version, state and reason of every version that there is."""
        return self._rows

    def _by_key(self) -> dict[Key, Found]:
        """What is on disk; of two that claim one name and version, the one that is served."""
        there: dict[Key, Found] = {}
        places = {served.path: key for key, served in self._served.items()}
        for found in filter(_scores, scan(self._settings.bundles)):
            if not found.mark:  # its manifest does not say who it is; who it was is known
                found = replace(found, key=places.get(found.path, found.key))
            first, served = there.get(found.key), self._served.get(found.key)
            if first is None or (served is not None and served.path == found.path):
                there[found.key] = found
        return there

    def _is_new(self, found: Found, *, again: bool) -> bool:
        if found.key in self._off or found.key.name in self._off:
            return False
        served, flawed = self._served.get(found.key), self._flawed.get(found.key)
        if served is not None and served.mark == found.mark and served.path == found.path:
            return False
        return again or flawed is None or flawed.mark != found.mark

    def _load(self, found: Found) -> AnomalydError | None:
        """What stands against serving it; None once it is ready to be published."""
        error = self._attempt(found)
        self._loaded(error is None)
        if error is None:
            self._served[found.key] = found
            self._flawed.pop(found.key, None)
        else:
            self._flawed[found.key] = replace(found, flaw=str(error))
        return error

    def _attempt(self, found: Found) -> AnomalydError | None:
        if found.flaw is not None:
            return BundleError(found.flaw)
        try:
            self._fleet.load(found.key, found.path, self._settings)
        except AnomalydError as error:
            return error
        except Exception as error:  # a bundle must not end the daemon, whatever is in it
            logger.exception("loading %s failed", found.path)
            return BundleError(f"bundle {found.path}: cannot be loaded: {error!r}")
        return None

    def _forget_flaws(self, there: Mapping[Key, Found]) -> None:
        self._flawed = {key: flawed for key, flawed in self._flawed.items() if key in there}

    def _publish(self, leaving: Collection[str] = ()) -> None:
        current = newest(self._served)
        for name, version in self._chosen.items():
            if Key(name, version) in self._served:
                current[name] = version
        rows = {key: _row(key, "READY", "") for key in self._served}
        for key in self._served:
            if key.name in leaving:
                rows[key] = _row(key, "UNLOADING", "")
        for key, flawed in self._flawed.items():
            if key in self._served:
                rows[key] = _row(key, "READY", f"what came after it was refused: {flawed.flaw}")
            else:
                rows[key] = _row(key, "UNAVAILABLE", flawed.flaw or "")
        for off in self._off:
            if isinstance(off, Key):
                rows.setdefault(off, _row(off, "UNAVAILABLE", "unloaded"))
        self._rows = [rows[key] for key in sorted(rows, key=lambda k: (k.name, by_age(k.version)))]
        self._fleet.publish(list(self._served), current, leaving)


def _side_by_side(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What a function that raises nothing gives for each, as many at a time as there are CPUs.

    In threads that the end of the process does not wait for, as a pool's would be.
    """
    results: dict[int, R] = {}
    left = iter(range(len(items)))  # `next` is atomic

    def work() -> None:
        for number in left:
            results[number] = function(items[number])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(available_cpus())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(items))]


def scan(given: Sequence[str]) -> list[Found]:
    """Every bundle in the folders given, or that is given itself.

    Raises:
        BundleError: a folder that is not there or holds none.
    """
    there: dict[Path, Found] = {}
    for text in given:
        root = Path(text)
        bundles: dict[Path, Key | None] = dict.fromkeys(find_bundles(root))
        if not (len(bundles) == 1 and root in bundles):
            for folder in sorted(root.iterdir()):
                if folder.name.startswith(".") or folder in bundles or not folder.is_dir():
                    continue
                for version in find_bundles(folder):
                    bundles[version] = Key(folder.name, version.name)
        if not bundles:
            raise BundleError(f"{text}: no bundle there; {REMEDY}")
        for path, key in bundles.items():
            place = path.resolve()
            found = _looked_at(place, key, named=path == root)
            before = there.get(place)
            if before is None or not before.named:
                there[place] = found
    return list(there.values())


def _looked_at(path: Path, key: Key | None, *, named: bool) -> Found:
    try:
        manifest, mark = glance(path)
    except BundleError as error:
        return Found(key or Key(path.name, ""), path, named=named, flaw=str(error))
    sizes = {name: size for name, size, _, _ in mark}
    flaw = None
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry["bytes"]:
            flaw = (
                f"bundle {path}: {name} has {sizes.get(name, 0)} bytes where manifest.json says "
                f"{entry['bytes']}; it is truncated, altered or still being copied"
            )
    own = Key(manifest.name, manifest.version)
    if key is not None and not all(NAME.fullmatch(part) for part in key):
        flaw = f"bundle {path}: its folders' names go into URLs and must be like {NAME.pattern}"
    return Found(key or own, path, mark, manifest.kind, named, flaw)


def _scores(found: Found) -> bool:
    """Whether to try: what is named itself and is no density is an error and not passed over."""
    return found.kind == "density" or found.named


def _twins(there: Sequence[Found]) -> tuple[Found, Found] | None:
    first: dict[Key, Found] = {}
    for found in there:
        twin = first.setdefault(found.key, found)
        if twin is not found and found.kind == twin.kind == "density":
            return twin, found
    return None


def _row(key: Key, state: str, reason: str) -> dict[str, Any]:
    return {"name": key.name, "version": key.version, "state": state, "reason": reason}
