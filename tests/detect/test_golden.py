"""The golden images of every kind: a graph that gives other numbers is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from anomalyd.detect.bundle import pack_golden, read_bundle
from anomalyd.detect.golden import open_session
from anomalyd.errors import BundleError

KINDS = {"classifier": tiny.tiny_classifier, "autoencoder": tiny.tiny_autoencoder}
MAIN = {"classifier": "log_posterior", "autoencoder": "embedding"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_density_is_read_and_run(tmp_path, kind):
    """Written, read back and run, the graph gives the numbers of its closed form."""
    bundle = read_bundle(KINDS[kind](tmp_path))
    session = open_session(bundle, device="cpu")
    images = tiny.draw(50, seed=4)
    raw = session.run(images)
    assert raw.log_likelihood.shape == (50, 0)
    np.testing.assert_allclose(raw.embedding, tiny.embedding(images), rtol=1e-5)
    if kind == "classifier":
        np.testing.assert_allclose(raw.log_posterior, tiny.log_posterior(images), atol=1e-5)
    else:
        assert raw.log_posterior is None
        error = tiny.reconstruction_error(images)
        np.testing.assert_allclose(raw.statistics, error, rtol=1e-4)
    assert np.array_equal(getattr(bundle.golden, MAIN[kind]), getattr(golden(kind), MAIN[kind]))
    assert pack_golden(bundle.golden) == bundle.read("golden.npz")


def golden(kind, **changes):
    return dataclasses.replace(tiny.other_golden(kind), **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["main", "statistics"])
@pytest.mark.parametrize(("times", "fine"), [(0.01, True), (10, False)])
def test_its_golden_numbers_must_come_out(tmp_path, kind, output, times, fine):
    """Well within the tolerance passes; ten times it is refused, by output and amount."""
    name = MAIN[kind] if output == "main" else output
    tolerance = np.float32(1e-4 if name == "log_posterior" else 1e-3)
    array = getattr(golden(kind), name)
    moved = pack_golden(golden(kind, **{name: array - np.float32(times) * tolerance}))
    bundle = read_bundle(KINDS[kind](tmp_path, files={"golden.npz": moved}))
    if fine:
        open_session(bundle, device="cpu")
        return
    with pytest.raises(BundleError, match=f"{kind}: golden {name}: the graph is off by more"):
        open_session(bundle, device="cpu")


def test_a_golden_embedding_of_another_width_is_refused(tmp_path):
    """E is what the graph gives."""
    wide = pack_golden(golden("autoencoder", embedding=np.zeros((4, 3), np.float32)))
    bundle = read_bundle(tiny.tiny_autoencoder(tmp_path, files={"golden.npz": wide}))
    with pytest.raises(BundleError, match=r"gives embedding of shape \(4, 2\) .* says \(4, 3\)"):
        open_session(bundle, device="cpu")
