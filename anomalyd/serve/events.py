"""Outliers as lines of JSON in a file, written where nobody waits for it.

Scoring hands an event over and goes on. What a slow or broken disk cannot take is dropped and
counted, never waited for. The file is opened anew for every batch of lines, so it may be moved
away at any time.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyd.images import content_hash
from anomalyd.serve.logs import identified

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anomalyd.detect.detector import Verdict
    from anomalyd.serve.metrics import Metrics
    from anomalyd.serve.models import Key

__all__ = ["Events"]

logger = logging.getLogger(__name__)

CAPACITY = 10_000
AT_A_TIME = 500
COMPLAIN_SECONDS = 60.0


class Events:
    """Appends events to a file, from a thread of its own.

    Args:
        file: where to.
        metrics: the daemon's; what became of events is counted there.
    """

    def __init__(self, file: Path, metrics: Metrics) -> None:
        self._file = file
        self._written = metrics.events.labels("written")
        self._dropped = metrics.events.labels("dropped")
        self._failed = metrics.events.labels("failed")
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(CAPACITY)
        self._complained = float("-inf")
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def outlier(self, key: Key, verdict: Verdict, pixels: NDArray[np.uint8]) -> None:
        """Hand over what is known of an outlier; the image itself is not kept."""
        identity = identified.get()
        event = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "outlier",
            "model": key.name,
            "version": key.version,
            **verdict.to_dict(),
            "image": f"{content_hash(pixels):016x}",
            "height": pixels.shape[0],
            "width": pixels.shape[1],
        }
        if identity is not None:
            event["request_id"] = identity.request_id
            if identity.trace_id is not None:
                event["trace_id"] = identity.trace_id
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped.inc()

    def close(self, timeout: float) -> None:
        """Write what waits, for so many seconds at most."""
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _write(self) -> None:
        while (event := self._waiting.get()) is not None:
            events, last = [event], False
            while len(events) < AT_A_TIME and not self._waiting.empty():
                more = self._waiting.get_nowait()
                if more is None:
                    last = True
                    break
                events.append(more)
            self._append(events)
            if last:
                return

    def _append(self, events: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event) + "\n" for event in events)
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            self._failed.inc(len(events))
            if time.monotonic() - self._complained > COMPLAIN_SECONDS:
                self._complained = time.monotonic()
                logger.error("--events %s: cannot be written: %s", self._file, error.strerror)
        else:
            self._written.inc(len(events))
