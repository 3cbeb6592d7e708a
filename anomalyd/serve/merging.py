"""The metrics of several processes as those of one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:
    from anomalyd.serve.metrics import Samples
    from anomalyd.serve.models import Key

__all__ = ["Family", "counted", "exposition", "families", "merged", "of_versions", "samples"]

Family = dict[str, Any]
"""A family as JSON: name, type, documentation and [sample name, labels, value] rows."""

# Gauges that say the same in every process.
LARGEST = {
    "anomalyd_build_info",
    "anomalyd_last_inference_timestamp_seconds",
    "anomalyd_model_alpha",
    "anomalyd_model_calibration_images",
    "anomalyd_model_created_timestamp_seconds",
    "anomalyd_model_info",
    "anomalyd_model_load_duration_seconds",
}
SMALLEST = {"anomalyd_model_ready", "anomalyd_ready", "process_start_time_seconds"}
# All other gauges are shares of a whole.


def families(registry: CollectorRegistry) -> list[Family]:
    """Everything in a registry."""
    return [
        {
            "name": family.name,
            "type": family.type,
            "documentation": family.documentation,
            "samples": [[sample.name, sample.labels, sample.value] for sample in family.samples],
        }
        for family in registry.collect()
    ]


def merged(processes: Iterable[Sequence[Family]]) -> list[Family]:
    """One family of each name, its samples put together."""
    found: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for process in processes:
        for family in process:
            name = family["name"]
            found.setdefault(name, family)
            rows = values.setdefault(name, {})
            for sample, labels, value in family["samples"]:
                key = (sample, tuple(labels.items()))
                if key not in rows:
                    rows[key] = value
                elif name in LARGEST:
                    rows[key] = max(rows[key], value)
                elif name in SMALLEST:
                    rows[key] = min(rows[key], value)
                else:
                    rows[key] += value
    return [
        {
            **family,
            "samples": [
                [sample, dict(labels), value] for (sample, labels), value in values[name].items()
            ],
        }
        for name, family in found.items()
    ]


def counted(process: Sequence[Family]) -> list[Family]:
    """What stays true of a process that has ended: its counts, and no state."""
    return [family for family in process if family["type"] in ("counter", "histogram")]


def of_versions(process: Sequence[Family], keys: Collection[Key]) -> list[Family]:
    """What is not about a version of a model, or about one of these."""
    served = {(key.name, key.version) for key in keys}
    return [
        {
            **family,
            "samples": [
                [name, labels, value]
                for name, labels, value in family["samples"]
                if "model" not in labels or (labels["model"], labels["version"]) in served
            ],
        }
        for family in process
    ]


def exposition(process: Sequence[Family], accept: str) -> tuple[bytes, str]:
    """Families in the format that an Accept header asks for, with its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(_Collected(process)), content_type


def samples(process: Sequence[Family]) -> Samples:
    """Name and labels of each sample -> its value."""
    return {
        (sample, frozenset(labels.items())): value
        for family in process
        for sample, labels, value in family["samples"]
    }


class _Collected:
    """What an encoder needs of a registry."""

    def __init__(self, process: Sequence[Family]) -> None:
        self._process = process

    def collect(self) -> Iterable[Metric]:
        for family in self._process:
            metric = Metric(family["name"], family["documentation"], family["type"])
            for name, labels, value in family["samples"]:
                metric.add_sample(name, labels, value)
            yield metric
