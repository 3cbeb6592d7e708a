"""What the statistics extension says of a model, drawn from the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalyd.serve.metrics import Samples
    from anomalyd.serve.models import Key

__all__ = ["model_statistics"]

STAGES = {
    "queue": ("queue",),
    "compute_input": ("decode",),
    "compute_infer": ("infer", "judge"),
    "compute_output": ("render",),
}


def model_statistics(key: Key, samples: Samples) -> dict[str, Any]:
    """Counts and total times of one version since it is served.

    Decoding and waiting are counted by image, inference, the judgement included, by batch and
    rendering by request; a success takes the sum of the four.
    """

    def value(name: str, **more: str) -> float:
        labels = {"model": key.name, "version": key.version, **more}
        return samples.get((name, frozenset(labels.items())), 0.0)

    stages = {
        name: {
            "count": int(value("anomalyd_stage_duration_seconds_count", stage=parts[0])),
            "ns": int(
                1e9
                * sum(value("anomalyd_stage_duration_seconds_sum", stage=part) for part in parts)
            ),
        }
        for name, parts in STAGES.items()
    }
    requests = "anomalyd_inference_requests_total"
    none = {"count": 0, "ns": 0}
    return {
        "name": key.name,
        "version": key.version,
        "last_inference": int(1e3 * value("anomalyd_last_inference_timestamp_seconds")),
        "inference_count": int(value("anomalyd_batch_size_sum")),
        "execution_count": int(value("anomalyd_batch_size_count")),
        "inference_stats": {
            "success": {
                "count": int(value(requests, outcome="success")),
                "ns": sum(stage["ns"] for stage in stages.values()),
            },
            "fail": {"count": int(value(requests, outcome="fail")), "ns": 0},
            **stages,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [],
    }
