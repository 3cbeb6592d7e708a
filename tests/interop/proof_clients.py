"""The Open Inference Protocol as other projects' clients speak it."""

from __future__ import annotations

import base64
import json

import pytest
from harness import CLASSES, CLIENTS, PATHS, VAE, client, environment, run, same, same_classes


@pytest.fixture(scope="module")
def by_triton(served):
    return client("triton", "triton.py", f"127.0.0.1:{served.port}", "-", VAE, *PATHS)


@pytest.mark.by("tritonclient http")
def test_triton_over_http(by_triton, expected, record_property):
    """tritonclient over HTTP gets the daemon's own scores, with binary tensors and with JSON,
    compressed, and by version."""
    keys = [key for key in by_triton if key.startswith(("http image", "http version"))]
    for key in keys:
        same(by_triton[key], expected[VAE])
    assert by_triton["http pixels binary"] == by_triton["http pixels JSON"]
    assert by_triton["http id"] == "mine"
    assert len(keys) >= 5
    record_property("measured", f"{len(keys)} forms of one request")


@pytest.mark.by("tritonclient http")
def test_triton_reads_metadata(by_triton):
    """tritonclient reads server and model metadata, configuration, index and statistics."""
    assert {"binary_tensor_data", "statistics"} <= set(by_triton["server"]["extensions"])
    assert by_triton["metadata"]["name"] == VAE
    assert by_triton["config"]["max_batch_size"] > 0
    assert {row["name"]: row["state"] for row in by_triton["index"]}[VAE] == "READY"
    (stats,) = by_triton["statistics"]["model_stats"]
    assert stats["inference_count"] > 0
    assert stats["inference_stats"]["success"]["count"] > 0


@pytest.mark.by("tritonclient http")
def test_triton_gets_typed_errors(by_triton):
    """tritonclient is told the kind of error: no model, no version, a bad image, no leave."""
    errors = by_triton["errors"]

    assert errors["model"].startswith("404")
    assert errors["version"].startswith("404")
    assert errors["image"].startswith("422")
    assert errors["load"].startswith(("401", "403"))


@pytest.mark.by("tritonclient http")
def test_triton_reads_classes(served, expected):
    """tritonclient reads labels and posteriors of a model with classes."""
    found = client("triton", "triton.py", f"127.0.0.1:{served.port}", "-", CLASSES, *PATHS)
    same_classes(found["http image binary"], expected[CLASSES])


@pytest.mark.by("kserve client")
def test_kserve(served, expected):
    """KServe's REST client gets the daemon's own scores, and reads its health."""
    found = client("kserve", "kserve_client.py", served.url, "-", VAE, PATHS[0])

    first = {name: column[:1] for name, column in expected[VAE].items()}
    assert all(found[key] for key in found if key.endswith(("live", "ready")))
    for key in ("rest binary", "rest binary outputs"):
        same(found[key], first)
    assert found["rest id"] == "mine"


def request(path):
    """An image as a request of one JSON line."""
    data = [base64.b64encode(path.read_bytes()).decode()]
    return {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": data}]}


@pytest.mark.by("mlserver infer")
def test_mlserver_infer(served, expected, tmp_path, record_property):
    """`mlserver infer` scores a file of requests, each answer the daemon's own."""
    rounds = 20
    lines = [json.dumps(request(path)) for path in PATHS] * rounds
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run(
        *(environment("mlserver", "mlserver"), "infer", "--url", f"127.0.0.1:{served.port}"),
        *("--model-name", VAE, "--input-data-path", tmp_path / "in.jsonl"),
        *("--output-data-path", tmp_path / "out.jsonl", "--workers", "4"),
    )
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line) for line in written.splitlines()]
    found = [
        {output["name"]: output["data"][0] for output in answer["outputs"]} for answer in answers
    ]

    assert len(found) == len(lines)
    scores = sorted(round(row["score"], 4) for row in found)
    assert scores == sorted(round(score, 4) for score in expected[VAE]["score"] * rounds)
    record_property("measured", f"{len(found)} answers")


@pytest.mark.by("mlserver.types (pydantic)")
def test_mlserver_types(served):
    """MLServer's pydantic models accept every answer as it stands."""
    answers = {
        "InferenceResponse": served.ask(
            "POST", f"/v2/models/{VAE}/infer", json.dumps(request(PATHS[0])).encode()
        ),
        "InferenceResponse with classes": served.ask(
            "POST", f"/v2/models/{CLASSES}/infer", json.dumps(request(PATHS[0])).encode()
        ),
        "MetadataServerResponse": served.ask("GET", "/v2"),
        "MetadataModelResponse": served.ask("GET", f"/v2/models/{VAE}"),
        "RepositoryIndexResponse": served.ask("POST", "/v2/repository/index", b"{}"),
        "InferenceErrorResponse": served.ask("GET", "/v2/models/nobody"),
    }
    content = {name: json.loads(answer) for name, (_, answer) in answers.items()}
    script = CLIENTS / "mlserver_types.py"
    run(environment("mlserver"), script, input=json.dumps(content))
