"""The HTTP surface, on a real tiny bundle and on fakes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from daemons import (
    COLOUR,
    JPEG,
    NORMAL,
    OUTLIER,
    RANGE,
    check_problem,
    encoded,
    fake_daemon,
    serve,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import SIDE, draw, tiny_bundle

from anomalyd.detect.detector import Detector
from anomalyd.errors import UsageError
from anomalyd.images import to_pixels
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Models
from anomalyd.serve.openapi import OPENAPI


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One tiny bundle, written once."""
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def daemon(bundle):
    """One tiny model."""
    daemon = serve(bundle)
    yield daemon
    daemon.models.close()


@pytest.fixture
def pair(tmp_path):
    """Two tiny models, no default."""
    tiny_bundle(tmp_path, name="one")
    tiny_bundle(tmp_path, name="two")
    daemon = serve(tmp_path)
    yield daemon
    daemon.models.close()


@pytest.fixture
def fake(bundle):
    """A daemon over a FakeSession, with a queue of two images and batches of one."""
    daemon = fake_daemon(bundle, queue_images=2, max_batch=1)
    yield daemon
    daemon.session.open.set()
    daemon.models.close()


def test_one_image_gets_the_library_s_verdict(daemon, bundle):
    """The daemon answers what `Detector.score` says, whatever the Content-Type."""
    verdict = Detector.load(bundle, device="cpu", threads=1).score(OUTLIER)
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = daemon.score(OUTLIER, headers=headers)
        assert response.status_code == 200
        expected = {"index": 0, **verdict.to_dict()}
        assert response.json() == {"model": "tiny", "version": "1", "results": [expected]}
    assert verdict.outlier


def test_the_default_model(pair, tmp_path):
    """With several models and no default, /v1/score is 400 and lists their names."""
    response = pair.score(NORMAL)
    check_problem(response, 400, "no_default_model")
    assert "one, two" in response.json()["detail"]
    assert pair.score(NORMAL, "/v1/models/two/score").json()["model"] == "two"
    check_problem(pair.score(NORMAL, "/v1/models/three/score"), 404, "unknown_model")
    chosen = serve(tmp_path, default_model="two")
    assert chosen.score(NORMAL).json()["model"] == "two"
    chosen.models.close()


def test_the_default_model_does_not_change(tmp_path):
    """Once the one that was served alone at the start is gone, no other answers in its place."""
    path = tiny_bundle(tmp_path, name="one")
    daemon = serve(tmp_path)
    tiny_bundle(tmp_path, name="two")
    asyncio.run(daemon.control.refresh())
    assert daemon.score(NORMAL).json()["model"] == "one"
    path.rename(tmp_path / ".away")
    asyncio.run(daemon.control.refresh())
    check_problem(daemon.score(NORMAL), 400, "no_default_model")
    (tmp_path / ".away").rename(path)
    asyncio.run(daemon.control.refresh())
    assert daemon.score(NORMAL).json()["model"] == "one"
    daemon.models.close()


def test_bad_sets_of_models_are_refused(tmp_path):
    """Two bundles of one name, an unknown default: a UsageError that names them."""
    first = tiny_bundle(tmp_path / "a")
    second = tiny_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="two bundles are called tiny"):
        serve(first, second)
    with pytest.raises(UsageError, match="--default-model big: not served; there are tiny"):
        serve(first, default_model="big")


def test_a_bundle_named_twice_is_served_once(tmp_path):
    """A folder and a bundle inside it may both be given."""
    daemon = serve(tmp_path, tiny_bundle(tmp_path))
    assert list(daemon.models.by_name) == ["tiny"]
    daemon.models.close()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "empty"),
        (b"hello there", 415, "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "format"),
        (NORMAL[:45], 422, "corrupt"),
        (encoded(np.zeros((13, 57), np.uint8)), 422, "wrong_size"),
        (encoded(np.zeros((1, 40000), np.uint8)), 413, "too_many_pixels"),
    ],
)
def test_a_bad_image_is_a_typed_4xx(bundle, body, status, reason):
    """Each way an image can be bad has its status, is counted, and the daemon goes on."""
    daemon = serve(bundle, max_pixels=30000)
    check_problem(daemon.score(body), status, reason)
    assert daemon.score(NORMAL).status_code == 200
    assert daemon.metric("anomalyd_decode_errors_total", reason=reason) == 1
    daemon.models.close()


@pytest.fixture(scope="module")
def lasting(bundle):
    """One daemon for many examples."""
    daemon = serve(bundle, max_pixels=30000)
    yield daemon
    daemon.models.close()


@given(data=st.data())
def test_no_body_makes_it_fail(lasting, data):
    """Damaged images and arbitrary bytes, whole or as parts: 200 or a typed 4xx, never 500."""
    whole = data.draw(st.sampled_from([NORMAL, COLOUR, JPEG, b""]))
    cut = data.draw(st.integers(0, len(whole)))
    body = whole[:cut] + data.draw(st.binary(max_size=30)) + whole[cut + data.draw(RANGE) :]
    content_type = data.draw(st.sampled_from(["", "image/png", "multipart/form-data; boundary=x"]))
    response = lasting.score(body, headers={"Content-Type": content_type})
    if response.status_code != 200:
        check_problem(response, response.status_code)
        assert response.status_code in (400, 413, 415, 422)


def test_large_images_are_decoded_off_the_event_loop(daemon, monkeypatch):
    """Small ones are decoded on the loop's own thread, which costs no task."""
    threads = []

    def noted(image, spec, limits):
        pixels = to_pixels(image, spec, limits)
        threads.append(threading.current_thread())
        return pixels

    monkeypatch.setattr("anomalyd.serve.scoring.to_pixels", noted)
    for side in (SIDE, 800):
        response = daemon.score(encoded(np.zeros((side, side), np.uint8)))
        assert response.status_code == 200
    small, large = threads  # asyncio.run runs the loop on this one
    assert small is threading.current_thread()
    assert large is not small


def test_a_body_over_the_limit_is_413(bundle):
    """The limit is on the bytes that arrive, declared or not."""
    daemon = serve(bundle, max_body_bytes=100)

    async def stream():
        for _ in range(11):
            yield b"x" * 10

    check_problem(daemon.score(b"x" * 101), 413, "too_many_bytes")
    check_problem(daemon.score(stream()), 413, "too_many_bytes")
    assert daemon.metric("anomalyd_rejected_total", reason="too_large") == 2
    daemon.models.close()


@pytest.mark.parametrize(
    "query",
    [
        "alpha=0.000000001",
        "alpha=0",
        "alpha=1.5",
        "alpha=nan",
        "alpha=",
        "alpha=many",
        "alpha=0.1&alpha=0.2",
        "aplha=0.1",
        "heatmap=yes",
        "explain=2",
    ],
)
def test_a_bad_parameter_is_400(daemon, query):
    """Unknown, repeated, malformed or unreachable: never ignored."""
    check_problem(daemon.score(NORMAL, f"/v1/score?{query}"), 400)


def test_alpha_moves_the_threshold(daemon):
    """The verdict is p <= alpha at the alpha asked for."""
    image = encoded(draw(1, seed=3)[0])
    p_value = daemon.score(image).json()["results"][0]["p_value"]
    result = daemon.score(image, f"/v1/score?alpha={p_value}").json()["results"][0]
    assert (result["alpha"], result["outlier"]) == (p_value, True)


def test_each_of_many_alphas_is_its_own(daemon):
    """Requests of different alphas that share a batch are decided at their own."""
    alphas = [0.01, 0.1, 0.5, 0.99]

    async def scenario():
        asked = (daemon.send("POST", f"/v1/score?alpha={a}", content=NORMAL) for a in alphas)
        return await asyncio.gather(*asked)

    answers = [response.json()["results"][0] for response in asyncio.run(scenario())]
    assert [answer["alpha"] for answer in answers] == alphas
    assert all(answer["outlier"] == (answer["p_value"] <= answer["alpha"]) for answer in answers)


def test_heatmap_and_explanation(daemon):
    """?heatmap=1 adds a PNG, ?explain=1 each statistic, marked diagnostic."""
    result = daemon.score(OUTLIER, "/v1/score?heatmap=1&explain=true").json()["results"][0]
    picture = Image.open(io.BytesIO(base64.b64decode(result["heatmap"])))
    assert picture.format == "PNG"
    assert set(result["explain"]) == {"max_pixel_nll", "mean_intensity"}
    assert all(entry["diagnostic"] is True for entry in result["explain"].values())


def test_no_map_is_400(daemon):
    """A bundle without a per-pixel map says so."""
    model = daemon.models.find(None)
    outputs = dict(model.detector.manifest.outputs)
    del outputs["nll_map"]
    detector = model.detector
    detector.manifest = replace(detector.manifest, outputs=outputs)
    check_problem(daemon.score(NORMAL, "/v1/score?heatmap=1"), 400, "no_map")


def many(*images):
    return [("image", (f"{i}.png", image)) for i, image in enumerate(images)]


def test_many_images_in_order(daemon):
    """Multipart: one result a part, in order, files and fields alike."""
    response = daemon.ask("POST", "/v1/score", files=many(OUTLIER, NORMAL, OUTLIER))
    results = response.json()["results"]
    assert [result["index"] for result in results] == [0, 1, 2]
    assert [result["outlier"] for result in results] == [True, False, True]


def test_one_bad_image_of_many_fails_alone(daemon):
    """The others are scored; the bad one has its index and error only."""
    response = daemon.ask("POST", "/v1/score", files=many(NORMAL, NORMAL[:45], b"", NORMAL))
    assert response.status_code == 200
    first, second, third, fourth = response.json()["results"]
    assert set(second) == set(third) == {"index", "error"}
    assert first["p_value"] == fourth["p_value"]


def test_many_images_all_bad(daemon):
    """A request of many is 200 even then."""
    response = daemon.ask("POST", "/v1/score", files=many(b"a", b"b"))
    assert response.status_code == 200
    assert all("error" in result for result in response.json()["results"])


def test_one_image_as_multipart(daemon):
    """A single part is one image: its error is the request's."""
    check_problem(daemon.ask("POST", "/v1/score", files=many(b"text")), 415, "format")


def test_bad_multipart(bundle):
    """No part, broken, too many parts."""
    daemon = serve(bundle, max_images=2)
    headers = {"Content-Type": "multipart/form-data; boundary=xx"}
    check_problem(daemon.score(b"--xx--\r\n", headers=headers), 400)
    check_problem(daemon.score(b"--xx\r\nbroken", headers=headers), 400, "multipart")
    check_problem(daemon.ask("POST", "/v1/score", files=many(b"", b"", b"")), 413)
    daemon.models.close()


def test_overload_is_503_with_retry_after(fake):
    """What does not fit into the queue is refused at once; what fits is answered."""

    async def scenario():
        fake.session.open.clear()
        first = asyncio.ensure_future(fake.send("POST", "/v1/score", content=NORMAL))
        while fake.batcher.depth or not fake.batcher._running:
            await asyncio.sleep(0.001)
        waiting = [
            asyncio.ensure_future(fake.send("POST", "/v1/score", content=NORMAL)) for _ in range(2)
        ]
        while fake.batcher.depth < 2:
            await asyncio.sleep(0.001)
        refused = await fake.send("POST", "/v1/score", content=NORMAL)
        metrics = await fake.send("GET", "/metrics")
        fake.session.open.set()
        return refused, metrics, await asyncio.gather(first, *waiting)

    refused, metrics, answered = asyncio.run(scenario())
    check_problem(refused, 503, "queue_full")
    assert refused.headers["retry-after"] == "1"
    assert [response.status_code for response in answered] == [200, 200, 200]
    assert 'anomalyd_queue_depth{model="tiny",version="1"} 2.0' in metrics.text
    assert 'anomalyd_queue_capacity{model="tiny",version="1"} 2.0' in metrics.text
    assert fake.metric("anomalyd_rejected_total", reason="queue_full") == 1


def test_a_client_that_leaves_the_queue_costs_no_run(fake):
    """Work of a client that closed its connection while waiting is dropped."""

    async def scenario():
        fake.session.open.clear()
        first = asyncio.ensure_future(fake.send("POST", "/v1/score", content=NORMAL))
        while fake.batcher.depth or not fake.batcher._running:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(fake.send("POST", "/v1/score", content=NORMAL))
        while fake.batcher.depth < 1:
            await asyncio.sleep(0.001)
        left = asyncio.Event()
        sent = []
        messages = [{"type": "http.request", "body": NORMAL, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/score",
            "root_path": "",
            "query_string": b"",
            "headers": [],
        }
        third = asyncio.ensure_future(fake.app(scope, receive, send))
        while fake.batcher.depth < 2:
            await asyncio.sleep(0.001)
        left.set()
        await third
        assert fake.batcher.depth == 1
        fake.session.open.set()
        await asyncio.gather(first, second)
        return sent

    ran_before = fake.session.ran
    assert asyncio.run(scenario()) == []
    assert fake.session.ran == ran_before + 2
    assert fake.metric("anomalyd_requests_total", code="499") == 1


def test_a_failing_model_is_500_and_the_daemon_goes_on(fake, caplog):
    """The answer says nothing of the inside; the log does."""
    fake.session.broken = True
    response = fake.score(NORMAL)
    check_problem(response, 500)
    assert "fire" not in response.text
    assert "on fire" in caplog.text
    fake.session.broken = False
    assert fake.score(NORMAL).status_code == 200


@pytest.mark.parametrize("floor", [-np.inf, np.inf, np.nan, -1e300])
def test_json_holds_no_nan(fake, floor):
    """Whatever the graph gives, the answer is strict JSON and the metrics stay finite."""

    def refuse(constant):
        raise AssertionError(constant)

    fake.session.floor = floor
    response = fake.score(NORMAL, "/v1/score?explain=1")
    assert response.status_code == 200
    result = json.loads(response.text, parse_constant=refuse)["results"][0]
    assert 0 < result["p_value"] <= 1
    assert np.isfinite(fake.metric("anomalyd_bpd_sum"))


def test_models_are_listed(pair):
    """GET /v1/models says what each takes and promises."""
    content = pair.ask("GET", "/v1/models").json()
    assert content["default"] is None
    assert [model["name"] for model in content["models"]] == ["one", "two"]
    assert content["models"][0]["image"]["height"] == SIDE
    assert content["models"][0]["guarantee"]["kind"] == "marginal"


def test_probes(daemon):
    """/livez is always 200; /readyz follows the models and turns 503 on shutdown."""
    assert daemon.ask("GET", "/readyz").status_code == 200
    assert daemon.metric("anomalyd_model_ready", model="tiny") == 1
    daemon.models.ready = False
    assert daemon.ask("GET", "/readyz").status_code == 503
    assert daemon.ask("GET", "/livez").status_code == 200
    assert daemon.metric("anomalyd_model_ready", model="tiny") == 0


def test_no_model_is_not_ready():
    """A daemon without models never says that it is ready."""
    models = Models([], metrics=Metrics())
    models.ready = True
    assert not models.ready


def test_the_page(daemon):
    """It is one file that loads nothing from elsewhere."""
    response = daemon.ask("GET", "/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http:" not in response.text
    assert "https:" not in response.text


def test_openapi_describes_every_route(daemon):
    """The description and the router know the same paths."""
    assert daemon.ask("GET", "/openapi.json").json() == json.loads(json.dumps(OPENAPI))
    routes = {route.path: route.methods - {"HEAD"} for route in daemon.app.router.routes}
    described = {
        path: {method.upper() for method in operations if method != "parameters"}
        for path, operations in OPENAPI["paths"].items()
    }
    assert described == routes


def test_wrong_paths_and_methods(daemon):
    """404 and 405 are problem details, too; HEAD works where GET does."""
    check_problem(daemon.ask("GET", "/nothing"), 404)
    response = daemon.ask("GET", "/v1/score")
    check_problem(response, 405)
    assert response.headers["allow"] == "POST"
    assert daemon.ask("HEAD", "/livez").status_code == 200


def test_requests_are_counted_by_route(daemon):
    """Labels are patterns and statuses; paths that a client makes up add none."""
    daemon.score(NORMAL, "/v1/models/tiny/score")
    daemon.score(NORMAL, "/v1/models/made-up/score")
    daemon.ask("GET", "/made/up")
    requests = "anomalyd_requests_total"
    route = "/v1/models/{name}/score"
    assert daemon.metric(requests, route=route, code="200") == 1
    assert daemon.metric(requests, route=route, code="404") == 1
    assert daemon.metric(requests, route="unmatched", code="404") == 1
    assert "made" not in daemon.ask("GET", "/metrics").text


def test_verdicts_are_counted(daemon):
    """Images, p-values and bits/dim by model."""
    daemon.ask("POST", "/v1/score", files=many(OUTLIER, NORMAL, OUTLIER))
    assert daemon.metric("anomalyd_images_total", verdict="outlier") == 2
    assert daemon.metric("anomalyd_images_total", verdict="normal") == 1
    assert daemon.metric("anomalyd_p_value_count", model="tiny") == 3
    assert daemon.metric("anomalyd_p_value_bucket", le="0.01") == 2
    assert daemon.metric("anomalyd_batch_size_sum") == 3
    assert daemon.metric("anomalyd_model_info", model="tiny", version="1") == 1
