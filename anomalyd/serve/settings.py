"""Settings of the daemon; flags, environment (`ANOMALYD_SERVE_*`) and TOML derive from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anomalyd.config import setting

__all__ = ["ServeSettings"]


@dataclass(frozen=True)
class ServeSettings:
    """What `anomalyd serve` can be told."""

    bundles: tuple[str, ...] = setting(
        ("trained",), help="bundles, or folders of bundles, to serve", flag=""
    )
    host: str = setting("127.0.0.1", help="address to listen on", metavar="ADDRESS")
    port: int = setting(8080, help="TCP port; 0 takes a free one", low=0, high=65535)
    grpc_port: int | None = setting(
        None, help="TCP port for gRPC, too; 0 takes a free one", low=0, high=65535
    )
    workers: int = setting(
        1, help="processes that share the socket, the CPUs and the limits", low=1, high=256
    )
    default_model: str | None = setting(
        None,
        help="model that /v1/score uses (default: the one that is served alone at the start)",
        metavar="NAME",
    )
    device: str = setting(
        "auto", help="where the models run", choices=("auto", "cpu", "cuda"), metavar="DEVICE"
    )
    threads: int | None = setting(
        None,
        help="CPU threads of one model, each for images of its own (default: the CPUs this "
        "process may use)",
        low=1,
    )
    max_body_bytes: int = setting(32 << 20, help="largest request body, bytes", low=1)
    max_inflight_bytes: int = setting(
        256 << 20, help="request bodies held in memory at one time, bytes", low=1
    )
    max_pixels: int = setting(25_000_000, help="largest image, pixels before resizing", low=1)
    max_images: int = setting(128, help="most images in one request", low=1)
    max_batch: int = setting(
        32, help="most images in one run of a model; two full ones may go on at a time", low=1
    )
    max_wait: float = setting(
        0.0, help="how long a lone image waits for company, seconds", low=0, high=10
    )
    queue_images: int = setting(
        512, help="images waiting for a model; more are refused with 503", low=1
    )
    queue_bytes: int = setting(256 << 20, help="decoded images waiting for a model, bytes", low=1)
    queue_wait: float = setting(
        0.1,
        help="a request that would be answered later, by the pace of the last runs, is refused at "
        "once with 503, seconds; a model that takes long has room for four images all the same",
        low=0,
    )
    body_timeout: float = setting(
        30.0, help="time that a client has to send its head and then its body, seconds", low=0.001
    )
    request_timeout: float = setting(
        30.0, help="longest wait for a model; later is refused with 503, seconds", low=0.001
    )
    watch: float = setting(
        0.0,
        help="look for new, changed and removed bundles this often, seconds; 0: on SIGHUP only",
        low=0,
    )
    repository_api: bool = setting(
        False, help="let tokens of the scope admin load and unload models over the API"
    )
    tokens: Path | None = setting(
        None, help="file of who may ask: NAME SCOPES SHA256-OF-TOKEN lines", metavar="FILE"
    )
    tls_cert: Path | None = setting(
        None, help="certificate chain to serve HTTPS with, PEM", metavar="FILE"
    )
    tls_key: Path | None = setting(None, help="its private key, PEM", metavar="FILE")
    log_format: str = setting("text", help="how the log is written", choices=("text", "json"))
    log_requests: bool = setting(False, help="log every request, not only failures")
    events: Path | None = setting(
        None, help="append a line of JSON for each outlier to this file", metavar="FILE"
    )
    keep_alive: int = setting(75, help="idle connections are closed after this, seconds", low=1)
    drain_delay: float = setting(
        0.0, help="how long to go on serving after SIGTERM, not ready any more, seconds", low=0
    )
    drain_timeout: int = setting(
        30, help="time that requests under way have to finish after that, seconds", low=0
    )
