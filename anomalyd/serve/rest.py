"""The Open Inference Protocol over HTTP, with the binary tensor extension.

GET  /v2  /v2/health/live  /v2/health/ready
GET  /v2/models  /v2/models/NAME[/versions/V]  ../ready  ../config  ../stats
POST /v2/models/NAME[/versions/V]/infer
POST /v2/repository/index  /v2/repository/models/NAME/load  ../unload

Reference: https://github.com/kserve/open-inference-protocol, and Triton's extensions,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anomalyd.serve import oip
from anomalyd.serve.body import Bodies, Intake, header
from anomalyd.serve.control import Control
from anomalyd.serve.models import Model, Models
from anomalyd.serve.oip import Call, Output, bad
from anomalyd.serve.problems import Problem
from anomalyd.serve.scoring import Scorer
from anomalyd.serve.settings import ServeSettings
from anomalyd.serve.statistics import model_statistics

__all__ = ["infer", "oip_routes"]

HEADER_LENGTH = b"inference-header-content-length"
WBITS = {b"gzip": 31, b"deflate": 15}
MOST_INLINE = 64 << 10  # bytes that are unpacked without going to another thread
DEFLATE = 1032  # bytes that one byte unpacks to at most
SMALL_JSON = 64 << 10


def oip_routes(
    models: Models, scorer: Scorer, bodies: Bodies, control: Control, settings: ServeSettings
) -> list[Route]:
    """The routes below `/v2`."""
    model = "/v2/models/{name}"
    versioned = model + "/versions/{version}"
    inference = Infer(models, scorer, bodies, settings)
    described: Sequence[tuple[str, Callable[..., Awaitable[Response]]]] = (
        ("", partial(model_metadata, models)),
        ("/ready", partial(model_ready, models)),
        ("/config", partial(model_config, models, settings)),
        ("/stats", partial(stats, models, control)),
    )
    routes = [Route(base + "/infer", inference, methods=["POST"]) for base in (model, versioned)]
    routes.append(Route("/v2/models/stats", partial(stats, models, control)))
    for base in (model, versioned):
        routes += [Route(base + end, answer) for end, answer in described]
    return [
        *routes,
        Route("/v2", server_metadata),
        Route("/v2/", server_metadata),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", partial(ready, models)),
        Route("/v2/models", partial(list_models, models)),
        Route("/v2/repository/index", partial(index, control, bodies), methods=["POST"]),
        Route(
            "/v2/repository/models/{name}/load",
            partial(change, control, bodies, load=True),
            methods=["POST"],
        ),
        Route(
            "/v2/repository/models/{name}/unload",
            partial(change, control, bodies, load=False),
            methods=["POST"],
        ),
    ]


class Infer:
    """Scores the tensor in a request's body; an ASGI application, because it is a hot path."""

    def __init__(
        self, models: Models, scorer: Scorer, bodies: Bodies, settings: ServeSettings
    ) -> None:
        self._models = models
        self._scorer = scorer
        self._bodies = bodies
        self._max_images = settings.max_images

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path_params"]
        model = self._models.find(path["name"], path.get("version"))
        try:
            with self._bodies.intake() as intake:
                body = await self._read(intake, scope, receive)
                call, inputs, alone = _parsed(scope, body)
                binary = oip.switch(call.parameters, "binary_data_output", alone)
                carried = {
                    output.name: oip.switch(output.parameters, "binary_data", binary)
                    for output in call.outputs or ()
                }
                images = self._images(call, inputs)
                listed = not carried.get("heatmap", binary)
                outputs = await infer(model, self._scorer, call, images, receive, listed=listed)
        except Exception:
            model.metrics.failed.inc()
            raise
        model.metrics.answered()
        started = time.perf_counter()
        # Without an id of the client's, the answer bears the request's own.
        apart = [carried.get(output.name, binary) for output in outputs]
        head, tail = _answer(model, outputs, apart, call.id or scope["request_id"])
        headers = [
            (b"content-type", b"application/octet-stream" if tail else b"application/json"),
            (b"content-length", b"%d" % (len(head) + sum(map(len, tail)))),
        ]
        if tail:
            headers.append((HEADER_LENGTH, b"%d" % len(head)))
        model.metrics.render_seconds.observe(time.perf_counter() - started)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"".join([head, *tail])})

    async def _read(self, intake: Intake, scope: Scope, receive: Receive) -> memoryview:
        body = await intake.read(scope, receive)
        encoding = header(scope, b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            if encoding.lower() not in WBITS:
                raise Problem(415, "encoding", "Content-Encoding must be gzip or deflate")
            # Whatever it unpacks to, it is held beside what came.
            limit = self._bodies.limit
            with self._bodies.intake() as unpacked:
                unpacked.hold(min(limit, DEFLATE * len(body)))
                if len(body) <= MOST_INLINE // 16:
                    body = inflated(body, encoding.lower(), limit)
                else:
                    body = await self._scorer.offload(inflated, body, encoding.lower(), limit)
            intake.hold(len(body))
        return memoryview(body)

    def _images(self, call: Call, inputs: memoryview) -> Sequence[Any]:
        names = [tensor.name for tensor in call.inputs]
        if len(set(names)) < len(names):
            raise bad("an input is given twice; give each once")
        if len(names) != 1:
            raise bad("give one input: image (BYTES) or pixels (UINT8)")
        (tensor,) = call.inputs
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            if len(inputs):
                raise bad(f"{len(inputs)} bytes follow the JSON, and no input says they are its")
            return oip.images_of(tensor, None, self._max_images)
        if type(size) is not int or size != len(inputs):
            raise bad(f"binary_data_size is {size}, and {len(inputs)} bytes follow the JSON")
        return oip.images_of(tensor, inputs, self._max_images)


async def infer(
    model: Model,
    scorer: Scorer,
    call: Call,
    images: Sequence[Any],
    gone: Callable[[], Awaitable[Any]] | None = None,
    *,
    listed: bool = False,
) -> list[Output]:
    """The outputs that a call asks for; REST and gRPC meet here.

    Args:
        model, scorer, call, images: who is asked, by which way, and what.
        gone: as for `Scorer.judge`.
        listed: a heatmap would go out as a list, in JSON.

    Raises:
        Problem: what `oip.prepare`, `oip.check_maps` and `oip.outputs_of` refuse.
        ImageError: one of the images is bad; its place is named.
    """
    wanted = None if not call.outputs else [output.name for output in call.outputs]
    asked, names = oip.prepare(model, call.parameters or {}, wanted)
    decoded = await scorer.decode(model, images, asked.timeout)
    pixels = []
    for place, image in enumerate(decoded):
        if isinstance(image, Exception):
            raise type(image)(f"image {place}: {image}") if len(decoded) > 1 else image
        pixels.append(image)
    if listed and asked.heatmap:
        oip.check_maps(pixels)
    scored = await scorer.judge(model, pixels, asked, gone)
    return oip.outputs_of(model, scored, names)


def inflated(body: bytes, encoding: bytes, limit: int) -> bytes:
    """A compressed body, unpacked up to a limit.

    Raises:
        Problem: 400 damaged, or more than one stream; 413 larger than the limit.
    """
    unpacking = zlib.decompressobj(WBITS[encoding])
    try:
        content = unpacking.decompress(body, limit + 1)
    except zlib.error as error:
        raise bad(f"the body is no {encoding.decode()} data: {error}") from None
    if len(content) > limit:
        detail = f"the body unpacks to more than {limit} bytes; send fewer images"
        raise Problem(413, "too_many_bytes", detail)
    if not unpacking.eof or unpacking.unused_data:
        raise bad(f"the body is no single, whole {encoding.decode()} stream")
    return content


def _parsed(scope: Scope, body: memoryview) -> tuple[Call, memoryview, bool]:
    """The call, the bytes behind its JSON, and whether outputs are binary by themselves."""
    length = header(scope, HEADER_LENGTH)
    if length is None:
        return oip.parse_json(body), body[len(body) :], False
    if not length.isdigit() or len(length) > 12 or int(length) > len(body):
        shown = length[:40].decode("latin-1")
        raise bad(f"Inference-Header-Content-Length is {shown!r}, and the body {len(body)} bytes")
    size = int(length)
    if size == 0:  # the body is the one image; no JSON says so
        wants_json = b"application/json" in (header(scope, b"accept") or b"")
        raw = {"binary_data_size": len(body) + 4}
        call = Call([oip.Tensor("image", [1], "BYTES", dict(raw))])
        framed = len(body).to_bytes(4, "little") + body
        return call, memoryview(framed), not wants_json
    return oip.parse_json(body[:size]), body[size:], False


def _answer(
    model: Model, outputs: Sequence[Output], apart: Sequence[bool], id: str
) -> tuple[bytes, list[bytes]]:
    """The JSON of an answer, and the tensors that follow it because they go apart from it."""
    described, tail = [], []
    for output, binary in zip(outputs, apart, strict=True):
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": output.shape,
        }
        if binary:
            data = oip.packed(output)
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        elif isinstance(output.values, list):
            entry["data"] = [text.decode() for text in output.values]
        else:
            entry["data"] = output.values.ravel().tolist()
        described.append(entry)
    answer = {
        "model_name": model.name,
        "model_version": model.version,
        "id": id,
        "outputs": described,
    }
    return msgspec.json.encode(answer), tail


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def server_metadata(request: Request) -> Response:
    content = {
        "name": "anomalyd",
        "version": version("anomalyd"),
        "extensions": list(oip.EXTENSIONS),
    }
    return _json(content)


async def live(request: Request) -> Response:
    """The event loop turns; nothing else is asked."""
    return _json({"live": True})


async def ready(models: Models, request: Request) -> Response:
    """The protocol names the field "live", its clients read "ready"."""
    return _json({"live": True, "ready": models.ready}, 200 if models.ready else 503)


async def list_models(models: Models, request: Request) -> Response:
    return _json({"models": list(models.by_name)})


def _found(models: Models, request: Request) -> Model:
    return models.find(request.path_params["name"], request.path_params.get("version"))


async def model_metadata(models: Models, request: Request) -> Response:
    model = _found(models, request)
    return _json(oip.metadata(model, models.versions(model.name)))


async def model_ready(models: Models, request: Request) -> Response:
    model = _found(models, request)
    is_ready = models.is_ready(model)
    return _json({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)


async def model_config(models: Models, settings: ServeSettings, request: Request) -> Response:
    return _json(oip.config(_found(models, request), settings.max_images))


async def stats(models: Models, control: Control, request: Request) -> Response:
    given = "name" in request.path_params
    chosen = [_found(models, request)] if given else models.all()
    if given and "version" not in request.path_params:
        chosen = [model for model in models.all() if model.name == chosen[0].name]
    samples = await control.samples()
    return _json({"model_stats": [model_statistics(model.key, samples) for model in chosen]})


async def index(control: Control, bodies: Bodies, request: Request) -> Response:
    asked = await _object(request, bodies)
    only_ready = asked.get("ready", False)
    if not isinstance(only_ready, bool):
        raise bad(f"ready must be true or false, not {str(only_ready)[:40]!r}")
    rows = [row for row in control.index() if row["state"] == "READY" or not only_ready]
    return _json(rows)


async def change(control: Control, bodies: Bodies, request: Request, *, load: bool) -> Response:
    asked = await _object(request, bodies)
    parameters = asked.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad("parameters must be an object")
    named = parameters.get("version")
    if named is not None and not isinstance(named, str):
        raise bad(f"parameter version must be a text, not {str(named)[:40]!r}")
    name = request.path_params["name"]
    await (control.load(name, named) if load else control.unload(name, named))
    return Response(status_code=200)


async def _object(request: Request, bodies: Bodies) -> Mapping[str, Any]:
    """The JSON object in a request's body; an empty one where there is none."""
    with bodies.intake() as intake:
        body = await intake.read(request.scope, request.receive)
        if len(body) > SMALL_JSON:
            raise Problem(413, "too_many_bytes", f"the body is larger than {SMALL_JSON} bytes")
        try:
            content = msgspec.json.decode(body) if body.strip() else {}
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise bad("the body is not JSON") from None
    if not isinstance(content, dict):
        raise bad("the body must be a JSON object")
    return content
