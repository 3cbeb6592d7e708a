"""An evaluation as one HTML file: tables, figures, and the images worth a look.

The file holds everything that it shows and fetches nothing. Every name in it is escaped.
"""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from anomalyd.detect import plots
from anomalyd.detect.discoveries import SHARE, SPLITS
from anomalyd.detect.heatmap import beside_png
from anomalyd.detect.localisation import FALSE_POSITIVES
from anomalyd.detect.output import check_place, whole
from anomalyd.detect.pipeline import item_name, maps_of, scored
from anomalyd.errors import ImageError, UsageError
from anomalyd.images import to_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.classification import Classification, Rates
    from anomalyd.detect.detector import Detector
    from anomalyd.detect.evaluate import Evaluated, Level, Proportion
    from anomalyd.sources import Item

__all__ = ["check_report", "html", "write_report"]

_Number = TypeVar("_Number", np.uint8, np.float32)
LARGEST_SIDE = 256  # of a picture in the page
OUTLINE = (0, 200, 255)  # of what a mask marks; no colour of the maps

STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --wash: #f9fafb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: #fff; max-width: 1000px; margin: 0 auto;
  padding: 2.5rem 20px 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .3rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.box { background: var(--wash); border-left: 4px solid var(--accent); padding: .8rem 1.1rem; }
.box h3 { margin-top: 0; }
.box p:last-child, .box ul { margin-bottom: 0; }
.box.not { border-color: var(--soft); }
.box.warning { border-color: #d55e00; background: #fff7ed; margin-bottom: 1rem; }
.box ul { padding-left: 1.1rem; margin-top: .3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0;
  font-size: .92rem; }
th, td { padding: .38rem .65rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: .5rem; }
thead th { border-bottom: 2px solid #9ca3af; white-space: normal; max-width: 11rem;
  overflow-wrap: break-word; }
thead tr.above th { border-bottom: 1px solid var(--line); text-align: center; }
tbody tr.chosen { background: #eff6ff; font-weight: 600; }
td small, th small { display: block; color: var(--soft); font-weight: 400; font-size: .82em; }
td .trap, td .trap small { color: #b42318; }
figure { margin: 1rem 0; }
figcaption { font-size: .87rem; max-width: 46rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.images { display: grid; gap: 1.1rem .9rem;
  grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); }
.images.single { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
.images figure { margin: 0; }
.images img { width: 100%; display: block; image-rendering: pixelated; background: #000; }
.images figcaption { font-size: .78rem; line-height: 1.35; overflow-wrap: anywhere;
  padding-top: .25rem; }
.images b { color: var(--ink); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10.5pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  figure, tr, .box { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""


def check_report(path: Path) -> None:
    """See that a report can be made, before anything is scored for it.

    Raises:
        UsageError: a name that does not end in .html, or a folder there.
        MissingExtra: without matplotlib.
        AnomalydError: no folder there, or one that cannot be written to.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path}: a report is written as .html; name it so")
    check_place("--report", path)
    plots.require_matplotlib()


def write_report(
    path: Path,
    result: Evaluated,
    detector: Detector,
    *,
    masks: Mapping[str, Path] | None = None,
    thumbnails: bool = True,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: ends in .html.
        result: what `evaluate` found.
        detector: the bundle that it was found with.
        masks: as for `evaluate`, to outline what they mark.
        thumbnails: show images; without them nothing of any image stands in the page but names.

    Raises:
        AnomalydError: the disk refuses.
    """
    page = html(result, detector, masks=masks, thumbnails=thumbnails)
    with whole("--report", path) as new:
        new.write_text(page, encoding="utf-8", errors="backslashreplace")


def html(
    result: Evaluated,
    detector: Detector,
    *,
    masks: Mapping[str, Path] | None = None,
    thumbnails: bool = True,
) -> str:
    """The page; arguments as for `write_report`."""
    sections = [_heading(result, detector), _alphas(result)]
    if result.classification is not None:
        sections.append(_labels(result.classification))
    if result.outliers:
        sections += [_sets(result), _batches(result, detector), _scores(result)]
    sections.append(_histograms(result, detector))
    if result.outliers:
        sections.append(
            "<h2>Caught against false alarms</h2>"
            + _figure(
                plots.roc_plot(result),
                "ROC curves of the score that verdicts rest on, AUROC in brackets; right, the "
                "same with few false alarms drawn out. Dashed: alpha. Dotted: chance.",
            )
        )
    fall = "fall into the bands"
    if detector.labels:
        fall = "stay below the ends of the bands, which are those of the rarest class,"
    sections += [
        "<h2>Are p-values what they promise?</h2>"
        + _figure(
            plots.calibration_plot(result, detector),
            "How often the p-value of a normal image is t or less. Of a promise that holds, 95 % "
            f"and 99.9 % of runs {fall} at any one t (beta-binomial). Above them: "
            "these normal images are stranger than the calibration images were.",
        ),
        _images(result, detector, masks or {}, thumbnails=thumbnails),
        _footer(detector),
    ]
    title = f"Evaluation of {escape(result.bundle)}"
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
        + "\n".join(sections)
        + "\n</html>\n"
    )


# --- sections ---------------------------------------------------------------------------------


def _heading(result: Evaluated, detector: Detector) -> str:
    level, manifest = result.level, detector.manifest
    facts = {
        "bits/dim": f"{result.bits_per_dim:.4f}",
        "likelihood": escape(result.likelihood),
        "score": escape(result.score),
        "normal images": f"{len(result.normal):,}",
        "outliers": f"{sum(found.n for found in result.outliers.values()):,}",
        "calibration images": f"{manifest.calibration_n:,}",
        f"false alarms at {level.alpha:g}": f"{level.observed:.4f}",
    }
    over = (
        "on average over calibration sets"
        if detector.confidence is None
        else f"with {detector.confidence:.4g} confidence over the calibration set drawn"
    )
    seen = [f"{len(names):,} of {name}" for name, names in result.seen.items() if names]
    left_out = [f"seen in training or calibration: {', '.join(seen)}"] * bool(seen)
    left_out += [f"could not be read: {len(result.unreadable):,}"] * bool(result.unreadable)
    missing = f"Left out: {'; '.join(left_out)}." if left_out else ""
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in result.warnings)
    return (
        f"<header><h1>{escape(result.bundle)}</h1>"
        f'<p class="soft">Evaluation of {_today()}, bundle version {escape(manifest.version)} of '
        f"{escape(manifest.created[:10])}. {escape(missing)}</p></header>"
        f"<dl>{''.join(f'<div><dt>{k}</dt><dd>{v}</dd></div>' for k, v in facts.items())}</dl>"
        + (f'<div class="box warning"><h3>Read this first</h3><ul>{warnings}</ul></div>')
        * bool(warnings)
        + '<div class="pair"><div class="box"><h3>Promised</h3>'
        f"<p>The rate of false alarms at level alpha is at most alpha, {over}, if live normal "
        "images are exchangeable with the calibration images.</p></div>"
        '<div class="box not"><h3>Not promised</h3>'
        "<p>Which outliers are caught. It is measured here, on these sets, and another kind of "
        "outlier may fare otherwise. Pixel maps carry no promise.</p></div></div>"
    )


def _alphas(result: Evaluated) -> str:
    names = list(result.outliers)

    def row(level: Level) -> tuple[str, list[str]]:
        low, high = (1000 * end for end in level.band)
        cells = [f"{level.alpha:g}", f"{1000 * level.alpha:g}"]
        cells += [f"{1000 * level.observed:.1f}", f"{low:.1f} – {high:.1f}"]
        cells += [_percent(level.recall[name]) for name in names]
        return "chosen" if level.alpha == result.alpha else "", cells

    above = [("", 1), ("false alarms per 1,000 parts", 3), ("caught", len(names))]
    headings = ["alpha", "promised, at most", "observed", "99.9 % of runs"]
    return (
        "<h2>What an alpha costs, and what it catches</h2>"
        "<p>Single images. Small print: 95 % confidence intervals (Clopper–Pearson). "
        "Alphas that the calibration set is too small for are left out.</p>"
        + _table([*headings, *map(escape, names)], map(row, result.levels), above=above)
    )


def _labels(found: Classification) -> str:
    mixed = list(found.labels.mixed)
    given = [("chosen", "by Bayes' rule", found.labels)]
    if found.baseline is not None:
        given.append(("", escape(str(found.baseline_name)), found.baseline))
    measures = [
        (
            kind,
            [
                name,
                f"{each.accuracy:.4f}",
                f"{each.nll:.4f}",
                f"{each.ece:.4f}",
                f"{each.aurc:.5f}",
                f"{each.augrc:.5f}",
                f"{each.coverage_at_1pct_risk:.4f}",
                *(_number(area, f"AUGRC {other:.4f}") for area, other in each.mixed.values()),
            ],
        )
        for kind, name, each in given
    ]
    headings = ["labels", "accuracy", "NLL, nats", "ECE", "AURC", "AUGRC", "coverage at 1 % risk"]
    above = [("", 1), ("normal images", 6), ("AURC, half of them outliers", len(mixed))]
    rejected = [
        ("", [escape(name), *(f"{share:.4f}" for share in _shares(each))])
        for name, each in {"normal": found.normal, **found.outliers}.items()
    ]
    classes = [
        (
            "",
            [
                escape(name),
                f"{each.n:,}",
                f"{each.accuracy:.4f}",
                f"{each.coverage:.4f}",
                _number(each.novel, f"at most {each.at_most:.4f}"),
            ],
        )
        for name, each in found.classes.items()
    ]
    bounds = (
        " The likelihoods are lower bounds, so the posterior is approximate."
        if found.approximate
        else ""
    )
    beside = (
        " The baseline is a softmax classifier that rejects by its maximum probability."
        if found.baseline is not None
        else ""
    )
    return (
        "<h2>Labels, and images that get none</h2>"
        f"<p>{100 * found.accepted:.1f} % of the normal images get a label, and "
        f"{100 * found.accepted_accuracy:.1f} % of these labels are right. The others are novel "
        "(they fit no class) or ambiguous (not just one label is credible; on average "
        f"{found.set_size:.2f} are, at level {found.label_alpha:g}).{bounds}{beside}</p>"
        + _table([*headings, *map(escape, mixed)], measures, above=above)
        + _figure(
            plots.risk_plot(found),
            "Risk against coverage: images accepted from the most confident down. Where half are "
            "outliers, each of those is an error, and a perfect rejection is flat up to one half.",
        )
        + _table(["rejected", "novel", "ambiguous", "either"], rejected)
        + "<p>Class by class. Promised: at most a share alpha of each class is called novel "
        "(small print: what 99.9 % of runs stay below, all classes together), and the credible "
        f"labels hold the true one in {100 * (1 - found.label_alpha):g} % over all classes. How "
        "often an accepted label is right is not promised.</p>"
        + _table(["class", "images", "accuracy", "coverage", "called novel"], classes)
    )


def _shares(rates: Rates) -> tuple[float, float, float]:
    return rates.novel, rates.ambiguous, rates.rejected


def _sets(result: Evaluated) -> str:
    level, where = result.level, result.localisation
    headings = ["outliers", "images", "AUROC", "AUPR", "FPR95", f"caught at {level.alpha:g}"]
    headings += ["pixel AUROC", "AUPRO"] if where else []
    headings += ["told by headers"]
    rows = []
    for name, found in result.outliers.items():
        verdict, told = found.verdict, found.telltale
        cells = [escape(name), f"{found.n:,}"]
        cells += [_number(verdict.auroc, _range(verdict.auroc_ci95))]
        cells += [_number(verdict.aupr, f"base rate {found.base_rate:.3g}")]
        cells += [f"{verdict.fpr95:.4f}", _percent(level.recall[name])]
        if where:
            local = found.localisation
            cells += [f"{local.pixel_auroc:.4f}", f"{local.aupro:.4f}"] if local else ["", ""]
        cells += [_number(told.auroc, escape(told.feature) if told.auroc > 0.5 else "")]
        rows.append(("", cells))
    if where and len(rows) > 1:
        blank = [""] * 5
        cells = ["all masks", *blank, f"{where.pixel_auroc:.4f}", f"{where.aupro:.4f}", ""]
        rows.append(("chosen", cells))
    maps = (
        f"<p>AUPRO is integrated to a false positive rate of {FALSE_POSITIVES:g} and divided by "
        "it; normal images count as unmarked pixels.</p>"
    )
    return (
        "<h2>Outlier sets, by the score that verdicts rest on</h2>"
        "<p>Outliers are the positive class. AUROC: how often an outlier scores above a normal "
        "image. FPR95: false alarms where 95 % of the outliers are caught. Told by headers: "
        "AUROC of the most telling of width, height, codec, bits and mode, without a look at the "
        "pixels; well above 0.5, the other figures are in doubt.</p>"
        + _table(headings, rows)
        + (maps if where else "")
    )


def _batches(result: Evaluated, detector: Detector) -> str:
    rows = []
    for name, found in result.outliers.items():
        batches = found.discoveries
        cells = [escape(name), f"{batches.batch:,}", f"{batches.outliers:,}"]
        cells += [_number(batches.mean_fdp, f"± {2 * batches.standard_error:.4f}")]
        rows.append(("", [*cells, f"{batches.power:.4f}"]))
    headings = ["outliers", "batch", "outliers in it", "mean share of false flags", "caught"]
    calibration, promised = "each with a calibration set drawn from the pooled scores", ""
    if detector.labels:
        calibration = "each with the calibration set that the bundle has"
        promised = ", on average over such sets"
    return (
        f"<h3>Batches flagged at a false discovery rate of {result.fdr:g}</h3>"
        f"<p>{SPLITS} random splits, {calibration} and a batch with {100 * SHARE:g} % outliers. "
        f"The mean share of false flags is promised to be at most {result.fdr:g}{promised}; "
        "small print: two standard errors.</p>" + _table(headings, rows)
    )


def _scores(result: Evaluated) -> str:
    names = list(result.outliers)

    def row(score: str) -> tuple[str, list[str]]:
        cells = [escape(score)]
        for name in names:
            found = result.outliers[name].scores[score]
            number = _number(found.auroc, _range(found.auroc_ci95))
            cells.append(f'<span class="trap">{number}</span>' if found.auroc < 0.5 else number)
        return "chosen" if score == result.score else "", cells

    return (
        "<h2>Every score side by side</h2>"
        "<p>AUROC; small print: 95 % confidence intervals (DeLong). Red lies below 0.5: that "
        "score takes these outliers for more normal than the normal images. Verdicts rest on the "
        "marked score alone; to choose another by this table would tune it to these outliers.</p>"
        + _table(["score", *map(escape, names)], map(row, result.normal.scores))
    )


def _histograms(result: Evaluated, detector: Detector) -> str:
    others = plots.small_histograms(result)
    return (
        "<h2>Scores</h2>"
        + _figure(
            plots.histogram(result, detector),
            f"{escape(result.score)}, on which verdicts rest; higher is stranger. What lies "
            "beyond the axis is counted in the outermost bars.",
        )
        + (_figure(others, "The other scores, in the same colours.") if others else "")
    )


def _images(
    result: Evaluated, detector: Detector, masks: Mapping[str, Path], *, thumbnails: bool
) -> str:
    sets = [("Strangest normal images", result.normal.extremes)]
    sets += [
        (f"Most normal of {name}", found.sample.extremes)
        for name, found in result.outliers.items()
    ]
    said = "The images that the verdict's score is most wrong about"
    said += ", as the graph saw them. " if thumbnails else ", by name alone."
    if thumbnails and "nll_map" in detector.session.outputs:
        said += (
            "Beside each its map: bright is surprising; the colours run from the map's median to "
            "its largest value. "
        )
    if thumbnails and masks:
        said += "What a mask marks is outlined."
    parts = [f"<h2>Images worth a look</h2><p>{said}</p>"]
    for title, items in sets:
        parts.append(f"<h3>{escape(title)}</h3>")
        parts.append(_gallery(detector, items, masks, thumbnails=thumbnails))
    return "".join(parts)


def _footer(detector: Detector) -> str:
    from anomalyd import __version__

    return (
        f"<footer>anomalyd {escape(__version__)}. Bundle {escape(str(detector.path))}, "
        f"licence: {escape(detector.manifest.licence)}.</footer>"
    )


# --- images -----------------------------------------------------------------------------------


def _gallery(
    detector: Detector, items: Sequence[Item], masks: Mapping[str, Path], *, thumbnails: bool
) -> str:
    """The images again, from their source, as the graph saw them."""
    has_map = thumbnails and "nll_map" in detector.session.outputs
    figures = []
    for slab in scored(
        detector.session, detector.spec, items, texture=detector.texture, nll_map=has_map
    ):
        if slab.raw is None:
            continue
        p_values = detector.columns(slab.raw, detector.manifest.default_alpha).p_value.tolist()
        maps = maps_of(slab) if has_map else [None] * len(p_values)
        rows = zip(slab.readable, slab.pixels, maps, p_values, strict=True)
        for place, pixels, values, p_value in rows:
            item = slab.items[place]
            name = escape(item_name(item))
            picture = ""
            if thumbnails:
                mask = _mask(masks.get(item.source), detector, pixels)
                data = base64.b64encode(_picture(pixels, values, mask)).decode()
                picture = f'<img src="data:image/png;base64,{data}" alt="{name}">'
            figures.append(
                f'<figure title="{name}">{picture}<figcaption><b>p = {p_value:.4g}</b> '
                f"{escape(_tail(item_name(item)))}</figcaption></figure>"
            )
    kind = "images" if has_map or not thumbnails else "images single"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _picture(
    pixels: NDArray[np.uint8], values: NDArray[np.float32] | None, mask: NDArray[np.bool_] | None
) -> bytes:
    """A PNG of the image, what its mask marks outlined, and of its map beside it."""
    image = _shrunk(pixels)
    if mask is not None:
        image = _outlined(image, _shrunk(mask[..., None].astype(np.uint8) * 255)[..., 0] > 127)
    if values is not None:
        return beside_png(image, _shrunk(values[..., None])[..., 0])
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def _shrunk(array: NDArray[_Number]) -> NDArray[_Number]:
    """(H, W, C) with no side above LARGEST_SIDE, by means over boxes."""
    height, width, channels = array.shape
    scale = LARGEST_SIDE / max(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = [
        np.asarray(Image.fromarray(array[..., i]).resize(size, Image.Resampling.BOX))
        for i in range(channels)
    ]
    return np.stack(planes, axis=2)


def _outlined(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """RGB, with the pixels that surround the marked ones coloured."""
    wide = np.pad(mask, 1)
    grown = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    coloured = image.repeat(3, axis=2) if image.shape[2] == 1 else image.copy()
    coloured[grown & ~mask] = OUTLINE
    return coloured


def _mask(
    path: Path | None, detector: Detector, pixels: NDArray[np.uint8]
) -> NDArray[np.bool_] | None:
    """What a mask marks; None without one, or where it cannot be read, which evaluate has told."""
    if path is None:
        return None
    try:
        return to_mask(path, detector.spec, (pixels.shape[0], pixels.shape[1]))
    except ImageError:
        return None


# --- pieces -----------------------------------------------------------------------------------


def _table(
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    above: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of HTML cells; each row comes with its class, `above` are headings over several."""
    over = "".join(f'<th colspan="{span}">{text}</th>' for text, span in above if span)
    head = f'<tr class="above">{over}</tr>' if over else ""
    head += f"<tr>{''.join(f'<th>{heading}</th>' for heading in headings)}</tr>"
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for kind, cells in rows
    )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _number(value: float, small: str) -> str:
    return f"{value:.4f}<small>{small}</small>"


def _percent(share: Proportion) -> str:
    low, high = (100 * end for end in share.ci95)
    return f"{100 * share.value:.1f} %<small>{low:.1f} – {high:.1f}</small>"


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} – {ends[1]:.3f}"


def _tail(name: str, most: int = 44) -> str:
    """The folder and the file, or what of them fits."""
    name = "/".join(Path(name).parts[-2:])
    return name if len(name) <= most else "…" + name[1 - most :]


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
