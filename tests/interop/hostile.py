"""What strangers send: images, HTTP and protocol JSON that a daemon must refuse and survive."""

from __future__ import annotations

import gzip
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

VAE_INFER = "/v2/models/fashion-mnist-vae/infer"
BOMB_SIDE = 30_000


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 900 million pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def images(good: bytes) -> Iterator[bytes]:
    """Bodies that are no image, no longer one, or one that no model takes."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8))
    yield b""
    yield b"\0" * 1000
    yield from (good[:cut] for cut in range(0, len(good), 10))
    yield bomb()
    yield saved(Image.fromarray(rng.integers(0, 65536, (28, 28)).astype(np.uint16)), "PNG")
    yield saved(Image.new("CMYK", (28, 28)), "JPEG")
    yield saved(grey, "GIF", save_all=True, append_images=[Image.new("L", (28, 28))])
    yield saved(grey, "TIFF")
    yield saved(Image.new("RGB", (28, 29)), "BMP")
    yield b'<svg xmlns="http://www.w3.org/2000/svg" width="28" height="28"/>'
    yield b"%PDF-1.7\n" + good
    yield good + b"<script>alert(1)</script>" * 100
    yield b"GIF89a" + good
    yield b"\xff\xd8\xff\xe0" + good
    yield b"PK\x03\x04" + bytes(rng.integers(0, 256, 5000, np.uint8))


def calls(good: bytes) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Bodies and headers of inference requests that are wrong."""
    pixel = {"name": "pixels", "shape": [1, 28, 28, 1], "datatype": "UINT8", "data": [0] * 784}
    binary = {k: v for k, v in pixel.items() if k != "data"}
    for text in (
        "",
        "{",
        "[]",
        "NaN",
        '{"inputs": NaN}',
        '{"inputs": [{"name": "pixels", "shape": [NaN], "datatype": "UINT8", "data": []}]}',
        "[" * 100_000,
        '{"inputs":' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"inputs": [], "inputs": []}',
    ):
        yield text.encode(), {}
    for change in (
        {"shape": [-1, 28, 28, 1]},
        {"shape": [1 << 40, 28, 28, 1]},
        {"shape": [1, 28]},
        {"shape": []},
        {"shape": [0, 28, 28, 1]},
        {"datatype": "FP32"},
        {"datatype": "BYTES"},
        {"name": "x" * 10_000},
        {"data": [-1] * 784},
        {"data": [1e308] * 784},
        {"data": ["a"] * 784},
        {"data": [[0]]},
        {"parameters": {"binary_data_size": -5}},
        {"parameters": {"binary_data_size": 1 << 62}},
    ):
        yield json.dumps({"inputs": [pixel | change]}).encode(), {}
    yield json.dumps({"inputs": [pixel, pixel]}).encode(), {}
    yield json.dumps({"inputs": [pixel], "outputs": [{"name": "score"}] * 2}).encode(), {}
    yield json.dumps({"inputs": [pixel], "parameters": {"alpha": 5e-324}}).encode(), {}
    for size, length in ((784, -1), (784, 10**9), (-784, 0), (783, 0), (1 << 62, 0), (785, 0)):
        tensor = binary | {"parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        declared = str(len(head) if length == 0 else length)
        yield head + b"\0" * 784, {"Inference-Header-Content-Length": declared}
    zeros = gzip.compress(b"\0" * (64 << 20), 9)
    yield zeros, {"Content-Encoding": "gzip"}
    yield zeros[:1000], {"Content-Encoding": "gzip"}
    yield b"not compressed", {"Content-Encoding": "deflate"}
    yield good, {"Content-Encoding": "br"}


def conversations(good: bytes) -> Iterator[bytes]:
    """Bytes on a connection that are not quite HTTP."""
    yield b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n"
    yield b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(3000)) + b"\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200
    yield b"\0" * 5000
    yield b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"
    yield b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nContent-Length: 20\r\n\r\n"
    yield b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc"
    yield b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    yield (
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"1\r\na\r\n" * 2000
    )
    yield b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"garbage\r\n\r\n"
    yield b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"
    yield (
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(good) + good[:9]
    )


def talk(port: int, sent: bytes, patience: float = 2.0) -> list[int]:
    """The statuses that come back for some bytes, until the other side is silent or gone."""
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while len(received) < 1 << 20 and (chunk := connection.recv(1 << 16)):
                received += chunk
    except OSError:
        pass  # it hung up, as it may
    lines = [line for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return [int(line[9:12]) for line in lines]


def request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """One request as bytes, after which the connection closes."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def attacks(good: bytes) -> list[Callable[[int], list[int]]]:
    """Everything above, in a fixed but mixed order: each takes a port and gives statuses."""
    sent = [request("/v1/score", image, {}) for image in images(good)]
    sent += [request(VAE_INFER, body, headers) for body, headers in calls(good)]
    sent += list(conversations(good))
    random.Random(0).shuffle(sent)
    return [lambda port, data=data: talk(port, data) for data in sent]
