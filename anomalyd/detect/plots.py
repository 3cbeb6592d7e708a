"""The figures of the report, as SVG that stands in a page without anything beside it.

Text stays text and takes the page's font. Names are drawn as they are, never read as formulas.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice, product
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.measures import caught
from anomalyd.errors import MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.classification import Classification
    from anomalyd.detect.detector import Detector
    from anomalyd.detect.evaluate import Evaluated

    Floats = NDArray[np.float64]

__all__ = [
    "calibration_plot",
    "histogram",
    "require_matplotlib",
    "risk_plot",
    "roc_plot",
    "small_histograms",
]

# "Color Universal Design" (Okabe, Ito, 2008), less what is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
NORMAL, INK = "#6b7280", "#1f2937"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "anomalyd",  # the same numbers always give the same bytes
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
WIDTH = 9.6  # inches of 72 points
BINS = 60
POINTS = 200  # of a curve; more would not be seen
HUGE = 1e100
LONGEST = 28  # characters of a name in a legend


def require_matplotlib() -> None:
    """See that there is matplotlib, before hours are spent on what it should draw.

    Raises:
        MissingExtra: there is none.
    """
    _matplotlib()


def histogram(result: Evaluated, detector: Detector) -> str:
    """The score that verdicts rest on: each set in a row over the normal images, the threshold."""
    names = list(result.outliers)
    rows = max(1, len(names))
    with _figure(WIDTH, max(2.6, 0.6 + rows)) as (figure, svg):
        grid = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        threshold = detector.calibration.threshold(result.alpha)
        for number, axes in enumerate(grid):
            _draw_histogram(axes, result, result.score, names[number : number + 1], number)
            axes.set_yticks([])
            if threshold is not None:
                axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            _legend(axes)
        if threshold is not None:
            text, where = f"flagged beyond, at {result.alpha:g}", ("data", "axes fraction")
            grid[0].annotate(text, (threshold, 1.03), xycoords=where, ha="center", color=INK)
        grid[-1].set_xlabel(_short(result.score))
        figure.supylabel("share of images", fontsize=9, color=INK)
    return svg.getvalue()


def small_histograms(result: Evaluated) -> str:
    """Every other score in a panel of its own; empty where there is none."""
    names = [name for name in result.normal.scores if name != result.score]
    if not names:
        return ""
    rows = -(-len(names) // 3)
    with _figure(WIDTH, 1.75 * rows) as (figure, svg):
        grid = figure.subplots(rows, 3, squeeze=False)
        for name, axes in zip(names, grid.flat, strict=False):
            _draw_histogram(axes, result, name, list(result.outliers))
            axes.set_title(_short(name))
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=5)
        for axes in grid.flat[len(names) :]:
            axes.remove()
    return svg.getvalue()


def roc_plot(result: Evaluated) -> str:
    """Outliers caught against false alarms, on a linear and on a logarithmic axis."""
    count = len(result.normal)
    normal = result.normal.scores[result.score]
    alarms = _steps(count)
    with _figure(WIDTH, 3.6) as (figure, svg):
        linear, logarithmic = figure.subplots(1, 2, sharey=True)
        for style, (name, found) in zip(_styles(), result.outliers.items(), strict=False):
            share = caught(normal, found.sample.scores[result.score], alarms)
            label = f"{_short(name)} ({found.verdict.auroc:.3f})"
            for axes in (linear, logarithmic):
                axes.plot(alarms / count, share, drawstyle="steps-post", label=label, **style)
        chance = np.linspace(0, 1, POINTS)
        for axes in (linear, logarithmic):
            axes.plot(chance, chance, color="#9ca3af", linewidth=0.8, linestyle=":")
            axes.axvline(result.alpha, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xlabel("share of normal images flagged")
            axes.set_ylim(-0.02, 1.02)
        linear.set_ylabel("share of outliers caught")
        logarithmic.set_xscale("log")
        _plain_numbers(logarithmic.xaxis)
        logarithmic.set_xlim(max(0.5 / count, 1e-4), 1)
        _legend(linear, figure)
    return svg.getvalue()


def risk_plot(found: Classification) -> str:
    """The share of errors among accepted images against the share accepted, and the baseline's."""
    sets = ["normal", *found.labels.mixed]
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    with _figure(WIDTH, 2.6 * rows) as (figure, svg):
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for name, axes in zip(sets, grid.flat, strict=False):
            drawn = [("by Bayes' rule", found.labels)]
            if found.baseline is not None:
                drawn.append((_short(str(found.baseline_name)), found.baseline))
            for style, (label, labels) in zip(_styles(), drawn, strict=False):
                coverage, risk = labels.curves[name]
                some = _steps(len(coverage) - 1)
                axes.plot(coverage[some], risk[some], label=label, **style)
            axes.set_title("normal images" if name == "normal" else f"half {_short(name)}")
            axes.set_xlim(0, 1)
        for axes in grid.flat[len(sets) :]:
            axes.remove()
        for axes in grid[-1]:
            axes.set_xlabel("share accepted")
        grid[0, 0].set_ylabel("share wrong among these")
        _legend(grid[0, 0])
    return svg.getvalue()


def calibration_plot(result: Evaluated, detector: Detector) -> str:
    """How often p-values of normal images are t or less, against t, with what chance allows.

    Where verdicts have labels, chance allows anything from 0 to what it does in the rarest class.
    """
    n, m = detector.calibrated_on, len(result.normal)
    table = conformal.p_table(n, detector.confidence)
    t = table[_steps(n, 60)]
    observed = np.searchsorted(np.sort(result.normal.p_values), t, side="right") / m
    with _figure(WIDTH, 3.4) as (figure, svg):
        linear, logarithmic = figure.subplots(1, 2)
        for coverage, colour in ((0.999, "#e5e7eb"), (0.95, "#cbd5e1")):
            low, high = np.transpose(
                [
                    conformal.false_alarm_band(
                        alpha, n, m, coverage=coverage, confidence=detector.confidence
                    )
                    for alpha in np.minimum(t, 1 - 1e-12).tolist()
                ]
            )
            if detector.labels:
                low = np.zeros_like(low)
            for axes in (linear, logarithmic):
                axes.fill_between(
                    t, low, high, color=colour, linewidth=0, label=f"{100 * coverage:g} % of runs"
                )
        for axes in (linear, logarithmic):
            axes.plot(t, t, color="#9ca3af", linewidth=0.8, label="promised at most")
            axes.plot(t, observed, color=COLOURS[0], linewidth=1.4, label="observed")
            axes.set_xlabel("t")
        linear.set_ylabel("share of normal images with p ≤ t")
        logarithmic.set_xscale("log")
        logarithmic.set_yscale("log")
        _plain_numbers(logarithmic.xaxis)
        _plain_numbers(logarithmic.yaxis)
        logarithmic.set_xlim(float(t[0]), 1)
        logarithmic.set_ylim(min(float(t[0]), 0.5 / m), 1)
        _legend(linear, figure)
    return svg.getvalue()


def _draw_histogram(
    axes: Any, result: Evaluated, score: str, shown: list[str], first: int = 0
) -> None:
    """Normal images and the sets to be shown, on an axis that suits all sets."""
    # Clipped, so that the difference of two values that stand for infinity is a number, too.
    normal = np.clip(result.normal.scores[score], -HUGE, HUGE)
    sets = {
        name: np.clip(found.sample.scores[score], -HUGE, HUGE)
        for name, found in result.outliers.items()
    }
    low, high = _range(normal, list(sets.values()))
    fewest = min(values.size for values in (normal, *sets.values()))
    edges = np.linspace(low, high, min(BINS, 12 + int(2 * fewest**0.5)) + 1)

    def shares(values: Floats) -> Floats:
        counts = np.histogram(np.clip(values, low, high), edges)[0]
        share: Floats = counts / values.size
        return share

    axes.stairs(shares(normal), edges, fill=True, color="#d1d5db", label="normal")
    axes.stairs(shares(normal), edges, color=NORMAL, linewidth=0.8)
    for style, name in zip(islice(_styles(), first, None), shown, strict=False):
        axes.stairs(shares(sets[name]), edges, label=_short(name), **style)
    axes.grid(visible=False)


def _range(normal: Floats, others: list[Floats]) -> tuple[float, float]:
    """Where most images lie, the normal ones over at least a seventh of it."""
    low, high = np.quantile(normal, [0.005, 0.995])
    unit = float(high - low) or max(1.0, abs(float(high)))
    tails = [np.quantile(values, [0.01, 0.99]).tolist() for values in others]
    least = min([float(low), *(end for end, _ in tails)])
    most = max([float(high), *(end for _, end in tails)])
    left, right = max(least, float(low) - 3 * unit), min(most, float(high) + 3 * unit)
    return (left, right) if right > left else (left - unit, right + unit)


def _steps(last: int, points: int = POINTS) -> NDArray[np.intp]:
    """0 to last: each of the first few, then ever fewer."""
    spread = [np.geomspace(1, max(1, last), points).clip(max=last), np.linspace(0, last, points)]
    return np.unique(np.concatenate(spread).round().astype(np.intp))


def _plain_numbers(axis: Any) -> None:
    """Powers of ten as 0.001 and not as a formula, which nothing here would set."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def _styles() -> Iterator[dict[str, Any]]:
    for dash, colour in cycle(product(DASHES, COLOURS)):
        yield {"color": colour, "linestyle": dash, "linewidth": 1.4}


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _legend(axes: Any, figure: Any = None) -> None:
    """Within the axes, or above the whole figure in as many columns as fit."""
    if figure is None:
        axes.legend(loc="best", ncols=2, handlelength=1.6, borderaxespad=0)
        return
    handles, labels = axes.get_legend_handles_labels()
    columns = int(110 / (max(map(len, labels), default=1) + 6))
    columns = max(1, min(len(labels), columns))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise MissingExtra("matplotlib", "evaluate") from error
    return matplotlib


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A figure to draw in, and where its SVG stands afterwards."""
    matplotlib = _matplotlib()
    svg = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name may have letters that the font for measuring lacks; the reader's has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = matplotlib.figure.Figure((width, height), layout="constrained")
        yield figure, svg
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
    text = svg.getvalue()
    svg.seek(0)
    svg.truncate()
    svg.write(text[text.index("<svg") :])
