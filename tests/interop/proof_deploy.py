"""The deployment kit under the linters, validators and engines that others made."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from harness import (
    CLIENTS,
    DEPLOY,
    IMAGES,
    TRAINED,
    as_root,
    daemon,
    environment,
    free_port,
    run,
    tool,
)

PREFIX = Path("/opt/anomalyd")
PROMETHEUS = DEPLOY / "prometheus"


@pytest.fixture(scope="session")
def installed() -> Path:
    """The serving half where the systemd unit expects it, by the script that the image runs."""
    as_root()
    shutil.rmtree(PREFIX, ignore_errors=True)
    run(DEPLOY / "install.sh", PREFIX, "cpu", timeout=600)
    return PREFIX


@pytest.mark.by("hadolint")
def test_dockerfile():
    """hadolint finds nothing in the Dockerfile."""
    done = run(environment("tools", "hadolint"), DEPLOY / "Dockerfile")

    assert done.stdout == ""


@pytest.mark.by("shellcheck")
def test_script():
    """shellcheck finds nothing in install.sh."""
    run(tool("shellcheck"), DEPLOY / "install.sh")


@pytest.mark.by("check-jsonschema (compose-spec)")
def test_compose():
    """The compose file follows the Compose specification."""
    check = environment("tools", "check-jsonschema")
    run(check, "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


@pytest.mark.by("kubernetes-validate")
def test_manifests(record_property):
    """Every manifest follows the schemas of Kubernetes, strictly."""
    manifest = DEPLOY / "kubernetes" / "anomalyd.yaml"
    done = run(environment("tools", "kubernetes-validate"), "--strict", manifest)
    kinds = re.findall(r"passed for resource (\w+)/", done.stdout + done.stderr)

    assert {"deployment", "poddisruptionbudget", "horizontalpodautoscaler"} <= set(kinds)
    record_property("measured", ", ".join(kinds))


@pytest.mark.by("kserve SDK")
def test_serving_runtime():
    """KServe's own models read the ServingRuntime and the InferenceService back as written."""
    manifest = DEPLOY / "kubernetes" / "kserve.yaml"
    run(environment("kserve"), CLIENTS / "kserve_manifests.py", manifest)


@pytest.mark.by("promtool")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
    ],
    ids=" ".join,
)
def test_prometheus_files(command, record_property):
    """promtool accepts configuration and rules, and the rules' unit tests pass."""
    run(tool("promtool"), *command, cwd=PROMETHEUS)
    record_property("measured", " ".join(command))


@pytest.mark.by("pip, du")
def test_installed_size(installed, record_property):
    """install.sh installs the serving half alone: neither torch nor pip."""
    packages = next(installed.glob("lib/python3*/site-packages"))
    there = {path.name for path in packages.iterdir()}
    size = run("du", "-sm", installed).stdout.split()[0]

    assert "anomalyd" in there
    assert not there & {"torch", "onnx", "scipy", "sklearn", "matplotlib", "pip"}
    record_property("measured", f"{size} MiB")


@pytest.mark.by("systemd-analyze")
def test_unit(installed, tmp_path, record_property):
    """systemd accepts the units, and finds little that the service is exposed to."""
    analyze = tool("systemd-analyze")
    units = sorted((DEPLOY / "systemd").glob("anomalyd.*e*"))
    units = [unit for unit in units if unit.suffix in (".service", ".socket")]
    done = run(analyze, "verify", *units)
    security = run(analyze, "security", "--offline=true", "--threshold=20", units[0])

    assert not re.search(r"anomalyd\.\w+:", done.stderr), done.stderr
    exposure = re.search(r"exposure level for anomalyd.service: (\S+ \w+)", security.stdout)
    assert exposure is not None
    record_property("measured", f"exposure {exposure[1]}")


@pytest.mark.by("Linux namespaces, setpriv, prctl")
def test_locked_down(installed, record_property):
    """It serves as an unprivileged user on a read-only root, without any capability, with no
    memory both writable and executable, as container and unit have it."""
    base = subprocess.run(
        [installed / "bin" / "python", "-c", "import sys; print(sys.base_prefix)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        shutil.copytree(TRAINED / "fashion-mnist-vae", place / "models" / "fashion-mnist-vae")
        shutil.copy(IMAGES / "boot.png", place)
        for path in [*place.rglob("*"), *(CLIENTS / n for n in ("locked.sh", "in_locked.py"))]:
            if path.parent == CLIENTS:
                path = Path(shutil.copy(path, place))
            path.chmod(0o755)
        done = run(
            *(tool("unshare"), "--mount", "--net", "--pid", "--fork", "--kill-child"),
            *("sh", place / "locked.sh", base),
            *(installed / "bin" / "python", place / "in_locked.py", installed, place),
            timeout=120,
            cwd="/",
        )
    found = json.loads(done.stdout.splitlines()[-1])

    assert Path("/proc/mounts").read_text(encoding="utf-8") == mounts  # this machine's own
    assert found["result"]["outlier"] is False
    assert found["user"] == 10001
    assert found["capabilities"] == 0
    assert found["writable"] == []
    assert found["exit"] == 0
    record_property("measured", f"{found['memory'] / 2**20:.0f} MiB")


class Prometheus:
    """A real Prometheus that scrapes one daemon every second."""

    def __init__(self, target: int, folder: Path) -> None:
        text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
        text = re.sub(r"(_interval): \d+s", r"\1: 1s", text).replace(":8080", f":{target}")
        (folder / "prometheus.yml").write_text(text, encoding="utf-8")
        shutil.copy(PROMETHEUS / "rules.yml", folder)
        self.port = free_port()
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stderr=self.log,
        )

    def get(self, path: str, **query: str) -> dict:
        address = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list:
        return self.get("/api/v1/query", query=expression)["result"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A Prometheus that has watched a daemon under some traffic, good and bad."""
    folder = tmp_path_factory.mktemp("prometheus")
    images = [path.read_bytes() for path in sorted(IMAGES.glob("*.png"))]
    with daemon(TRAINED / "fashion-mnist-vae") as running:
        prometheus = Prometheus(running.port, folder)
        try:
            until, alive = time.monotonic() + 60, 0
            while alive < 8 and time.monotonic() < until:
                for image in images:
                    running.ask("POST", "/v1/score", image)
                running.ask("POST", "/v1/score", images[0][:60])
                too_much = {"Content-Length": str(1 << 40), "Expect": "100-continue"}
                running.ask("POST", "/v1/score", b"", too_much)
                time.sleep(0.5)
                try:
                    up = prometheus.query("count_over_time(up[1m])")
                    alive = int(up[0]["value"][1]) if up else 0
                except OSError:
                    continue
            yield prometheus
        finally:
            prometheus.close()


@pytest.mark.by("prometheus")
def test_a_real_prometheus_scrapes(scraped, record_property):
    """Prometheus scrapes the daemon, and answers how many images were judged."""
    targets = scraped.get("/api/v1/targets")["activeTargets"]
    (judged,) = scraped.query("sum(anomalyd_images_total)")

    assert [target["health"] for target in targets] == ["up"]
    assert float(judged["value"][1]) > 0
    record_property("measured", f"{judged['value'][1]} images")


@pytest.mark.by("prometheus")
def test_every_panel_has_data(scraped, record_property):
    """Every query of the Grafana dashboard gives data."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    variables = {"$job": "anomalyd", "$model": ".*", "$__rate_interval": "30s"}
    empty, asked = [], 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(name, value)
            asked += 1
            if not scraped.query(expression):
                empty.append((panel["title"], expression))

    assert empty == []
    record_property("measured", f"{asked} queries")


@pytest.mark.by("prometheus")
def test_every_rule_is_evaluated(scraped, record_property):
    """Prometheus evaluates every rule without an error, and none fires on a healthy daemon."""
    groups = scraped.get("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]

    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    record_property("measured", f"{len(rules)} rules")


@pytest.mark.by("promtool")
def test_metrics_are_lint_free(served):
    """promtool finds nothing in what a daemon exposes."""
    served.score((IMAGES / "boot.png").read_bytes())
    metrics = served.ask("GET", "/metrics")[1].decode()
    done = run(tool("promtool"), "check", "metrics", input=metrics)

    assert done.stdout + done.stderr == ""


@pytest.mark.by("sd_notify protocol")
def test_service_manager_is_told(tmp_path):
    """Type=notify: READY=1 comes when models are loaded, STOPPING=1 when SIGTERM came."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        with daemon(
            TRAINED / "fashion-mnist-vae", environment={"NOTIFY_SOCKET": address}, wait=False
        ) as running:
            first = manager.recv(4096).decode()
            assert "READY=1" in first
            assert running.is_ready()
            stopping = threading.Thread(target=running.stop)
            stopping.start()
            told = manager.recv(4096).decode()
            stopping.join()
    assert "STOPPING=1" in told
