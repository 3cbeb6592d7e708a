"""The Open Inference Protocol over gRPC, asked through a real channel."""

from __future__ import annotations

import asyncio
import hashlib
import struct

import numpy as np
import pytest
from daemons import NORMAL, OUTLIER, load
from tiny import SIDE, draw, tiny_bundle

grpc = pytest.importorskip("grpc")
from google.protobuf import descriptor_pb2  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: E402

from anomalyd.detect.detector import Detector  # noqa: E402
from anomalyd.serve import inference_pb2 as pb  # noqa: E402
from anomalyd.serve import rpc  # noqa: E402
from anomalyd.serve.access import Access  # noqa: E402
from anomalyd.serve.rpc import SERVICE, Rpc  # noqa: E402
from anomalyd.serve.scoring import Scorer  # noqa: E402
from anomalyd.serve.settings import ServeSettings  # noqa: E402

FOUR = draw(4, seed=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def asked(bundle):
    """Runs a scenario with a channel to a daemon; scenario(call, channel, models)."""

    def asked(scenario, access=None, grace=1, **changes):
        async def run():
            settings = ServeSettings(
                bundles=(str(bundle),), threads=1, grpc_port=0, max_images=64, **changes
            )
            models, control = load(settings)
            server = Rpc(models, Scorer(settings, models.metrics), control, settings, access)
            port = await server.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

                    def call(name, request, **options):
                        kind = getattr(pb, type(request).__name__.replace("Request", "Response"))
                        ask = channel.unary_unary(
                            f"/{SERVICE}/{name}",
                            request_serializer=type(request).SerializeToString,
                            response_deserializer=kind.FromString,
                        )
                        return ask(request, **{"timeout": 20, **options})

                    return await scenario(call, channel, models)
            finally:
                await server.stop(grace)
                models.close()

        return asyncio.run(run())

    return asked


def pixels(array, raw=None, **changes):
    given = {"name": "pixels", "datatype": "UINT8", "shape": list(array.shape)} | changes
    raw = [array.tobytes()] if raw is None else raw
    return pb.ModelInferRequest(model_name="tiny", inputs=[given], raw_input_contents=raw)


def outputs(response):
    kinds = {"FP64": "<f8", "FP32": "<f4", "BOOL": "?"}
    return {
        output.name: np.frombuffer(raw, kinds[output.datatype]).reshape(output.shape).tolist()
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


async def refused(call, code):
    """The call fails with this status; its message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    assert caught.value.details().isprintable()
    return caught.value.details()


def test_the_tensors_are_the_library_s_verdicts(asked, bundle):
    """As over HTTP, for raw pixels, typed contents and encoded images."""
    verdicts = Detector.load(bundle, device="cpu", threads=1).score(FOUR)

    async def scenario(call, channel, models):
        typed = pixels(FOUR, raw=[])
        typed.inputs[0].contents.uint_contents.extend(FOUR.ravel().tolist())
        for request in (pixels(FOUR), typed):
            response = await call("ModelInfer", request)
            found = outputs(response)
            for name, values in found.items():
                assert values == [getattr(verdict, name) for verdict in verdicts]
        assert (response.model_name, response.model_version) == ("tiny", "1")
        assert response.id
        raw = b"".join(struct.pack("<I", len(one)) + one for one in (OUTLIER, NORMAL))
        images = pb.ModelInferRequest(
            model_name="tiny",
            model_version="1",
            id="mine",
            inputs=[{"name": "image", "datatype": "BYTES", "shape": [2]}],
            outputs=[{"name": "outlier"}],
            raw_input_contents=[raw],
        )
        response = await call("ModelInfer", images)
        assert (outputs(response), response.id) == ({"outlier": [True, False]}, "mine")
        contents = images.inputs[0].contents
        contents.bytes_contents.extend([OUTLIER, NORMAL])
        del images.raw_input_contents[:]
        assert outputs(await call("ModelInfer", images)) == {"outlier": [True, False]}

    asked(scenario)


def test_parameters(asked):
    """alpha as a number or, for old clients, a text; the map on demand."""

    async def scenario(call, channel, models):
        for given in ({"double_param": 0.5}, {"string_param": "0.5"}):
            request = pixels(FOUR)
            request.parameters["alpha"].CopyFrom(pb.InferParameter(**given))
            request.parameters["heatmap"].bool_param = True
            found = outputs(await call("ModelInfer", request))
            assert found["outlier"] == [p <= 0.5 for p in found["p_value"]]
            assert np.shape(found["heatmap"]) == (4, SIDE, SIDE)
        request.parameters["alpha"].double_param = 1e-9
        await refused(call("ModelInfer", request), grpc.StatusCode.INVALID_ARGUMENT)

    asked(scenario)


BAD = [
    pixels(FOUR, raw=[b"short"]),
    pixels(FOUR, raw=[FOUR.tobytes()] * 2),
    pixels(FOUR, raw=[]),
    pixels(FOUR, shape=[-4, -4, 4, 1]),
    pixels(FOUR, shape=[]),
    pixels(FOUR, shape=[2**62] * 4),
    pixels(FOUR, datatype="FP32"),
    pixels(FOUR, name="input"),
    pixels(FOUR, contents={"uint_contents": [1]}),
    pixels(FOUR, raw=[], contents={"bytes_contents": [FOUR.tobytes()]}),
    pixels(FOUR, raw=[], shape=[]),
    pixels(FOUR, raw=[], datatype="BYTES", name="image", contents={"uint_contents": [1]}),
    pixels(FOUR, raw=[], contents={"uint_contents": [2**31] * FOUR.size}),
    pb.ModelInferRequest(model_name="tiny"),
]


@pytest.mark.parametrize("request_", BAD, ids=range(len(BAD)))
def test_a_bad_request_is_an_argument_that_is_invalid(asked, request_):
    """Or too large; and the next one is answered."""

    async def scenario(call, channel, models):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call("ModelInfer", request_)
        codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert caught.value.code() in codes
        assert (await call("ModelInfer", pixels(FOUR))).outputs

    asked(scenario)


def test_what_is_not_there(asked):
    """Models and versions."""

    async def scenario(call, channel, models):
        for name, version in (("none", ""), ("tiny", "7")):
            asked_for = {"name": name, "version": version}
            for method, request in (
                ("ModelReady", pb.ModelReadyRequest(**asked_for)),
                ("ModelMetadata", pb.ModelMetadataRequest(**asked_for)),
                ("ModelInfer", pb.ModelInferRequest(model_name=name, model_version=version)),
            ):
                await refused(call(method, request), grpc.StatusCode.NOT_FOUND)

    asked(scenario)


def test_metadata_index_and_statistics(asked):
    """What clients ask before and after."""

    async def scenario(call, channel, models):
        await call("ModelInfer", pixels(FOUR))
        server = await call("ServerMetadata", pb.ServerMetadataRequest())
        assert server.name == "anomalyd"
        model = await call("ModelMetadata", pb.ModelMetadataRequest(name="tiny"))
        assert [list(tensor.shape) for tensor in model.inputs] == [[-1], [-1, SIDE, SIDE, 1]]
        index = await call("RepositoryIndex", pb.RepositoryIndexRequest())
        assert [(row.name, row.state) for row in index.models] == [("tiny", "READY")]
        rows = await call("ModelStatistics", pb.ModelStatisticsRequest(name="tiny"))
        assert rows.model_stats[0].inference_count == 4
        await refused(
            call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="tiny")),
            grpc.StatusCode.PERMISSION_DENIED,
        )

    asked(scenario)


def test_health_and_reflection(asked):
    """The standard services say the same as our own."""

    async def scenario(call, channel, models):
        health = health_pb2_grpc.HealthStub(channel)
        states = health_pb2.HealthCheckResponse
        asked_for = health_pb2.HealthCheckRequest(service=SERVICE)
        assert (await health.Check(asked_for)).status == states.SERVING
        assert (await call("ServerReady", pb.ServerReadyRequest())).ready
        assert (await call("ServerLive", pb.ServerLiveRequest())).live
        models.ready = False
        assert not (await call("ServerReady", pb.ServerReadyRequest())).ready
        assert not (await call("ModelReady", pb.ModelReadyRequest(name="tiny"))).ready
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        queries = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        listed, file = [answer async for answer in stub.ServerReflectionInfo(iter(queries))]
        assert SERVICE in {service.name for service in listed.list_services_response.service}
        found = descriptor_pb2.FileDescriptorProto.FromString(
            file.file_descriptor_response.file_descriptor_proto[0]
        )
        assert "ModelInfer" in {method.name for method in found.service[0].method}

    asked(scenario)


def test_the_configuration_is_that_of_http(asked):
    """What Triton's clients ask for before they send anything."""

    async def scenario(call, channel, models):
        found = (await call("ModelConfig", pb.ModelConfigRequest(name="tiny"))).config
        assert (found.name, found.max_batch_size) == ("tiny", 64)
        assert [(i.name, i.data_type, list(i.dims)) for i in found.input] == [
            ("image", pb.TYPE_STRING, [1]),
            ("pixels", pb.TYPE_UINT8, [SIDE, SIDE, 1]),
        ]
        assert found.output[3].data_type == pb.TYPE_BOOL

    asked(scenario)


def test_who_holds_streams_keeps_nobody_out(asked, monkeypatch):
    """Streams of health are bounded apart from calls, and do not delay the end."""
    monkeypatch.setattr(rpc, "MOST_STREAMS", 2)

    async def scenario(call, channel, models):
        watch = health_pb2_grpc.HealthStub(channel).Watch
        asked_for = health_pb2.HealthCheckRequest(service=SERVICE)
        held = [watch(asked_for), watch(asked_for)]
        for stream in held:
            assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVING
        await refused(watch(asked_for).read(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await call("ModelInfer", pixels(FOUR))).outputs

    asked(scenario, grace=3600)


def test_tokens(asked, tmp_path):
    """In the metadata, as in HTTP's header; probes need none."""
    file = tmp_path / "tokens"
    file.write_text(f"camera score {hashlib.sha256(b'secret').hexdigest()}")

    async def scenario(call, channel, models):
        await refused(call("ModelInfer", pixels(FOUR)), grpc.StatusCode.UNAUTHENTICATED)
        held = (("authorization", "Bearer secret"),)
        assert (await call("ModelInfer", pixels(FOUR), metadata=held)).outputs
        load_it = pb.RepositoryModelLoadRequest(model_name="tiny")
        await refused(
            call("RepositoryModelLoad", load_it, metadata=held), grpc.StatusCode.PERMISSION_DENIED
        )
        assert (await call("ServerReady", pb.ServerReadyRequest())).ready

    asked(scenario, access=Access(file))


def test_who_may_not_ask_is_refused_before_he_sends_anything(asked, tmp_path):
    """A message that never comes would hold its call, and with it one of few, without end."""
    file = tmp_path / "tokens"
    file.write_text(f"camera score {hashlib.sha256(b'secret').hexdigest()}")

    async def never():
        await asyncio.Event().wait()
        yield b""

    async def scenario(call, channel, models):
        for name, metadata, code in (
            ("ModelInfer", (), grpc.StatusCode.UNAUTHENTICATED),
            (
                "RepositoryModelLoad",
                (("authorization", "Bearer secret"),),
                grpc.StatusCode.PERMISSION_DENIED,
            ),
        ):
            ask = channel.stream_unary(f"/{SERVICE}/{name}")
            await refused(ask(never(), metadata=metadata, timeout=20), code)

    asked(scenario, access=Access(file))


def test_the_request_id_is_sent_back(asked):
    """In the trailing metadata, whatever becomes of the call."""

    async def scenario(call, channel, models):
        for model, code in (("tiny", grpc.StatusCode.OK), ("none", grpc.StatusCode.NOT_FOUND)):
            request = pb.ModelReadyRequest(name=model)
            asked_for = call("ModelReady", request, metadata=(("x-request-id", "mine"),))
            assert await asked_for.code() == code
            assert dict(await asked_for.trailing_metadata())["x-request-id"] == "mine"

    asked(scenario)


def test_probes_are_answered_where_no_more_calls_are(asked, monkeypatch):
    """A daemon that is busy is alive; who is refused is told why."""
    monkeypatch.setattr(rpc, "MOST_CALLS", 0)

    async def scenario(call, channel, models):
        assert (await call("ServerLive", pb.ServerLiveRequest())).live
        assert (await call("ServerReady", pb.ServerReadyRequest())).ready
        for name, request in (
            ("ModelReady", pb.ModelReadyRequest(name="tiny")),
            ("ModelInfer", pixels(FOUR)),
        ):
            said = await refused(call(name, request), grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert "calls are under way" in said

    asked(scenario)


def test_messages_are_bounded_like_bodies(asked):
    """More than gRPC's usual 4 MiB is taken, more than a body may have is not."""

    async def scenario(call, channel, models):
        large = np.zeros((3, 1400, 1400, 1), np.uint8)
        assert (await call("ModelInfer", pixels(large))).outputs
        beyond = np.zeros((9, 1400, 1400, 1), np.uint8)
        await refused(call("ModelInfer", pixels(beyond)), grpc.StatusCode.RESOURCE_EXHAUSTED)

    asked(scenario, max_body_bytes=8 << 20)


FIELDS = {
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelMetadataResponse": {
        "name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5, "properties": 6,
    },
    "InferParameter": {
        "bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4,
        "uint64_param": 5,
    },
    "InferTensorContents": {
        "bool_contents": 1, "int_contents": 2, "int64_contents": 3, "uint_contents": 4,
        "uint64_contents": 5, "fp32_contents": 6, "fp64_contents": 7, "bytes_contents": 8,
    },
    "ModelInferRequest": {
        "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "inputs": 5,
        "outputs": 6, "raw_input_contents": 7,
    },
    "ModelInferResponse": {
        "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "outputs": 5,
        "raw_output_contents": 6,
    },
    "RepositoryIndexRequest": {"repository_name": 1, "ready": 2},
    "ModelConfig": {
        "name": 1, "platform": 2, "max_batch_size": 4, "input": 5, "output": 6, "backend": 17,
    },
    "ModelInput": {"name": 1, "data_type": 2, "dims": 4, "optional": 8},
    "ModelOutput": {"name": 1, "data_type": 2, "dims": 3},
    "RepositoryModelLoadRequest": {"repository_name": 1, "model_name": 2, "parameters": 3},
}  # fmt: skip


@pytest.mark.parametrize("message", FIELDS)
def test_field_numbers_are_the_protocol_s(message):
    """On the wire only the numbers count."""
    fields = getattr(pb, message).DESCRIPTOR.fields
    assert {field.name: field.number for field in fields} == FIELDS[message]
