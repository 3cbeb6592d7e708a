"""The Open Inference Protocol over HTTP: tensors in and out, as JSON and as bytes."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import zlib

import numpy as np
import pytest
from daemons import BRIGHT, NORMAL, OUTLIER, encoded, fake_daemon, serve
from hypothesis import given
from hypothesis import strategies as st
from tiny import SIDE, draw, tiny_bundle

from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import Raw
from anomalyd.serve import oip
from anomalyd.serve.batcher import Pace
from anomalyd.serve.models import Scored
from anomalyd.serve.problems import Problem

INFER = "/v2/models/tiny/infer"
FOUR = draw(4, seed=5)
DEFAULT = ["score", "bits_per_dim", "p_value", "outlier"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def daemon(bundle):
    """One daemon for many questions."""
    daemon = serve(bundle, max_images=64)
    yield daemon
    daemon.models.close()


def image(*images, **changes):
    """The input `image` in JSON."""
    texts = [base64.b64encode(one).decode() for one in images]
    return {"name": "image", "shape": [len(images)], "datatype": "BYTES", "data": texts} | changes


def pixels(array, **changes):
    """The input `pixels` in JSON, flat."""
    given = {"name": "pixels", "shape": list(array.shape), "datatype": "UINT8"}
    return given | {"data": array.ravel().tolist()} | changes


def ask(daemon, *inputs, path=INFER, **request):
    return daemon.ask("POST", path, json={"inputs": list(inputs)} | request)


def ask_binary(daemon, call, *tensors, path=INFER, head=None, headers=(), content=None):
    """A request with bytes after its JSON."""
    start = json.dumps(call).encode()
    length = str(len(start) if head is None else head)
    body = start + b"".join(tensors) if content is None else content
    headers = {"Inference-Header-Content-Length": length, **dict(headers)}
    return daemon.ask("POST", path, content=body, headers=headers)


def outputs(response):
    """The outputs of a JSON answer, by name."""
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def binary_outputs(response):
    """The outputs of an answer, each in whichever way it came, by name."""
    length = int(response.headers["inference-header-content-length"])
    answer, rest = json.loads(response.content[:length]), response.content[length:]
    found = {}
    for output in answer["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        found[output["name"]] = output["data"] if size is None else rest[:size]
        rest = rest[size or 0 :]
    assert rest == b""
    return found


def refused(response, status):
    """The answer is the protocol's error of this status, in one line."""
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"error"}
    assert content["error"].isprintable()
    return content["error"]


def test_the_tensors_are_the_library_s_verdicts(daemon, bundle):
    """Every output, as `Detector.score` says it, for decoded and for encoded images."""
    verdicts = Detector.load(bundle, device="cpu", threads=1).score(FOUR)
    for tensor in (pixels(FOUR), pixels(FOUR, data=FOUR.tolist()), image(*map(encoded, FOUR))):
        found = outputs(ask(daemon, tensor))
        assert list(found) == DEFAULT
        for name, values in found.items():
            assert values == [getattr(verdict, name) for verdict in verdicts]


def test_an_answer_says_who_gave_it(daemon):
    """Model, version and the client's id; without an id the request's own."""
    answer = ask(daemon, image(NORMAL), id="mine").json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "mine")
    response = ask(daemon, image(NORMAL))
    assert response.json()["id"] == response.headers["x-request-id"]
    shapes = {
        output["name"]: (output["datatype"], output["shape"]) for output in answer["outputs"]
    }
    assert shapes["p_value"] == ("FP64", [1])
    assert shapes["outlier"] == ("BOOL", [1])


def test_outputs_are_those_asked_for(daemon):
    """In the order asked; the map only then, in nats."""
    wanted = [{"name": "heatmap"}, {"name": "p_value"}]
    response = ask(daemon, pixels(FOUR), outputs=wanted)
    assert list(outputs(response)) == ["heatmap", "p_value"]
    assert response.json()["outputs"][0]["shape"] == [4, SIDE, SIDE]
    named = ask(daemon, pixels(FOUR), parameters={"heatmap": True})
    assert list(outputs(named)) == [*DEFAULT, "heatmap"]


def test_alpha_is_a_parameter(daemon):
    """It moves the threshold; one that cannot be reached is refused."""
    p_value = outputs(ask(daemon, image(NORMAL)))["p_value"][0]
    found = outputs(ask(daemon, image(NORMAL), parameters={"alpha": p_value}))
    assert found["outlier"] == [True]
    refused(ask(daemon, image(NORMAL), parameters={"alpha": 1e-9}), 400)
    refused(ask(daemon, image(NORMAL), parameters={"alpha": True}), 400)


def test_binary_tensors_both_ways(daemon):
    """Bytes after the JSON, in and out, hold the same numbers as JSON."""
    expected = outputs(ask(daemon, pixels(FOUR)))
    call = {
        "inputs": [pixels(FOUR, parameters={"binary_data_size": FOUR.nbytes})],
        "parameters": {"binary_data_output": True},
    }
    del call["inputs"][0]["data"]
    response = ask_binary(daemon, call, FOUR.tobytes())
    assert response.headers["content-type"] == "application/octet-stream"
    found = binary_outputs(response)
    assert np.frombuffer(found["p_value"], "<f8").tolist() == expected["p_value"]
    assert np.frombuffer(found["outlier"], "?").tolist() == expected["outlier"]


def test_each_output_may_be_binary_by_itself(daemon):
    """Its own parameter wins over the request's."""
    call = {
        "inputs": [pixels(FOUR)],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "score"}, {"name": "p_value", "parameters": {"binary_data": False}}],
    }
    found = binary_outputs(ask_binary(daemon, call))
    assert isinstance(found["score"], bytes)
    assert isinstance(found["p_value"], list)


def lengths_before(*texts):
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def test_encoded_images_as_bytes(daemon):
    """A BYTES tensor has each element's length before it."""
    raw = lengths_before(OUTLIER, NORMAL)
    tensor = image(OUTLIER, NORMAL, parameters={"binary_data_size": len(raw)})
    del tensor["data"]
    found = outputs(ask_binary(daemon, {"inputs": [tensor]}, raw))
    assert found["outlier"] == [True, False]
    assert found == outputs(ask(daemon, image(OUTLIER, NORMAL)))


def test_a_body_that_is_the_image(daemon):
    """With a header length of 0 no JSON is needed; the answer is binary unless JSON is wanted."""
    headers = {"Inference-Header-Content-Length": "0"}
    response = daemon.ask("POST", INFER, content=OUTLIER, headers=headers)
    assert binary_outputs(response)["outlier"] == b"\1"
    headers["Accept"] = "application/json"
    assert outputs(daemon.ask("POST", INFER, content=OUTLIER, headers=headers))["outlier"] == [
        True
    ]


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_compressed_body(daemon, pack):
    """gzip and deflate, the whole of it."""
    body = pack(json.dumps({"inputs": [image(NORMAL)]}).encode())
    encoding = "gzip" if pack is gzip.compress else "deflate"
    response = daemon.ask("POST", INFER, content=body, headers={"Content-Encoding": encoding})
    assert outputs(response) == outputs(ask(daemon, image(NORMAL)))
    damaged = daemon.ask("POST", INFER, content=body[:-9], headers={"Content-Encoding": encoding})
    refused(damaged, 400)
    refused(daemon.ask("POST", INFER, content=body, headers={"Content-Encoding": "br"}), 415)


def test_a_bomb_is_not_unpacked(bundle):
    """What unpacks to more than a body may have is 413, and nothing stays held."""
    daemon = serve(bundle, max_body_bytes=1 << 20)
    for size in (1 << 21, 1 << 25):
        bomb = gzip.compress(bytes(size), 9)
        response = daemon.ask("POST", INFER, content=bomb, headers={"Content-Encoding": "gzip"})
        refused(response, 413)
    assert daemon.metric("anomalyd_inflight_body_bytes") == 0
    daemon.models.close()


BAD_TENSORS = [
    pixels(FOUR, shape=[4, SIDE, SIDE]),
    pixels(FOUR, shape=[4, SIDE, SIDE, 2]),
    pixels(FOUR, shape=[3, SIDE, SIDE, 1]),
    pixels(FOUR, shape=[-4, -SIDE, SIDE, 1]),
    pixels(FOUR, shape=[0, SIDE, SIDE, 1]),
    pixels(FOUR, shape=[4, SIDE, SIDE, 1] * 3),
    pixels(FOUR, shape=[4, 2**62, 2**62, 1]),
    pixels(FOUR, shape=[]),
    pixels(FOUR, shape=[4.5, SIDE, SIDE, 1]),
    pixels(FOUR, shape=None),
    pixels(FOUR, datatype="FP32"),
    pixels(FOUR, datatype="BYTES"),
    pixels(FOUR, name="input"),
    pixels(FOUR, data=[256] * FOUR.size),
    pixels(FOUR, data=[-1] * FOUR.size),
    pixels(FOUR, data=[0.5] * FOUR.size),
    pixels(FOUR, data=[True] * FOUR.size),
    pixels(FOUR, data=["1"] * FOUR.size),
    pixels(FOUR, data=[[1, 2], [3]]),
    pixels(FOUR, data=[[[[1], [2]], [[3]]]]),
    pixels(FOUR, data=FOUR.reshape(SIDE, 4, SIDE, 1).tolist(), shape=[2, 8, SIDE, 1]),
    pixels(FOUR, data=7),
    pixels(FOUR, data={"b64": "AAAA"}),
    pixels(FOUR, data=None),
    image(NORMAL, shape=[2]),
    image(NORMAL, shape=[1, 2]),
    image(NORMAL, data=["not base64!"]),
    image(NORMAL, data=["é"]),
    image(NORMAL, data=[1]),
    image(NORMAL, data=[["AAAA", "AAAA"]], shape=[1, 1]),
    image(NORMAL, parameters={"binary_data_size": 3}),
    image(NORMAL, parameters={"nested": {"a": 1}}),
    {"name": "image"},
    7,
    None,
]


@pytest.mark.parametrize("tensor", BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_a_bad_tensor_is_400(daemon, tensor):
    """Names, types, shapes and sizes that do not fit."""
    refused(ask(daemon, tensor), 400)


def test_images_in_rows_of_one(daemon):
    """[N, 1] means the same as [N]."""
    expected = outputs(ask(daemon, image(NORMAL)))
    data = [[base64.b64encode(NORMAL).decode()]]
    assert outputs(ask(daemon, image(NORMAL, shape=[1, 1], data=data))) == expected
    flat = [base64.b64encode(NORMAL).decode()]
    assert outputs(ask(daemon, image(NORMAL, shape=[1, 1], data=flat))) == expected


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": []},
        {"inputs": [image(NORMAL), image(NORMAL)]},
        {"inputs": [image(NORMAL), pixels(FOUR)]},
        {"inputs": {}},
        {},
        [],
        "inputs",
        {"inputs": [image(NORMAL)], "outputs": [{"name": "score"}, {"name": "score"}]},
        {"inputs": [image(NORMAL)], "outputs": [{"name": "logits"}]},
        {"inputs": [image(NORMAL)], "outputs": [{"name": "label"}]},
        {"inputs": [image(NORMAL)], "outputs": [{}]},
        {"inputs": [image(NORMAL)], "id": 7},
        {"inputs": [image(NORMAL)], "parameters": {"heatmap": 1}},
        {"inputs": [image(NORMAL)], "parameters": {"timeout": "soon"}},
        {"inputs": [image(NORMAL)], "parameters": []},
    ],
)
def test_a_bad_request_is_400(daemon, request_):
    """Missing, doubled or unknown parts are never ignored."""
    refused(daemon.ask("POST", INFER, json=request_), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"inputs":' + b"[" * 100_000,
        b'{"inputs":[{"name":"pixels","shape":[1],"datatype":"UINT8","data":'
        + b"[" * 100_000
        + b"1"
        + b"]" * 100_000
        + b"}]}",
        b'{"inputs":[{"name":"pixels","shape":[1,1,1,1],"datatype":"UINT8","data":[NaN]}]}',
        b'{"inputs":[{"name":"pixels","shape":[1,1,1,1],"datatype":"UINT8","data":[1e999]}]}',
        b'{"inputs":[{"name":"pixels","shape":[1e999,1,1,1],"datatype":"UINT8","data":[1]}]}',
        b'{"inputs":[{"name":"pixels","shape":[Infinity,1,1,1],"datatype":"UINT8","data":[1]}]}',
        b'{"inputs":[{"name":"im\xff\xfeage"}]}',
        b"\xff\xfe{}",
        b"\x00",
    ],
    ids=range(12),
)
def test_what_is_no_json_is_400(daemon, body):
    """NaN, Infinity, endless nesting, no UTF-8: one line back, and the daemon goes on."""
    refused(daemon.ask("POST", INFER, content=body), 400)
    assert ask(daemon, image(NORMAL)).status_code == 200


@pytest.mark.parametrize(
    ("size", "head", "tail"),
    [
        (FOUR.nbytes + 1, None, FOUR.tobytes()),
        (FOUR.nbytes, None, FOUR.tobytes()[:-1]),
        (FOUR.nbytes, None, FOUR.tobytes() + b"x"),
        (-1, None, FOUR.tobytes()),
        (2**63, None, FOUR.tobytes()),
        (2.5, None, FOUR.tobytes()),
        (True, None, b"x"),
        ("64", None, FOUR.tobytes()),
        (FOUR.nbytes, 10**9, FOUR.tobytes()),
        (FOUR.nbytes, -1, FOUR.tobytes()),
        (FOUR.nbytes, "many", FOUR.tobytes()),
        (FOUR.nbytes, 5, FOUR.tobytes()),
        (FOUR.nbytes, "9" * 5000, FOUR.tobytes()),
    ],
    ids=range(13),
)
def test_sizes_that_lie_are_400(daemon, size, head, tail):
    """Of the tensor, or of the JSON before it."""
    tensor = pixels(FOUR, parameters={"binary_data_size": size})
    del tensor["data"]
    refused(ask_binary(daemon, {"inputs": [tensor]}, tail, head=head), 400)


@pytest.mark.parametrize(
    "raw", [b"\1", b"\1\0\0", struct.pack("<I", 2**32 - 1), lengths_before(NORMAL) + b"\0"]
)
def test_lengths_that_lie_are_400(daemon, raw):
    """Of an element of a BYTES tensor."""
    tensor = image(NORMAL, parameters={"binary_data_size": len(raw)})
    del tensor["data"]
    refused(ask_binary(daemon, {"inputs": [tensor]}, raw), 400)


def test_too_many_images_are_413(daemon):
    """As in a multipart request."""
    many = np.zeros((65, SIDE, SIDE, 1), np.uint8)
    refused(ask(daemon, pixels(many)), 413)


@pytest.mark.parametrize(
    ("bad", "status"), [(b"", 400), (b"text", 415), (NORMAL[:45], 422), (b"<svg/>", 415)]
)
def test_a_bad_image_is_named(daemon, bad, status):
    """A tensor has no place for an error: the request is refused, and says which image."""
    assert refused(ask(daemon, image(NORMAL, bad)), status).startswith("image 1: ")
    refused(ask(daemon, image(bad)), status)


def test_pixels_of_another_shape_go_the_way_of_images(daemon):
    """The bundle's policy decides, be the image encoded or not."""
    large = np.zeros((1, 8 * SIDE, 8 * SIDE, 1), np.uint8)
    assert outputs(ask(daemon, pixels(large))) == outputs(ask(daemon, image(encoded(large[0]))))
    refused(ask(daemon, pixels(np.zeros((1, 4, 40, 1), np.uint8))), 422)
    colour = np.full((1, SIDE, SIDE, 3), 255, np.uint8)
    assert outputs(ask(daemon, pixels(colour))) == outputs(ask(daemon, pixels(BRIGHT[None])))


def test_maps_of_several_sizes_do_not_fit_into_a_tensor(daemon):
    """Photographs that are scored in tiles keep their own sizes: one at a time, then."""
    model = daemon.models.find("tiny")
    verdict = model.detector.score(BRIGHT)
    maps = [np.zeros((8, 12), np.float32), np.zeros((16, 8), np.float32)]
    raw = Raw(np.zeros((2, 1)), np.zeros((2, 2), np.float32), maps)
    scored = [Scored(verdict, raw, 0), Scored(verdict, raw, 1)]
    assert oip.outputs_of(model, scored[:1], ["heatmap"])[0].shape == [1, 8, 12]
    with pytest.raises(Problem, match="one at a time"):
        oip.outputs_of(model, scored, ["heatmap"])


def test_metadata(daemon):
    """What clients ask before they infer."""
    server = daemon.ask("GET", "/v2").json()
    assert server["name"] == "anomalyd"
    assert "binary_tensor_data" in server["extensions"]
    assert daemon.ask("GET", "/v2/").json() == server
    model = daemon.ask("GET", "/v2/models/tiny").json()
    assert (model["name"], model["versions"]) == ("tiny", ["1"])
    assert model["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 1]},
    ]
    assert [output["name"] for output in model["outputs"]] == [*DEFAULT, "heatmap"]
    assert daemon.ask("GET", "/v2/models/tiny/versions/1").json() == model
    assert daemon.ask("GET", "/v2/models").json() == {"models": ["tiny"]}
    assert daemon.ask("GET", "/v2/models/tiny/config").json()["max_batch_size"] == 64


def test_health(daemon):
    """Live, ready, and ready by model; 503 once it is not."""
    assert daemon.ask("GET", "/v2/health/live").json() == {"live": True}
    assert daemon.ask("GET", "/v2/health/ready").json() == {"live": True, "ready": True}
    assert daemon.ask("GET", "/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    daemon.models.ready = False
    assert daemon.ask("GET", "/v2/health/ready").status_code == 503
    assert daemon.ask("GET", "/v2/models/tiny/versions/1/ready").status_code == 503
    daemon.models.ready = True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/tiny/versions/7", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/tiny/versions/7/infer", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/repository/models/tiny/load", 403),
        ("POST", "/v2/repository/models/tiny/unload", 403),
        ("POST", "/v2/repository/index", 400),
    ],
)
def test_errors_have_the_protocol_s_shape(daemon, method, path, status):
    """{"error"} and nothing else, whatever is wrong; loading is off unless asked for."""
    body = {"ready": "yes"} if path.endswith("index") else {"inputs": [image(NORMAL)]}
    refused(daemon.ask(method, path, json=body if method == "POST" else None), status)


def test_the_index(daemon):
    """What there is and in which state."""
    row = {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    for body in (b"", b"{}", b'{"ready":true}'):
        assert daemon.ask("POST", "/v2/repository/index", content=body).json() == [row]


def test_statistics(bundle):
    """Counts of requests, images and runs, and their times."""
    daemon = serve(bundle)
    ask(daemon, pixels(FOUR))
    daemon.score(NORMAL)
    ask(daemon, image(b"bad"))
    for path in ("/v2/models/stats", "/v2/models/tiny/stats", "/v2/models/tiny/versions/1/stats"):
        (found,) = daemon.ask("GET", path).json()["model_stats"]
        assert (found["name"], found["version"]) == ("tiny", "1")
        assert found["inference_count"] == 5
        assert found["execution_count"] == 2
        assert found["inference_stats"]["success"]["count"] == 2
        assert found["inference_stats"]["fail"]["count"] == 1
        assert found["inference_stats"]["queue"]["count"] == 5
        assert found["last_inference"] > 1.7e12
    daemon.models.close()


def test_a_timeout_in_microseconds(bundle):
    """Who cannot wait that long is told so and not served late."""
    daemon = fake_daemon(bundle, max_batch=1)
    for _ in range(Pace.FEWEST):
        daemon.batcher.pace.note(1, 0.5)

    async def scenario():
        daemon.session.open.clear()
        body = {"inputs": [image(NORMAL)]}
        first = asyncio.ensure_future(daemon.send("POST", INFER, json=body))
        while daemon.batcher.depth or not daemon.batcher._running:
            await asyncio.sleep(0.001)
        hasty = await daemon.send("POST", INFER, json=body | {"parameters": {"timeout": 1000}})
        daemon.session.open.set()
        return hasty, await first

    hasty, first = asyncio.run(scenario())
    refused(hasty, 503)
    assert hasty.headers["retry-after"] == "1"
    assert first.status_code == 200
    daemon.models.close()


@pytest.mark.parametrize("floor", [-np.inf, np.inf, np.nan])
def test_no_number_is_not_finite(bundle, floor):
    """JSON has no NaN, and neither have we."""

    def refuse(constant):
        raise AssertionError(constant)

    daemon = fake_daemon(bundle)
    daemon.session.floor = floor
    response = ask(daemon, image(NORMAL), parameters={"heatmap": True})
    answer = json.loads(response.text, parse_constant=refuse)
    assert all(None not in output["data"] for output in answer["outputs"])
    daemon.models.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(["name", "shape", "datatype", "data", "parameters"])


@given(data=st.data())
def test_no_json_makes_it_fail(daemon, data):
    """A good request with any part of it replaced by anything: 200 or a typed 4xx."""
    tensor = data.draw(st.sampled_from([pixels(FOUR), image(NORMAL)])).copy()
    call = {"inputs": [tensor], "outputs": [{"name": "score"}], "parameters": {}, "id": "a"}
    if data.draw(st.booleans()):
        tensor[data.draw(FIELDS)] = data.draw(JSON)
    else:
        call[data.draw(st.sampled_from(list(call)))] = data.draw(JSON)
    response = daemon.ask("POST", INFER, json=call)
    if response.status_code != 200:
        refused(response, response.status_code)
        assert response.status_code in (400, 413, 415, 422)


@given(data=st.data())
def test_no_bytes_make_it_fail(daemon, data):
    """Header lengths, sizes and bodies at random, compressed or not."""
    raw = data.draw(st.binary(max_size=40))
    tensor = image(NORMAL, parameters={"binary_data_size": data.draw(st.integers(-2, 50))})
    del tensor["data"]
    headers = data.draw(st.sampled_from([{}, {"Content-Encoding": "gzip"}]))
    response = ask_binary(
        daemon,
        {"inputs": [tensor]},
        raw,
        head=data.draw(st.none() | st.integers(-1, 400)),
        headers=headers,
        content=data.draw(st.none() | st.binary(max_size=60)),
    )
    refused(response, response.status_code)
    assert response.status_code in (400, 413, 415, 422)


@pytest.mark.parametrize(
    "data", [b"1," * oip.MOST_ELEMENTS, b"[]," * (oip.MOST_ELEMENTS // 2 + 1)]
)
def test_lists_without_end_are_refused_unread(daemon, data):
    """Reading numbers in JSON holds up everybody else, so there are so many and no more."""
    body = b'{"inputs": [{"name": "pixels", "shape": [1], "datatype": "UINT8", "data": [%s1]}]}'
    said = refused(daemon.ask("POST", INFER, content=body % data), 413)
    assert "binary data" in said


def test_a_heatmap_too_large_for_json_is_refused_unscored(bundle, monkeypatch):
    """Writing numbers in JSON holds up everybody else, too; as binary data the map is given."""
    monkeypatch.setattr(oip, "MOST_ELEMENTS", 3 * SIDE * SIDE)
    daemon = fake_daemon(bundle)
    before = daemon.session.ran
    four, three = (image(*map(encoded, FOUR[:n])) for n in (4, 3))
    for asked in ({"parameters": {"heatmap": True}}, {"outputs": [{"name": "heatmap"}]}):
        assert "binary_data" in refused(ask(daemon, four, **asked), 413)
    assert daemon.session.ran == before
    assert len(outputs(ask(daemon, three, outputs=[{"name": "heatmap"}]))["heatmap"])
    binary = {"name": "heatmap", "parameters": {"binary_data": True}}
    found = binary_outputs(ask(daemon, four, outputs=[binary]))
    assert len(found["heatmap"]) == 4 * 4 * SIDE * SIDE
    assert outputs(ask(daemon, four))
    daemon.models.close()


def test_strings_without_end_are_not_counted_to_the_end():
    """Of a tensor that holds more strings than it says, one more is read."""
    empty = struct.pack("<I", 0)
    assert len(oip.elements(memoryview(empty * 1000), 3)) == 4


def test_a_tensor_without_a_shape_is_refused(daemon):
    """An empty shape holds no number of images."""
    refused(ask(daemon, image(NORMAL, shape=[])), 400)
    refused(ask(daemon, pixels(FOUR, shape=[])), 400)


@pytest.mark.parametrize(
    "parameters",
    [
        {"timeout": 10**400},
        {"timeout": -(10**30)},
        {"timeout": True},
        {"alpha": 10**400},
        {"alpha": "much"},
        {"heatmap": 1},
        {"binary_data_output": "false"},
    ],
)
def test_a_parameter_of_the_wrong_kind_is_named(daemon, parameters):
    """However large, it is the client's mistake and no fault of the daemon."""
    assert next(iter(parameters)) in refused(
        ask(daemon, image(NORMAL), parameters=parameters), 400
    )


def test_whether_an_output_is_binary_is_true_or_false(daemon):
    """A text that says "false" is neither."""
    wanted = [{"name": "score", "parameters": {"binary_data": "false"}}]
    assert "binary_data" in refused(ask(daemon, image(NORMAL), outputs=wanted), 400)


def test_more_images_than_may_ever_wait_are_too_many(bundle):
    """To come again would not help, so it is not 503."""
    daemon = serve(bundle, queue_images=3)
    refused(ask(daemon, pixels(FOUR)), 413)
    assert outputs(ask(daemon, pixels(FOUR[:3])))
    daemon.models.close()


def test_a_small_body_needs_little_room_to_be_unpacked(bundle):
    """What it may unpack to is bounded by its own size as well."""
    daemon = serve(bundle, max_body_bytes=1 << 20, max_inflight_bytes=1 << 20)
    body = gzip.compress(json.dumps({"inputs": [image(NORMAL)]}).encode())
    answer = daemon.ask("POST", INFER, content=body, headers={"Content-Encoding": "gzip"})
    assert outputs(answer)
    daemon.models.close()
