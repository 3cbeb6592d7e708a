"""Hostile images and hostile HTTP against one daemon: typed 4xx, no 5xx, and it goes on."""

from __future__ import annotations

import gzip
import io
import json
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from daemons import NORMAL, check_problem, encoded, serve
from test_server import running
from tiny import SIDE, tiny_bundle

GREY = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
TYPED = {400, 413, 415, 422}


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, body, *, depth=8, colour=0):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def frames(kind, **options):
    images = [Image.fromarray(np.full((SIDE, SIDE), value, np.uint8)) for value in (0, 99, 200)]
    return saved(images[0], kind, save_all=True, append_images=images[1:], **options)


SMALL = Image.fromarray(GREY)
JPEG = saved(SMALL.resize((16, 16)), "JPEG")

REFUSED = {  # status -> name -> what comes
    400: {
        "nothing": b"",
    },
    415: {
        "one zero": b"\0",
        "zeros": bytes(4096),
        "text": b"hello there, this is no image" * 9,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "svg in xml": b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///x'>]><svg/>",
        "html": b"<!DOCTYPE html><script>alert(1)</script>",
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run",
        "zip": b"PK\x03\x04" + bytes(60),
        "gzip": gzip.compress(NORMAL),
        "elf": b"\x7fELF" + bytes(60),
        "icon": b"\0\0\1\0\1\0" + bytes(60),
        "heic": b"\0\0\0\x18ftypheic" + bytes(60),
        "url": b"http://127.0.0.1:1/image.png",
        "gif of three frames": frames("GIF"),
        "webp of three frames": frames("WebP"),
        "png of three frames": frames("PNG"),
        "tiff of three pages": frames("TIFF"),
        "float tiff": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    },
    413: {
        "png of too many pixels": png(60_000, 60_000, zlib.compress(b"")),
        "png of the most pixels": png(2**31 - 1, 2**31 - 1, zlib.compress(b"")),
        "jpeg of too many pixels": JPEG.replace(b"\0\x10\0\x10", b"\xff\xff\xff\xff", 1),
        "gif of too many pixels": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0),
        "bmp of too many pixels": b"BM" + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0
        ),
        "bmp of negative width": b"BM" + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -9, -9, 1, 24, 0, 0, 0, 0, 0, 0
        ),
        "pgm of too many pixels": b"P5\n99999 99999\n255\n",
    },
    422: {
        "png of no pixels": png(0, 0, zlib.compress(b"")),
        "png without data": png(SIDE, SIDE, b""),
        "png with a wrong depth": png(SIDE, SIDE, zlib.compress(bytes(99)), depth=77),
        "png with a wrong colour": png(SIDE, SIDE, zlib.compress(bytes(99)), colour=9),
        "png and then a script": b"\x89PNG\r\n\x1a\n<script>alert(1)</script>",
        "jpeg head alone": b"\xff\xd8\xff\xe0\0\x10JFIF",
        "tiff that points into nowhere": b"II*\0" + struct.pack("<I", 2**32 - 1),
        "tiff that points at itself": b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8),
        "webp without content": b"RIFF\x04\0\0\0WEBP",
        "webp that lies": b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(40),
        "pgm without an end": b"P5\n4 4\n255\n\0",
        "pgm of negative size": b"P5\n-4 -4\n255\n",
        "a wrong aspect": encoded(np.zeros((SIDE, 90), np.uint8)),
        "too small": encoded(np.zeros((2, 2), np.uint8)),
    },
}  # fmt: skip

HALF = np.asarray(SMALL.convert("1")).astype(np.uint8) * 255
# What comes, and the grey pixels that the rule makes of it.
TAKEN = {
    # No more of it is unpacked than the pixels need.
    "a bomb behind the pixels": (
        png(SIDE, SIDE, zlib.compress(bytes(50_000_000), 9)), np.zeros_like(GREY)
    ),
    "16-bit grey": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY),
    "1-bit": (saved(SMALL.convert("1"), "PNG"), HALF),
    "palette": (saved(SMALL.convert("P"), "PNG"), GREY),
    "alpha": (saved(SMALL.convert("RGBA"), "PNG"), GREY),
    "grey and alpha": (saved(SMALL.convert("LA"), "PNG"), GREY),
    "cmyk jpeg": (saved(Image.new("CMYK", (16, 16)), "JPEG"), np.full_like(GREY, 255)),
    "png and then a zip": (saved(SMALL, "PNG") + b"PK\x03\x04" + bytes(99), GREY),
    "gif of one frame": (saved(SMALL, "GIF"), GREY),
    "webp": (saved(SMALL, "WebP", lossless=True), GREY),
    "tiff": (saved(SMALL, "TIFF"), GREY),
    "bmp": (saved(SMALL, "BMP"), GREY),
    "pgm": (saved(SMALL, "PPM"), GREY),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def daemon(bundle):
    """One daemon for the whole corpus."""
    daemon = serve(bundle, max_pixels=1_000_000)
    yield daemon
    daemon.models.close()


@pytest.mark.parametrize(("status", "name"), [(s, name) for s in REFUSED for name in REFUSED[s]])
def test_a_hostile_image_is_a_typed_4xx(daemon, status, name):
    """Alone, among good ones and as a tensor; nothing stays held and the next is served."""
    body = REFUSED[status][name]
    check_problem(daemon.score(body), status)
    files = [("image", ("a", one)) for one in (NORMAL, body, NORMAL)]
    results = daemon.ask("POST", "/v1/score", files=files).json()["results"]
    assert [set(result) == {"index", "error"} for result in results] == [False, True, False]
    headers = {"Inference-Header-Content-Length": "0"}
    tensor = daemon.ask("POST", "/v2/models/tiny/infer", content=body, headers=headers)
    assert tensor.status_code == status
    assert set(tensor.json()) == {"error"}
    assert daemon.score(NORMAL).status_code == 200
    assert daemon.metric("anomalyd_inflight_body_bytes") == 0


@pytest.mark.parametrize("name", TAKEN)
def test_an_odd_image_is_scored_by_the_rule(daemon, name):
    """Modes, depths and formats that have one: as the grey PNG of the pixels that it gives."""
    body, pixels = TAKEN[name]
    answer, plain = daemon.score(body), daemon.score(encoded(pixels))
    assert answer.status_code == plain.status_code == 200
    assert answer.json()["results"] == plain.json()["results"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WebP", "PPM"])
def test_every_truncation_is_a_typed_4xx(daemon, kind):
    """Cut at every 10th byte: refused, or, where only an ornament is missing, scored."""
    whole = saved(Image.fromarray(np.tile(GREY, (4, 4))), kind)
    statuses = [daemon.score(whole[:end]).status_code for end in range(0, len(whole), 10)]
    assert set(statuses) <= TYPED | {200}
    assert statuses[0] == 400
    assert sum(status == 200 for status in statuses) <= 2


@given(data=st.data())
def test_flipped_bytes_never_break_it(daemon, data):
    """A few bytes of a good image of any format at random."""
    body = bytearray(data.draw(st.sampled_from([body for body, _ in TAKEN.values()])))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    response = daemon.score(bytes(body))
    assert response.status_code in TYPED | {200}


# Over the network

POST = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"
CUT = None  # hung up on while it still sends: a 400 may be lost
RAW = {  # what is sent, and the status that comes back
    "garbage": (b"\x16\x03\x01\x02\0\x01\0" + bytes(200), 400),
    "no HTTP": (b"hello\r\n\r\n", 400),
    "an unknown method": (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an absurd version": (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "a huge header": (b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", CUT),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 200),
    "a huge target": (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n", CUT),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "a length that is none": (POST + b"Content-Length: many\r\n\r\n", 400),
    "an enormous length": (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "length and chunks": (
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a chunk that is none": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", 400),
    "a chunk of enormous size": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        400,
    ),
    "pipelined garbage": (POST + b"Content-Length: 0\r\n\r\n" + b"\0garbage\r\n\r\n" * 9, 400),
    "a null in a header": (b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
    "a line break in a header": (b"GET / HTTP/1.1\r\nX-Request-ID: a\rb\r\n\r\n", 400),
    "an upgrade": (b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
    "HTTP/2 outright": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a path that climbs": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "a target that is a URL": (b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n", 200),
}


@pytest.fixture(scope="module")
def process(bundle):
    """One daemon over the network for the whole corpus."""
    with running(bundle, body_timeout=2.0, max_body_bytes=100_000) as process:
        yield process


def said(port, data):
    """What comes back until the daemon hangs up; one that falls silent is a TimeoutError."""
    received = b""
    address = ("127.0.0.1", port)
    with socket.create_connection(address, 10) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(65536):
                received += part
        except TimeoutError:
            raise
        except OSError:
            pass  # it has hung up
    return received


@pytest.mark.parametrize("name", RAW)
def test_hostile_http_is_answered_once_or_cut_off(process, name):
    """What is odd but allowed by 200, all else by 4xx; others are served."""
    data, expected = RAW[name]
    received = said(process.port, data)
    statuses = [int(line[9:12]) for line in received.split(b"\r\n") if line[:9] == b"HTTP/1.1 "]
    allowed = ([], [400]) if expected is CUT else ([expected],)
    assert statuses in allowed, received[:500]
    assert b"Traceback" not in received
    assert process.ask("POST", "/v1/score", NORMAL)[0] == 200


def test_chunks_without_end_are_cut_off(process):
    """However small each is, together they are bounded."""
    address = ("127.0.0.1", process.port)
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        many = (b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 100_000  # far more than sockets hold
        with pytest.raises(ConnectionError):
            client.sendall(many)
    assert process.ask("GET", "/livez")[0] == 200


def test_memory_does_not_grow(process):
    """A thousand hostile requests later the daemon holds no body, and about as much memory."""

    def resident():
        lines = process.ask("GET", "/metrics")[1].decode().splitlines()
        found = {line.split(" ")[0]: line.split(" ")[-1] for line in lines if line[0] != "#"}
        assert float(found["anomalyd_inflight_body_bytes"]) == 0
        return float(found.get("process_resident_memory_bytes", 1))

    bodies = [REFUSED[413]["png of too many pixels"], JPEG[:99], json.dumps([1] * 9999).encode()]

    def volley(n):
        connection = process.connect()
        for i in range(n):
            path = "/v2/models/tiny/infer" if i % 2 else "/v1/score"
            connection.request("POST", path, bodies[i % 3])
            response = connection.getresponse()
            response.read()
            assert response.status in TYPED
        connection.close()

    volley(300)
    before = resident()
    volley(1000)
    assert resident() < 1.2 * before
