"""What headers alone tell."""

from __future__ import annotations

import pytest

from anomalyd.detect.metadata import telltale
from anomalyd.images import Header

PLAIN = Header(28, 28, "lossless", 8, "L")


def test_equal_headers_tell_nothing():
    """One half, and no suspicion."""
    found = telltale([PLAIN] * 20, [PLAIN] * 5)
    assert (found.auroc, found.suspicious) == (0.5, False)


@pytest.mark.parametrize(
    ("changed", "feature"),
    [
        ({"width": 40}, "width"),
        ({"height": 10}, "height"),
        ({"codec": "JPEG"}, "codec"),
        ({"bits": 16}, "bits"),
        ({"mode": "RGB"}, "mode"),
    ],
)
def test_the_most_telling_feature_is_named(changed, feature):
    """In either direction, and for names as for numbers."""
    some = [PLAIN] * 5 + [PLAIN._replace(**changed)] * 15
    found = telltale([PLAIN] * 20, some)
    assert (found.feature, found.auroc, found.suspicious) == (feature, 0.875, True)
    assert telltale(some, [PLAIN] * 20) == found


def test_names_count_by_what_they_are_worth():
    """Codecs that both sets have in other shares: the best order of them."""
    normal = [PLAIN] * 60 + [PLAIN._replace(codec="JPEG")] * 40
    outliers = [PLAIN] * 20 + [PLAIN._replace(codec="JPEG")] * 80
    assert telltale(normal, outliers).auroc == pytest.approx(0.7)


def test_chance_is_no_suspicion():
    """Four outliers that happen to be a little larger prove nothing."""
    normal = [PLAIN._replace(width=20 + i) for i in range(20)]
    outliers = [PLAIN._replace(width=26 + 5 * i) for i in range(4)]
    found = telltale(normal, outliers)
    assert found.auroc > 0.6
    assert not found.suspicious
