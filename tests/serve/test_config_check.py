"""`anomalyd config check`: what `serve` would refuse, said beforehand."""

from __future__ import annotations

import pytest
from tiny import tiny_bundle, tiny_classifier

from anomalyd.cli import main


@pytest.fixture
def check(capsys):
    def check(*arguments):
        code = main(["config", "check", *map(str, arguments)])
        return code, *capsys.readouterr()

    return check


def test_all_is_well(check, tmp_path):
    """One line a bundle, and 0; what is no density is said to be passed over."""
    tiny_bundle(tmp_path)
    tiny_classifier(tmp_path)
    code, out, err = check(tmp_path)
    assert (code, err) == (0, "")
    first, second = sorted(out.splitlines())
    assert first.startswith("classifier 1: not served")
    assert second.startswith("tiny 1: good")


def test_a_bad_bundle_is_1(check, tmp_path):
    """Each is named, the good ones, too."""
    tiny_bundle(tmp_path)
    bad = tiny_bundle(tmp_path, name="bad")
    (bad / "model.onnx").write_bytes(b"x")
    code, out, err = check(tmp_path)
    assert code == 1
    assert "tiny 1: good" in out
    assert "model.onnx has 1 bytes" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--default-model", "none"],
        ["--tls-cert", "none.pem"],
        ["--tokens", "none"],
        ["--repository-api"],
        ["--config", "none.toml"],
        ["--workers", "0"],
    ],
)
def test_settings_that_cannot_be_meant_are_2(check, tmp_path, flags):
    """In one line."""
    code, _, err = check(tiny_bundle(tmp_path), *flags)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_an_open_door_is_said(check, tmp_path):
    """Another address than the loopback's, without tokens, is allowed and mentioned."""
    code, _, err = check(tiny_bundle(tmp_path), "--host", "0.0.0.0")
    assert code == 0
    assert "anyone who reaches 0.0.0.0 may ask" in err
