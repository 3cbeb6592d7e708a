"""The Open Inference Protocol over gRPC: the same jobs as over HTTP, on the same event loop.

The messages are in inference_pb2.py, made by protoc from inference.proto and kept in the
repository: whoever installs the package needs the small protobuf runtime and no compiler.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from anomalyd.errors import AnomalydError, MissingExtra
from anomalyd.serve import oip
from anomalyd.serve.access import ADMIN, SCORE, Access
from anomalyd.serve.batcher import QueueFull
from anomalyd.serve.control import Control
from anomalyd.serve.logs import Identity, identified, log_request
from anomalyd.serve.models import Model, Models
from anomalyd.serve.oip import bad
from anomalyd.serve.problems import Problem, told
from anomalyd.serve.rest import infer
from anomalyd.serve.scoring import Scorer
from anomalyd.serve.settings import ServeSettings
from anomalyd.serve.statistics import model_statistics

try:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    from anomalyd.serve import inference_pb2
except ModuleNotFoundError as missing:
    raise MissingExtra((missing.name or "grpcio").partition(".")[0], "grpc") from None

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Rpc"]

pb: Any = inference_pb2  # its names are made as it is imported
SERVICE = "inference.GRPCInferenceService"
MOST_CALLS = 128  # under way at one time; each holds a message, of which gRPC counts no bytes
MOST_STREAMS = 128  # of health and reflection, which last as long as the client likes
MESSAGE_OVERHEAD = 1 << 20  # bytes beside the images
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
}
REASONS = {
    "queue_full": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
}
LOOK_SECONDS = 0.02
OPEN = ("ServerLive", "ServerReady")
ADMINISTRATION = ("RepositoryModelLoad", "RepositoryModelUnload")
FIELDS = {"BYTES": "bytes_contents", "UINT8": "uint_contents"}


class _FewStreams(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses a stream where many are open, so that those who hold theirs keep nobody out."""

    def __init__(self) -> None:
        self._open = 0

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not handler.response_streaming:
            return handler
        kind = "stream_stream" if handler.request_streaming else "unary_stream"
        method = getattr(handler, kind)

        async def bounded(request: Any, context: Any) -> Any:
            if self._open >= MOST_STREAMS:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many open streams")
            self._open += 1
            try:
                answers = method(request, context)
                if inspect.isawaitable(answers):  # it writes its answers to the context
                    await answers
                    return
                async for answer in answers:
                    await context.write(answer)
            finally:
                self._open -= 1

        return handler._replace(**{kind: bounded})


class _Tokens(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses who may not ask before the message is there, which a call waits for without end.

    Args:
        access: who may do what.
        refusing: from a method and why it is refused to what answers so.
    """

    def __init__(self, access: Access, refusing: Callable[[str, Problem], Any]) -> None:
        self._access = access
        self._refusing = refusing

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        service, _, name = details.method.rpartition("/")
        if handler is None or service != f"/{SERVICE}" or name in OPEN:
            return handler
        given = dict(_headers(details.invocation_metadata)).get(b"authorization")
        try:
            self._access.check(given, ADMIN if name in ADMINISTRATION else SCORE)
        except Problem as problem:
            # Of a stream of messages none is waited for.
            return grpc.stream_unary_rpc_method_handler(self._refusing(name, problem))
        return handler


class Rpc:
    """A gRPC server beside the HTTP one.

    Args:
        models: what is served.
        scorer: the one path from image to verdict.
        control: who owns the repository and the metrics.
        settings: the daemon's.
        access: who may do what; None lets everybody in.

    Raises:
        MissingExtra: on import, where the packages of `[grpc]` are not there.
    """

    def __init__(
        self,
        models: Models,
        scorer: Scorer,
        control: Control,
        settings: ServeSettings,
        access: Access | None,
    ) -> None:
        self._models = models
        self._scorer = scorer
        self._control = control
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._calls = 0  # under way
        tokens = [] if access is None else [_Tokens(access, self._refusing)]
        self._server = grpc.aio.server(
            interceptors=[_FewStreams(), *tokens],
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes + MESSAGE_OVERHEAD),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(settings.workers > 1)),
            ],
            maximum_concurrent_rpcs=MOST_CALLS + MOST_STREAMS,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            AnomalydError: the port is taken.
        """
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        try:
            if settings.tls_cert is not None and settings.tls_key is not None:
                pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
                credentials = grpc.ssl_server_credentials([pair])
                port = self._server.add_secure_port(address, credentials)
            else:
                port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError):
            raise AnomalydError(
                f"{address}: gRPC cannot listen there; choose another with --grpc-port"
            ) from None
        await self.report()
        await self._server.start()
        return int(port)

    async def report(self) -> None:
        """Tell the health service whether requests are welcome."""
        state = health_pb2.HealthCheckResponse
        status = state.SERVING if self._models.ready else state.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace: float, now: Callable[[], bool] = lambda: False) -> None:
        """Finish the calls under way, for so many seconds at most, or until it must be now."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(grace))
        while self._calls and not stopping.done() and not now():
            await asyncio.sleep(LOOK_SECONDS)
        # Streams are left, which end with the server and not before.
        await self._server.stop(0)
        await stopping

    # The service

    def _handlers(self) -> Any:
        table: dict[str, tuple[Callable[..., Awaitable[Any]], Any, Any]] = {
            "ServerLive": (self._live, pb.ServerLiveRequest, pb.ServerLiveResponse),
            "ServerReady": (self._ready, pb.ServerReadyRequest, pb.ServerReadyResponse),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest, pb.ModelReadyResponse),
            "ServerMetadata": (
                self._metadata,
                pb.ServerMetadataRequest,
                pb.ServerMetadataResponse,
            ),
            "ModelMetadata": (
                self._model_metadata,
                pb.ModelMetadataRequest,
                pb.ModelMetadataResponse,
            ),
            "ModelConfig": (self._config, pb.ModelConfigRequest, pb.ModelConfigResponse),
            "ModelInfer": (self._infer, pb.ModelInferRequest, pb.ModelInferResponse),
            "ModelStatistics": (
                self._statistics,
                pb.ModelStatisticsRequest,
                pb.ModelStatisticsResponse,
            ),
            "RepositoryIndex": (
                self._index,
                pb.RepositoryIndexRequest,
                pb.RepositoryIndexResponse,
            ),
            "RepositoryModelLoad": (
                self._load,
                pb.RepositoryModelLoadRequest,
                pb.RepositoryModelLoadResponse,
            ),
            "RepositoryModelUnload": (
                self._unload,
                pb.RepositoryModelUnloadRequest,
                pb.RepositoryModelUnloadResponse,
            ),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, answer),
                request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, (answer, request, response) in table.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _guarded(
        self, name: str, answer: Callable[..., Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """Around every call: under which id it goes, and what becomes of an exception."""
        metrics = self._models.metrics
        route = f"/{SERVICE}/{name}"

        async def guarded(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            identity = Identity.of(_headers(context.invocation_metadata() or ()))
            identified.set(identity)
            context.set_trailing_metadata((("x-request-id", identity.request_id),))
            code = grpc.StatusCode.OK
            self._calls += 1
            try:
                if self._calls > MOST_CALLS and name not in OPEN:
                    detail = f"{MOST_CALLS} calls are under way, and no more may be; come again"
                    raise Problem(503, "queue_full", detail)
                return await answer(request, context)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:  # noqa: BLE001  # the last line of defence: answer and go on
                problem = told(error, self._models.metrics)
                code = _code(error, problem)
                await context.abort(code, str(problem))
            finally:
                self._calls -= 1
                seconds = time.perf_counter() - started
                metrics.requests.labels(route, code.name).inc()
                metrics.request_seconds.labels(route).observe(seconds)
                if self._settings.log_requests:
                    log_request(route, code.name, seconds)

        return guarded

    def _refusing(self, name: str, problem: Problem) -> Callable[[Any, Any], Awaitable[Any]]:
        async def refuse(request: Any, context: Any) -> Any:
            raise problem

        return self._guarded(name, refuse)

    async def _live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        model = self._found(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._models.is_ready(model))

    async def _metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(
            name="anomalyd", version=version("anomalyd"), extensions=oip.EXTENSIONS
        )

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        model = self._found(request.name, request.version)
        return pb.ModelMetadataResponse(**oip.metadata(model, self._models.versions(model.name)))

    async def _config(self, request: Any, context: Any) -> Any:
        model = self._found(request.name, request.version)
        return pb.ModelConfigResponse(config=oip.config(model, self._settings.max_images))

    async def _infer(self, request: Any, context: Any) -> Any:
        model = self._found(request.model_name, request.model_version)
        try:
            call = _call(request)
            images = _images(request, call, self._settings.max_images)
            remaining = context.time_remaining()
            if remaining is not None:
                call.parameters = {
                    "timeout": max(1, int(1e6 * remaining)),
                    **(call.parameters or {}),
                }
            outputs = await infer(model, self._scorer, call, images)
        except Exception:
            model.metrics.failed.inc()
            raise
        model.metrics.answered()
        identity = identified.get()
        return pb.ModelInferResponse(
            model_name=model.name,
            model_version=model.version,
            id=request.id or (identity.request_id if identity else ""),
            outputs=[
                {"name": output.name, "datatype": output.datatype, "shape": output.shape}
                for output in outputs
            ],
            raw_output_contents=[oip.packed(output) for output in outputs],
        )

    async def _statistics(self, request: Any, context: Any) -> Any:
        chosen = self._models.all()
        if request.name:
            found = self._found(request.name, request.version)
            chosen = [m for m in chosen if m.name == found.name]
            chosen = [found] if request.version else chosen
        samples = await self._control.samples()
        rows = [model_statistics(model.key, samples) for model in chosen]
        for row in rows:
            del row["batch_stats"]
        return pb.ModelStatisticsResponse(model_stats=rows)

    async def _index(self, request: Any, context: Any) -> Any:
        rows = self._control.index()
        ready = [row for row in rows if row["state"] == "READY" or not request.ready]
        return pb.RepositoryIndexResponse(models=ready)

    async def _load(self, request: Any, context: Any) -> Any:
        await self._control.load(request.model_name, _version(request))
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        await self._control.unload(request.model_name, _version(request))
        return pb.RepositoryModelUnloadResponse()

    def _found(self, name: str, version: str) -> Model:
        return self._models.find(name, version or None)


def _call(request: Any) -> oip.Call:
    """The call in a message, its tensors' bytes apart."""
    if len(request.inputs) != 1:
        raise bad("give one input: image (BYTES) or pixels (UINT8)")
    (tensor,) = request.inputs
    return oip.Call(
        [oip.Tensor(tensor.name, list(tensor.shape[: oip.MOST_SIDES + 1]), tensor.datatype)],
        id=request.id,
        parameters=_parameters(request.parameters),
        outputs=[oip.Wanted(output.name) for output in request.outputs] or None,
    )


def _images(request: Any, call: oip.Call, most: int) -> Sequence[Any]:
    (tensor,) = request.inputs
    if request.raw_input_contents:
        if len(request.raw_input_contents) != 1 or tensor.HasField("contents"):
            raise bad("give raw_input_contents for the one input, and then no contents")
        raw = request.raw_input_contents[0]
    else:
        raw = _contents(tensor)
    return oip.images_of(call.inputs[0], memoryview(raw), most)


def _contents(tensor: Any) -> bytes:
    """The bytes of a tensor whose elements came one by one."""
    field = FIELDS.get(tensor.datatype)
    if field is None:
        return b""  # the types that there are will be said
    given = [described.name for described, _ in tensor.contents.ListFields()]
    if given != [field]:
        raise bad(f"{tensor.datatype} comes in {field}, or better in raw_input_contents")
    values = getattr(tensor.contents, field)
    oip.check_elements(len(values))
    return _framed(values) if tensor.datatype == "BYTES" else _bytes(values)


def _framed(strings: Sequence[bytes]) -> bytes:
    return b"".join(len(one).to_bytes(4, "little") + one for one in strings)


def _bytes(numbers: Sequence[int]) -> bytes:
    try:
        return bytes(numbers)
    except ValueError:
        raise bad("input pixels must hold numbers from 0 to 255") from None


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found


def _version(request: Any) -> str | None:
    given = request.parameters.get("version")
    if given is None:
        return None
    if given.WhichOneof("parameter_choice") != "string_param":
        raise bad("parameter version must be a text")
    return str(given.string_param)


def _headers(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode(), value.encode() if isinstance(value, str) else value)
        for name, value in metadata
    ]


def _code(error: Exception, problem: Problem) -> Any:
    if isinstance(error, QueueFull):  # too late as well: no deadline of the client's has passed
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    by_status = CODES.get(problem.status, grpc.StatusCode.INTERNAL)
    return REASONS.get(problem.reason or "", by_status)
