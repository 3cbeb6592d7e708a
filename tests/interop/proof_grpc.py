"""The Open Inference Protocol over gRPC, by the stubs that other projects made of it."""

from __future__ import annotations

import pytest
from harness import CLASSES, PATHS, TRAINED, VAE, client, daemon, same, same_classes


@pytest.fixture(scope="module")
def called():
    """A daemon with gRPC beside HTTP."""
    with daemon(TRAINED / VAE, TRAINED / CLASSES, grpc=True, default_model=VAE) as running:
        yield running


def by_triton(called, model):
    addresses = f"127.0.0.1:{called.port}", f"127.0.0.1:{called.grpc_port}"
    return client("triton", "triton.py", *addresses, model, *PATHS)


@pytest.mark.by("tritonclient grpc")
def test_triton_over_grpc(called, expected):
    """tritonclient over gRPC gets the same scores, metadata, index and statistics."""
    found = by_triton(called, VAE)
    same(found["grpc image"], expected[VAE])
    same(found["grpc all outputs"], expected[VAE])
    same(found["grpc pixels"], found["http pixels binary"])
    assert found["grpc metadata"]["name"] == VAE
    assert found["grpc config"]["config"]["max_batch_size"] == found["config"]["max_batch_size"]
    assert {row["name"] for row in found["grpc index"]["models"]} == {VAE, CLASSES}
    assert int(found["grpc statistics"]["model_stats"][0]["inference_count"]) > 0


@pytest.mark.by("tritonclient grpc")
def test_triton_reads_classes_over_grpc(called, expected):
    """tritonclient over gRPC reads labels and posteriors of a model with classes."""
    found = by_triton(called, CLASSES)
    same_classes(found["grpc all outputs"], expected[CLASSES])
    assert found["errors"]["grpc model"] == "StatusCode.NOT_FOUND"


@pytest.mark.by("grpcio-health-checking, grpcio-reflection")
def test_grpc_health_and_reflection(called, record_property):
    """grpc.health.v1 says SERVING, and reflection describes the service."""
    found = client("triton", "health.py", f"127.0.0.1:{called.grpc_port}")

    assert found["health"] == 1
    assert {"grpc.health.v1.Health", "inference.GRPCInferenceService"} <= set(found["services"])
    assert {"ServerLive", "ServerReady", "ModelReady", "ModelInfer"} <= set(found["methods"])
    record_property("measured", f"{len(found['methods'])} methods")


@pytest.mark.by("kserve client")
def test_kserve_over_grpc(called, expected):
    """KServe's gRPC client gets the daemon's own scores, and reads its health."""
    address = f"127.0.0.1:{called.grpc_port}"
    found = client("kserve", "kserve_client.py", called.url, address, VAE, PATHS[0])

    assert all(found[key] for key in found if key.endswith(("live", "ready")))
    same(found["grpc"], {name: column[:1] for name, column in expected[VAE].items()})
