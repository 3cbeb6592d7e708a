"""CARD.md: what a bundle is, what it may be trusted with, and how it came about."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from anomalyd.detect.card import SCORES, STRANGEST, VERDICT, histogram, promise
from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from anomalyd.detect.bundle import Manifest
    from anomalyd.train.report import Strange

__all__ = [
    "Training",
    "composed",
    "history_of",
    "made_from",
    "minutes_of",
    "write_card",
    "write_plain_card",
]


HISTORY = "## How it was made"


@dataclass(frozen=True)
class Training:
    """How the weights came about, for the card.

    Attributes:
        model: name of the density.
        data: the DATA argument.
        group: the --group argument.
        exclude: the --exclude argument.
        priors: what --prior said.
        labels: whether the classes were given.
        out: the bundle's folder, as it was named.
        counts: images by split.
        minutes: time spent in the loop.
        init: the bundle whose weights it started from, and
        minutes_before: the time spent on those.
        machine: what it ran on.
        images_per_second: training speed, on average.
        validation: best validation loss, and
        companions: whether it is the sum of the companions', the density itself being frozen.
        unit: what losses and parity are counted in.
        parity: largest difference between torch and onnxruntime.
        test: images in the test split, 0 where there is none.
        accuracy: of a classifier on the test split.
        history: of weights that were taken as they are, the section of their card that tells it.
        drawn: images in samples.png; 0 where there is none.
    """

    model: str
    data: str
    group: str | None
    exclude: str | None
    priors: dict[str, float]
    labels: bool
    out: str
    counts: dict[str, int]
    minutes: float
    machine: str
    images_per_second: float
    validation: float
    unit: str
    parity: float
    test: int
    accuracy: float | None = None
    init: str | None = None
    minutes_before: float = 0.0
    history: str | None = None
    drawn: int = 16
    companions: bool = False


def history_of(card: str) -> str:
    """Return the section of a card that says how its weights came about."""
    return card[card.index(HISTORY) :]


def made_from(card: str) -> tuple[str, str | None, str | None]:
    """Return the DATA, the --group and the --exclude of the command that a card ends with.

    Raises:
        BundleError: it ends with none.
    """
    found = re.search(r"^    anomalyd train (.*)$", card, re.MULTILINE)
    try:
        data, *options = shlex.split(found[1] if found else "")
    except ValueError:  # nothing, or a quote that never ends
        raise BundleError(
            "CARD.md: no command that says which data the bundle was trained on"
        ) from None
    said = dict(pairwise(options))
    return data, said.get("--group"), said.get("--exclude")


def composed(classifier: Path, density: Path, cards: list[str]) -> str:
    """Return the section on how a composed bundle came about, from the cards of its parts."""
    minutes = sum(map(minutes_of, cards))
    parts = shlex.join(map(str, (classifier, density)))
    return f"""{HISTORY}

| | |
|---|---|
| classifier | `{classifier}`: p(y|x), and with it the accuracy |
| density | `{density}`: p(x), and with it bits per dimension |
| training | {minutes:.1f} minutes, those of its parts; it was not trained itself |

log p(x|y) = log p(y|x) + log p(x) - log p(y), p(y) the share of y among the training images. The \
accuracy is the classifier's: what is new is p(x|y), and the rejection of what fits no class. \
One command makes it again:

    anomalyd compose {parts} --out again
"""


def minutes_of(card: str) -> float:
    """Return the minutes of training that a card states, those before its start included."""
    found = re.search(
        r"^\| training \| ([0-9.]+) minutes(?: after ([0-9.]+))?", card, re.MULTILINE
    )
    return sum(map(float, filter(None, found.groups()))) if found else 0.0


def write_card(
    manifest: Manifest,
    training: Training,
    scores: NDArray[np.float64],
    threshold: float | None,
    strangest: list[Strange],
) -> str:
    """Return the card as Markdown.

    Args:
        manifest: of the bundle.
        training: how it was trained.
        scores: calibration scores, ascending.
        threshold: what a score must exceed to be an outlier at the default alpha; None: none can.
        strangest: held-out normals, strangest first.
    """
    spec = manifest.image
    bound = (
        ""
        if manifest.likelihood == "exact"
        else f" (a lower bound on log p, {manifest.likelihood})"
    )
    test = manifest.bits_per_dim["test"]
    if test is not None:
        measured = f"{test:.4f} bits/dim{bound} on the {training.test:,} images of the test split"
    elif training.companions:
        measured = f"bits/dim are those of `{training.init}`; no test split"
    else:
        measured = (
            f"{training.validation:.4f} bits/dim{bound} on the validation split; no test split"
        )
    kind = "images"
    if spec.tiled:
        kind = f"tiles of photographs, scaled down by {spec.shrink},"
    per_class = f" for each of {len(manifest.classes)} classes" if manifest.classes else ""
    strange = "\n".join(
        f"| {place} | `{item.name}` | {item.p_value:.4f} | {item.bits_per_dim:.3f} |"
        for place, item in enumerate(strangest, start=1)
    )
    return f"""# {manifest.name}

A `{training.model}` density{per_class} of {spec.height}x{spec.width} {kind} with {spec.channels} \
channel(s), {manifest.parameters:,} parameters: {measured}.

## {VERDICT}

{promise(manifest)}

{_score(manifest)} `anomalyd evaluate` measures what is caught.{_labels(manifest, training)}

## {SCORES}

{histogram(scores, threshold)}

{_drawn(training)}## {STRANGEST}

Real folders of normal images hide a few that are not. Look at these; names of wrong ones go into \
a file for `anomalyd train --exclude FILE`. At {len(strangest)} of {manifest.calibration_n:,}, \
small p-values are expected: they are the {len(strangest)} smallest.

| | image | p-value | bits/dim |
|---|---|---|---|
{strange}

{_history(manifest, training)}"""


def _drawn(training: Training) -> str:
    if not training.drawn:
        return ""
    return f"""## Drawn from it

![{training.drawn} images drawn at temperature 1](samples.png)

What `anomalyd sample -n {training.drawn}` draws, at temperature 1.

"""


def _labels(manifest: Manifest, training: Training) -> str:
    """What labels say and what is promised of them; nothing without labels."""
    if manifest.temperature is None or not manifest.classes:
        return ""
    accuracy = ""
    if training.accuracy is not None:
        accuracy = (
            f" Of the {training.test:,} images of the test split {training.accuracy:.4f} have "
            "their own class as the likeliest."
        )
    approximate = ""
    if manifest.likelihood != "exact":
        approximate = (
            f" The likelihoods are lower bounds ({manifest.likelihood}), so the posterior is "
            "approximate."
        )
    return f"""

## What its labels mean

The classes are {", ".join(manifest.classes)}. p(y|x) is Bayes' rule on p(x|y), at temperature \
{manifest.temperature:.4g}.{accuracy}{approximate}

Each class has its own ranks, for which {manifest.doubt:g} is added to the score for each nat by \
which another class is likelier: an image is `novel`, an outlier, if it is one to every class. Of \
the images of each class at most a share alpha is called novel, on average over calibration sets. \
An image that fits is `ambiguous` unless one label alone is credible: the set of credible labels \
holds the true one in 9 of 10 normal images (`--label-alpha`). That is coverage, not accuracy \
among accepted labels."""


def _score(manifest: Manifest) -> str:
    """What the score is, and what it is not."""
    if manifest.image.tiled:
        return (
            "The score says how unusual the neighbourhoods of the photograph's pixels are, the "
            "log of the mean over all pixels of 1 / (share of normal pixels, as far from the "
            "border, that are as unusual), and, where the surface has a grain, how sharply it "
            "changes from line to line; 0 is typical. The heat map shows the shares of pixels and "
            "of lines; nothing is promised of it, nor about outliers: a drift of brightness over "
            "the whole photograph passes, and what lies within the variety of the normal surface."
        )
    names = ", ".join(f"`{name}`" for name in manifest.statistics)
    columns = f"{1 + len(manifest.statistics)} columns made comparable by their ranks"
    where = f"in {columns}: -log p(x) and the statistics {names}"
    if manifest.score_name != "density_of_states" and "embedding" in manifest.outputs:
        where += "; or how far its code is from theirs, whichever is stranger"
    theirs = "normal images that were set aside to fit it"
    if manifest.temperature is not None:
        theirs = "images of the class that suits it best, of those set aside to fit it"
    return (
        f"The score says how far an image is from the nearest of the {theirs}, {where}. It is no "
        "probability, and nothing is promised about outliers: flips, small changes of contrast "
        "and other images with the statistics of normal ones pass."
    )


def write_plain_card(manifest: Manifest, training: Training) -> str:
    """Return the card of a classifier or an autoencoder, which have no density to promise with."""
    spec, what = manifest.image, f"{manifest.kind} of"
    if manifest.classes:
        names = ", ".join(manifest.classes)
        what = f"classifier into {len(manifest.classes)} classes ({names}) of"
    measured = (
        f"accuracy {training.accuracy:.4f} on the {training.test:,} images of the test split"
        if training.accuracy is not None
        else f"{training.validation:.4f} {training.unit} on the validation split"
    )
    return f"""# {manifest.name}

A `{training.model}`, a {what} {spec.height}x{spec.width} images with {spec.channels} \
channel(s), {manifest.parameters:,} parameters: {measured}.

It has no density: it neither scores how usual an image is nor draws one, and gives some answer \
to every image, however strange. `anomalyd embed` writes its features; `anomalyd train --init` \
starts another model from them.

{_history(manifest, training)}"""


def _history(manifest: Manifest, training: Training) -> str:
    if training.history is not None:
        return training.history
    counts = ", ".join(f"{name} {count:,}" for name, count in training.counts.items())
    options = " --labels" if training.labels else ""
    if training.group:
        options += f" --group {shlex.quote(training.group)}"
    if training.exclude:
        options += f" --exclude {shlex.quote(training.exclude)}"
    for name, share in training.priors.items():
        options += f" --prior {shlex.quote(f'{name}={share}')}"
    before, holds = "", "every setting. One command trains it again"
    if training.init:
        options += f" --init {shlex.quote(training.init)}"
        before = f" after {training.minutes_before:.1f} of the weights it started from"
        holds = (
            "the settings of this last part, not of the weights that it started from. One command "
            f"trains this part again, from the weights that `{training.init}` has now"
        )
    recipe = shlex.quote(f"{training.out}/recipe.toml")
    alone = " of the companions together; the density was frozen" if training.companions else ""
    return f"""{HISTORY}

| | |
|---|---|
| data | `{training.data}`; {counts} (digest `{manifest.data_digest[:16]}`) |
| licence | {manifest.licence} |
| training | {training.minutes:.1f} minutes{before}, {training.images_per_second:,.0f} images/s, \
{training.machine} |
| validation | {training.validation:.4f} {training.unit}{alone} |
| torch against onnxruntime | {training.parity:.1e} {training.unit} at most |

`recipe.toml` holds {holds}:

    anomalyd train {shlex.quote(training.data)}{options} --recipe {recipe} --out again
"""
