"""Whether outliers could be told without a look at their pixels: by size, codec or bit depth.

Where that works, a score may do well for the wrong reason: traces of another camera, scaling or
compression stand in the pixels, too, and the outliers of the real world will not bring them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anomalyd.detect.measures import auroc, auroc_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.images import Header

__all__ = ["Telltale", "telltale"]

SUSPICIOUS = 0.6


class Telltale(NamedTuple):
    """The part of a header that tells outliers best.

    Attributes:
        feature: "width", "height", "codec", "bits" or "mode".
        auroc: of that alone, in [1/2, 1].
        suspicious: whether that is above 0.6, and above 1/2 beyond chance.
    """

    feature: str
    auroc: float
    suspicious: bool


def telltale(normal: Sequence[Header], outliers: Sequence[Header]) -> Telltale:
    """How well the most telling part of a header separates outliers from normal images.

    Sizes count in either direction. A codec or mode scores by the share of outliers among its
    images, the best that can be done with it, which favours it a little.

    Args:
        normal: one each, at least one.
        outliers: one each, at least one.
    """

    def judged(feature: str) -> Telltale:
        a, b = (
            np.array([getattr(each, feature) for each in group]) for group in (normal, outliers)
        )
        a, b = (a, b) if a.dtype.kind == "i" else _shares(a, b)
        area = auroc(a, b)
        if area < 0.5:
            a, b, area = -a, -b, 1 - area
        return Telltale(feature, area, area > SUSPICIOUS and auroc_interval(a, b)[0] > 0.5)

    return max(map(judged, normal[0]._fields), key=lambda found: found.auroc)


def _shares(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each name as the share of outliers that it has, sets of different sizes weighing alike."""
    score = {}
    for name in {*a.tolist(), *b.tolist()}:
        usual, strange = float(np.mean(a == name)), float(np.mean(b == name))
        score[name] = strange / (usual + strange)
    return np.array([score[x] for x in a.tolist()]), np.array([score[x] for x in b.tolist()])
