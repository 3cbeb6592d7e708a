"""Request bodies: bounds, and the parts of a multipart body."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.serve.body import PATIENCE, Bodies, boundary_of, split_multipart
from anomalyd.serve.problems import ClientGone, Problem


def chunks_of(*chunks, end=True):
    """A receive callable that gives these chunks, and then stalls."""
    messages = [
        {"type": "http.request", "body": chunk, "more_body": not end or i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ]

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    return receive


def read(receive, *, limit=10, total=100, timeout=5.0, headers=(), bodies=None):
    """The body, and how many bytes were held while it was used."""
    bodies = bodies or Bodies(limit, total, timeout)
    before = bodies.held

    async def scenario():
        with bodies.intake() as intake:
            body = await intake.read({"headers": list(headers)}, receive)
            return body, bodies.held

    try:
        return asyncio.run(scenario())
    finally:
        assert bodies.held == before


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=6))
def test_a_body_is_read_whole_up_to_the_limit(chunks):
    """Chunks are joined; one byte over the limit is 413; nothing stays held."""
    body = b"".join(chunks)
    if len(body) <= 10:
        assert read(chunks_of(*chunks)) == (body, len(body))
    else:
        with pytest.raises(Problem) as caught:
            read(chunks_of(*chunks))
        assert caught.value.status == 413


def test_an_endless_body_is_cut_off():
    """After PATIENCE times the limit the connection is given up."""
    with pytest.raises(Problem) as caught:
        read(chunks_of(*[b"x" * 10] * (PATIENCE + 1), end=False))
    assert caught.value.status == 413
    assert caught.value.close


def test_a_client_that_asks_first_is_told_at_once():
    """With `Expect: 100-continue` a declared length over the limit is refused unread."""
    headers = [(b"expect", b"100-continue"), (b"content-length", b"11")]
    with pytest.raises(Problem) as caught:
        read(chunks_of(), headers=headers)
    assert caught.value.status == 413


def test_a_slow_client_is_cut_off():
    """A body that stalls is 408, and the connection is closed."""
    with pytest.raises(Problem) as caught:
        read(chunks_of(b"a", end=False), timeout=0.02)
    assert (caught.value.status, caught.value.close) == (408, True)


def test_a_client_that_leaves():
    """A connection closed half way is no error to report."""

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        read(receive)


def test_all_bodies_together_are_bounded():
    """What does not fit beside the bodies held already is 503."""
    bodies = Bodies(10, 7, 5.0)
    bodies.held = 5
    with pytest.raises(Problem) as caught:
        read(chunks_of(b"abc"), bodies=bodies)
    assert caught.value.status == 503


def test_a_body_that_is_refused_is_read_to_its_end():
    """Or its client would never see why; nothing of it is held."""
    bodies = Bodies(10, 7, 5.0)
    bodies.held = 5
    receive = chunks_of(b"a", b"bc", b"d")
    with pytest.raises(Problem) as caught:
        read(receive, bodies=bodies)
    assert (caught.value.status, caught.value.close) == (503, False)
    with pytest.raises(TimeoutError):  # no chunk is left
        asyncio.run(asyncio.wait_for(receive(), 0.01))


def multipart(parts, boundary=b"xx"):
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"'
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, part) for part in parts)
    return body + b"--%s--\r\n" % boundary


@given(st.lists(st.binary(max_size=50).filter(lambda part: b"\r\n--xx" not in part), max_size=5))
def test_multipart_round_trips(parts):
    """Every part comes back as it was sent, in order."""
    assert split_multipart(multipart(parts), b"xx", 5) == parts


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"--yy\r\n\r\n", multipart([b"abc"])[:-8], multipart([b"abc"])[:20]]
)
def test_broken_multipart_is_refused(body):
    """What is not multipart, or ends early, is 400."""
    with pytest.raises(Problem) as caught:
        split_multipart(body, b"xx", 5)
    assert caught.value.status == 400


def test_too_many_parts_are_refused():
    """One part more than allowed is 413."""
    with pytest.raises(Problem) as caught:
        split_multipart(multipart([b"a"] * 6), b"xx", 5)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (None, None),
        (b"image/png", None),
        (b"application/x-www-form-urlencoded", None),
        (b"multipart/form-data; boundary=xx", b"xx"),
        (b'Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
    ],
)
def test_the_boundary(content_type, boundary):
    """Only multipart types have one; every other type is one image."""
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("content_type", [b"multipart/form-data", b"multipart/x; boundary="])
def test_multipart_without_boundary(content_type):
    """It cannot be taken apart: 400."""
    with pytest.raises(Problem) as caught:
        boundary_of(content_type)
    assert caught.value.status == 400
