"""Tokens: who is let in, and that nobody's token is ever shown."""

from __future__ import annotations

import hashlib
import logging

import pytest
from daemons import NORMAL, check_problem, serve
from tiny import tiny_bundle

from anomalyd.errors import UsageError
from anomalyd.serve.access import ADMIN, SCORE, Access
from anomalyd.serve.problems import Problem

SECRETS = {"camera": ("score-secret", "score"), "operator": ("admin-secret", "score,admin")}


def tokens(folder, secrets=SECRETS):
    lines = [
        f"{name} {scopes} {hashlib.sha256(secret.encode()).hexdigest()}"
        for name, (secret, scopes) in secrets.items()
    ]
    file = folder / "tokens"
    file.write_text("# who may ask\n\n" + "\n".join(lines) + "  # the last\n")
    return file


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def daemon(tmp_path):
    """A daemon that wants tokens."""
    daemon = serve(tiny_bundle(tmp_path), access=Access(tokens(tmp_path)), repository_api=True)
    yield daemon
    daemon.models.close()


@pytest.mark.parametrize(
    "header",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("score-secret2"),
        bearer(hashlib.sha256(b"score-secret").hexdigest()),
        {"Authorization": "Basic score-secret"},
        {"Authorization": "score-secret"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer " + "x" * 10_000},
    ],
)
def test_without_the_right_token_nothing_is_told(daemon, header):
    """401 and a challenge, on every surface."""
    for method, path in (
        ("POST", "/v1/score"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("GET", "/v2"),
        ("POST", "/v2/models/tiny/infer"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/tiny/unload"),
    ):
        response = daemon.ask(method, path, headers=header)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert "tiny" not in response.text


def test_scopes(daemon):
    """`score` scores, `admin` loads; a token has what its line says."""
    assert daemon.score(NORMAL, headers=bearer("score-secret")).status_code == 200
    path = "/v2/repository/models/tiny/load"
    assert daemon.ask("POST", path, headers=bearer("score-secret")).status_code == 403
    assert daemon.ask("POST", path, headers=bearer("admin-secret")).status_code == 200
    assert daemon.ask("GET", "/metrics", headers=bearer("score-secret")).status_code == 200


def test_probes_need_no_token(daemon):
    """Orchestrators have none, and the page asks for it itself."""
    for path in ("/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/"):
        assert daemon.ask("GET", path).status_code == 200


def test_refusals_are_counted(daemon):
    """By one reason."""
    check_problem(daemon.score(NORMAL), 401, "unauthorized")
    daemon.ask("POST", "/v2/repository/models/x/load", headers=bearer("score-secret"))
    text = daemon.ask("GET", "/metrics", headers=bearer("score-secret")).text
    assert 'anomalyd_rejected_total{reason="unauthorized"} 2.0' in text


def test_no_token_is_ever_shown(daemon, caplog):
    """Neither in an answer nor in the log."""
    with caplog.at_level(logging.DEBUG):
        answers = [daemon.score(b"", headers=bearer(secret)) for secret, _ in SECRETS.values()]
        answers.append(daemon.score(b"", headers=bearer("wrong-secret")))
    assert not any("secret" in answer.text + str(answer.headers) for answer in answers)
    assert "secret" not in caplog.text


def test_tokens_are_read_again(tmp_path):
    """A token that is taken out of the file is worth nothing; a broken file changes nothing."""
    file = tokens(tmp_path)
    access = Access(file)
    assert access.check(b"Bearer score-secret", SCORE) == "camera"
    assert access.check(b"bearer admin-secret", ADMIN) == "operator"
    tokens(tmp_path, {"operator": SECRETS["operator"]})
    access.reload()
    with pytest.raises(Problem):
        access.check(b"Bearer score-secret", SCORE)
    file.write_text("nonsense")
    with pytest.raises(UsageError):
        access.reload()
    assert access.grants(ADMIN)


@pytest.mark.parametrize(
    "text",
    ["", "# nobody", "name score", "name score the-token-itself", "name root " + "0" * 64],
)
def test_a_bad_file_is_one_line(tmp_path, text):
    """It names the line and never shows it."""
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        Access(file)
    assert "the-token-itself" not in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError, match="cannot be read"):
        Access(tmp_path / "none")
