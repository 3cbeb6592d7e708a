"""The deployment kit against the daemon that it deploys; what needs other tools is in interop/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest
from required import missing

from anomalyd.config import load
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.settings import ServeSettings

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = (DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8")
RULE_TESTS = (DEPLOY / "prometheus" / "rules_test.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file() and path.suffix != ".json"
}
METRIC = re.compile(r"\b(anomalyd_[a-z_]+|process_[a-z_]+)\b")


def exported() -> set[str]:
    """Every name that the daemon's metrics may have in a query."""
    names = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


def test_every_query_asks_for_a_metric_that_there_is():
    """No alert and no panel looks at a name that the daemon does not export."""
    expressions = re.sub(r"(?m)^\s*(summary|description):.*(\n\s{12}.*)*", "", RULES)
    asked = set(METRIC.findall(" ".join([expressions, *QUERIES])))

    assert asked - exported() == set()
    assert len(asked) >= 15


def test_every_recorded_series_in_the_dashboard_is_recorded():
    """Panels that show recorded series follow the rules' names."""
    recorded = set(re.findall(r"record: (\S+)", RULES))
    asked = set(re.findall(r"anomalyd:[a-z_:0-9]+", " ".join(QUERIES)))

    assert asked <= recorded
    assert asked


def test_every_alert_has_a_unit_test_that_fires():
    """rules_test.yml names each alert, and expects it at least once."""
    alerts = re.findall(r"alert: (\w+)", RULES)
    fired = re.findall(r"alertname: (\w+)\n\s+eval_time: \S+\n\s+exp_alerts:\n", RULE_TESTS)

    assert set(fired) == set(alerts)


@pytest.mark.parametrize(
    "command", [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]]
)
def test_promtool_accepts_the_rules(command):
    """`promtool check rules` and `promtool test rules` pass (Debian package: prometheus)."""
    promtool = shutil.which("promtool")
    if promtool is None:
        missing("promtool")
    done = subprocess.run(
        [promtool, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_are_told_apart_and_do_not_overlap():
    """Ids are unique, every panel says what it shows, and each has its own place in the grid."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert all(panel["title"] and panel["description"] for panel in PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in PANELS) == 24


def test_every_panel_uses_the_chosen_data_source():
    """A dashboard that is imported elsewhere finds the Prometheus of that place."""
    sources = [panel["datasource"]["uid"] for panel in PANELS]
    sources += [target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]]

    assert set(sources) == {"${datasource}"}


def test_every_setting_in_the_kit_is_one_of_the_daemon():
    """Variables in containers and manifests, and the keys of the TOML file, are settings."""
    named = re.findall(r"ANOMALYD_SERVE_(\w+)", " ".join(TEXTS.values()))
    settings = load(ServeSettings, flags={}, file=DEPLOY / "systemd" / "anomalyd.toml")

    assert {name.lower() for name in named} <= {field.name for field in fields(ServeSettings)}
    assert named
    assert settings.drain_delay > 0


def test_nobody_is_killed_while_it_drains():
    """systemd, Kubernetes and compose wait for longer than the drain may take."""
    toml = tomllib.loads(TEXTS[DEPLOY / "systemd" / "anomalyd.toml"])
    unit = TEXTS[DEPLOY / "systemd" / "anomalyd.service"]
    manifest = TEXTS[DEPLOY / "kubernetes" / "anomalyd.yaml"]
    compose = TEXTS[DEPLOY / "compose.yaml"]
    most = ServeSettings().drain_timeout

    assert number(r"TimeoutStopSec=(\d+)", unit) > toml["drain_delay"] + toml["drain_timeout"]
    assert number(r"terminationGracePeriodSeconds: (\d+)", manifest) > number(
        r'DRAIN_DELAY, value: "(\d+)"', manifest
    ) + number(r'DRAIN_TIMEOUT, value: "(\d+)"', manifest)
    assert number(r"stop_grace_period: (\d+)s", compose) > most + number(
        r'DRAIN_DELAY: "(\d+)"', compose
    )


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1])


def test_the_image_is_built_from_what_the_context_lets_through():
    """What the Dockerfile copies is not ignored, and what install.sh reads is copied."""
    dockerfile = TEXTS[DEPLOY / "Dockerfile"]
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M)
        for name in line.split()[:-1]
    }
    passed = set(re.findall(r"^!(\S+)", TEXTS[DEPLOY / "Dockerfile.dockerignore"], re.M))

    assert copied == passed
    assert all((DEPLOY.parent / name).exists() for name in copied)
    assert {"pyproject.toml", "constraints.txt", "anomalyd"} <= copied


def test_containers_run_as_nobody_on_a_read_only_root():
    """Every place that starts a container says so, and all name the same user."""
    users = re.findall(r"(?:runAsUser: |USER )(\d+)", " ".join(TEXTS.values()))
    kubernetes = [TEXTS[DEPLOY / "kubernetes" / name] for name in ("anomalyd.yaml", "kserve.yaml")]

    assert set(users) == {"10001"}
    assert all("readOnlyRootFilesystem: true" in text for text in kubernetes)
    assert all("drop: [ALL]" in text for text in kubernetes)
    assert "read_only: true" in TEXTS[DEPLOY / "compose.yaml"]
