"""The log and the outlier events: whose request it was, and that neither holds up scoring."""

from __future__ import annotations

import io
import json
import logging
import os

import pytest
from daemons import NORMAL, OUTLIER, Daemon, load
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bundle

from anomalyd.serve.events import CAPACITY, Events
from anomalyd.serve.logs import Identity, _Json, _Text, identified
from anomalyd.serve.settings import ServeSettings

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def identity(**headers):
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Identity.of(pairs)


def test_a_request_keeps_its_name():
    """A fit X-Request-ID is taken; any other is replaced by one of our own, each different."""
    assert identity(x_request_id="abc-1.2_3").request_id == "abc-1.2_3"
    made = {identity(x_request_id=bad).request_id for bad in ("", "a b", "a\nb", "é", "x" * 129)}
    assert len(made) == 5
    assert all(name.isascii() and name.isprintable() for name in made)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (PARENT, True),
        (PARENT.replace("00-", "01-", 1) + "-more", True),
        (PARENT + "-more", False),
        (PARENT.replace("00-", "ff-", 1), False),
        (PARENT.upper(), False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (PARENT[:-1], False),
        ("", False),
    ],
)
def test_traceparent_by_the_specification(value, known):
    """What is not well-formed is as good as none."""
    found = identity(traceparent=value)
    assert (found.trace_id, found.span_id) == ((TRACE, SPAN) if known else (None, None))


@given(st.binary(max_size=80))
def test_no_header_makes_an_identity_fail(value):
    """Whatever bytes come."""
    Identity.of([(b"x-request-id", value), (b"traceparent", value)])


class Lines(logging.Handler):
    """Keeps what the JSON log would write."""

    def __init__(self):
        super().__init__()
        self.setFormatter(_Json())
        self.lines = []

    def emit(self, record):
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def lines():
    handler = Lines()
    logger = logging.getLogger("anomalyd")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def daemon_of(bundle, events=None, **changes):
    settings = ServeSettings(bundles=(str(bundle),), threads=1, **changes)
    models, control = load(settings)
    sink = None if events is None else Events(events, models.metrics)
    return Daemon(models, settings, control, events=sink), sink


def test_a_line_names_its_request(tmp_path, lines):
    """Request id and trace, in the log and in the answer; route and code, never the path."""
    daemon, _ = daemon_of(tiny_bundle(tmp_path), log_requests=True)
    headers = {"X-Request-ID": "mine", "traceparent": PARENT}
    answer = daemon.score(NORMAL, headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    daemon.ask("GET", "/some/secret/path")
    first, second = [line for line in lines if line["logger"] == "anomalyd.access"]
    assert (first["request_id"], first["trace_id"], first["span_id"]) == ("mine", TRACE, SPAN)
    assert (first["route"], first["code"], first["level"]) == ("/v1/score", 200, "info")
    assert second["route"] == "unmatched"
    assert "secret" not in json.dumps(second)
    daemon.models.close()


def test_a_line_for_people_says_as_much():
    """Route, code and request, behind the message."""
    record = logging.LogRecord("anomalyd.access", logging.INFO, "p", 1, "request", (), None)
    record.fields = {"route": "/v1/score", "code": 200}
    identified.set(Identity("mine"))
    said = _Text("%(levelname)s %(name)s: %(message)s").format(record)
    assert said == "INFO anomalyd.access: request route=/v1/score code=200 request_id=mine"


def test_exceptions_are_one_line_of_json():
    """With their traceback inside."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json())
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        info = sys.exc_info()
    handler.emit(logging.LogRecord("a", logging.ERROR, "p", 1, "it %s", ("failed",), info))
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "it failed"
    assert "ValueError" in json.loads(line)["exception"]


def test_outliers_become_lines(tmp_path):
    """One line each, with the verdict and the request's names; normals leave none."""
    file = tmp_path / "outliers.jsonl"
    daemon, sink = daemon_of(tiny_bundle(tmp_path), file)
    daemon.score(NORMAL)
    daemon.score(OUTLIER, headers={"X-Request-ID": "mine", "traceparent": PARENT})
    sink.close(10)
    (event,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (event["event"], event["model"], event["version"]) == ("outlier", "tiny", "1")
    assert (event["request_id"], event["trace_id"]) == ("mine", TRACE)
    assert event["p_value"] <= event["alpha"]
    assert len(event["image"]) == 16
    assert daemon.metric("anomalyd_events_total", outcome="written") == 1
    daemon.models.close()


def test_a_sink_that_cannot_be_written_costs_nothing(tmp_path, caplog):
    """The request is answered; the failure is counted and said once."""
    daemon, sink = daemon_of(tiny_bundle(tmp_path), tmp_path / "none" / "outliers.jsonl")
    for _ in range(3):
        assert daemon.score(OUTLIER).status_code == 200
    sink.close(10)
    assert daemon.metric("anomalyd_events_total", outcome="failed") == 3
    assert caplog.text.count("cannot be written") == 1
    daemon.models.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_sink_that_blocks_for_ever_costs_nothing(tmp_path):
    """A pipe that nobody reads holds up the writer's thread alone; what is too much is dropped."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    daemon, sink = daemon_of(tiny_bundle(tmp_path), pipe)
    model = daemon.models.find("tiny")
    verdict = model.detector.score(bytes(OUTLIER))
    pixels = model.detector._pixels(OUTLIER)
    for _ in range(CAPACITY + 600):
        sink.outlier(model.key, verdict, pixels)
    assert daemon.score(OUTLIER).status_code == 200
    assert daemon.metric("anomalyd_events_total", outcome="dropped") >= 1
    sink.close(0.01)  # does not wait for ever either
    daemon.models.close()
