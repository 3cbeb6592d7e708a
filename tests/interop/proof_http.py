"""The daemon's HTTP under the tools that people point at any web server."""

from __future__ import annotations

import json
import re
import ssl

import pytest
from harness import CLIENTS, IMAGES, TRAINED, VAE, client, daemon, environment, run, tool

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.by("openapi-spec-validator")
def test_description_is_valid(served, tmp_path):
    """/openapi.json is a valid OpenAPI description."""
    (tmp_path / "openapi.json").write_bytes(served.ask("GET", "/openapi.json")[1])
    run(environment("tools", "openapi-spec-validator"), tmp_path / "openapi.json")


@pytest.mark.by("schemathesis")
def test_schemathesis_finds_no_server_error(served, tmp_path, record_property):
    """schemathesis finds no 5xx over /openapi.json, and no answer that it does not describe."""
    done = run(
        *(environment("tools", "schemathesis"), "run", f"{served.url}/openapi.json"),
        *("--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS)),
        *("--max-examples", "25", "--seed", "1", "--generation-database", "none"),
        *("--request-timeout", "30", "--suppress-health-check", "all", "--no-color"),
        cwd=tmp_path,
        timeout=900,
    )
    cases = re.search(r"([\d,]+) generated", done.stdout)
    record_property("measured", f"{cases[1] if cases else '?'} requests")


@pytest.mark.by("wrk")
def test_wrk(served, record_property):
    """wrk over 32 connections has every request answered: with 200, or where the machine is too
    busy for the daemon's limits with 503."""
    body = IMAGES / "boot.png"
    script = CLIENTS.parents[1] / "bench" / "peers" / "wrk.lua"
    done = run(
        *(tool("wrk"), "-t1", "-c32", "-d5s", "--timeout", "30s", "-s", script),
        f"{served.url}/v1/score",
        env={"BODY": str(body), "HEADERS": "Content-Type=image/png", "CODES": "yes"},
    )
    codes, found = map(json.loads, done.stdout.splitlines()[-2:])

    assert codes["200"] > 0
    assert codes.keys() <= {"200", "503"}
    assert found["failures"] == codes.get("503", 0)
    rate = codes["200"] / found["seconds"]
    record_property("measured", f"{rate:,.0f} requests/s, p99 {found['p99_ms']:.0f} ms")


@pytest.mark.by("hey")
def test_hey(served, record_property):
    """hey over four connections, which is as many as may always wait, has 500 requests answered
    with 200."""
    done = run(
        *(tool("hey"), "-n", "500", "-c", "4", "-m", "POST", "-T", "image/png"),
        *("-D", IMAGES / "boot.png", f"{served.url}/v1/score"),
    )
    codes = dict(re.findall(r"\[(\d+)\]\s+(\d+) responses", done.stdout))

    assert codes == {"200": "500"}, done.stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    record_property("measured", f"{float(rate[1]):,.0f} requests/s")


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """A daemon with a certificate of its own making, and the certificate."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    run(
        *(tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
    )
    context = ssl.create_default_context(cafile=certificate)
    flags = {"tls_cert": certificate, "tls_key": key}
    with daemon(TRAINED / VAE, tls=context, **flags) as running:
        yield running, certificate


@pytest.mark.by("openssl s_client")
@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
def test_tls(secured, version, record_property):
    """openssl s_client verifies the certificate and is answered, by TLS 1.2 and 1.3."""
    running, certificate = secured
    done = run(
        *(tool("openssl"), "s_client", "-connect", f"127.0.0.1:{running.port}", f"-{version}"),
        *("-CAfile", certificate, "-verify_return_error", "-verify_hostname", "localhost"),
        "-ign_eof",
        input="GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )

    assert "HTTP/1.1 200" in done.stdout
    assert "Verify return code: 0 (ok)" in done.stdout
    record_property("measured", re.search(r"Cipher is (\S+)", done.stdout)[1])


@pytest.mark.by("openssl s_client")
def test_old_tls_is_refused(secured):
    """openssl s_client gets no TLS 1.1, even where it lowers its own standards."""
    running, _ = secured
    done = run(
        *(tool("openssl"), "s_client", "-connect", f"127.0.0.1:{running.port}", "-tls1_1"),
        *("-cipher", "DEFAULT:@SECLEVEL=0"),
        status=None,
    )

    assert done.returncode != 0
    assert "Cipher is (NONE)" in done.stdout


@pytest.mark.by("Chromium")
def test_page_in_a_browser(served, expected, tmp_path, record_property):
    """Chromium shows the models on `GET /`, and the verdict and the map of an image given to it,
    without a request to anyone else and without an error in its console."""
    found = client(
        *("tools", "page.py", tool("chromium"), f"{served.url}/", tmp_path),
        *(IMAGES / "boot.png", IMAGES / "noisy-shirt.png"),
    )

    assert found["models"] == ["fashion-mnist-conditional", "fashion-mnist-vae"]
    assert found["chosen"] == VAE
    said = [verdict["text"].split() for verdict in found["verdicts"]]
    assert [words[0] for words in said] == ["normal:", "outlier:"]
    shown = [float(words[words.index("=") + 1]) for words in said]
    assert shown == pytest.approx(expected[VAE]["p_value"], rel=5e-3)
    assert [verdict["pictures"] for verdict in found["verdicts"]] == [1, 1]
    assert found["errors"] == []
    assert {origin for origin in found["origins"] if origin} == {served.url}
    record_property("measured", found["browser"])
