"""`anomalyd compose`: a classifier and a density, each trained already, become one bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from anomalyd.detect.bundle import Bundle, read_bundle
from anomalyd.errors import UsageError
from anomalyd.sources import open_source
from anomalyd.train import card
from anomalyd.train.bundling import Trained, class_shares, write
from anomalyd.train.data import claim, classes_of, excluded, gather, reopen
from anomalyd.train.loop import Outcome
from anomalyd.train.models import assemble
from anomalyd.train.progress import counting
from anomalyd.train.recipe import recipe_of
from anomalyd.train.splits import split
from anomalyd.train.weights import unpack_weights

__all__ = ["compose"]


def compose(
    classifier: Path, density: Path, *, out: Path, data: str | None, licence: str | None
) -> int:
    """Join a classifier and a density into one bundle, and calibrate it class by class.

    Nothing is trained. The score is fitted and calibrated on the images that the density was,
    which is why both must have been trained on the same data, split alike.

    Args:
        classifier: a bundle, p(y|x).
        density: a bundle without classes, p(x).
        out: the bundle to write.
        data: the labelled images of both; None takes what the density's card names.
        licence: of the weights; None takes the density's.

    Raises:
        UsageError: parts that do not go together, or images that they were not trained on.
        AnomalydError: as `commands.train`.
    """
    if out.exists():
        raise UsageError(f"--out {out} exists; choose another name or remove it first")
    parts = [read_bundle(classifier), read_bundle(density)]
    cards = [part.read("CARD.md").decode() for part in parts]
    given, group, exclude = _checked(parts, cards)
    data = data or given
    listing = Path(exclude) if exclude else None
    if listing and not listing.is_file():
        raise UsageError(
            f"{density} was trained with --exclude {exclude}, and there is no such file here; put "
            "it back"
        )
    spec, seed = parts[1].manifest.image, recipe_of(density).train.seed
    source = open_source(data, split="train", labels=True, group=group)
    folder = out.with_name(f"{out.name}.run")
    claim(folder)
    with counting("decoding", len(source)) as advance:
        gather(source, spec, folder, exclude=excluded(listing), advance=advance)
    images = reopen(folder)
    if images.digest != parts[1].manifest.data_digest:
        without = f" without those that {exclude} names" if exclude else ""
        raise UsageError(
            f"--data {data}{without}: not the images that {density} was trained on, which its "
            "splits are made from; give those"
        )
    classes, labels = classes_of(images)
    theirs = parts[0].manifest.classes or []
    if classes != theirs:
        raise UsageError(
            f"--data {data}: its classes are {', '.join(classes)}, and those of {classifier} "
            f"{', '.join(theirs)}"
        )
    recipe = recipe_of(density)
    recipe = dataclasses.replace(
        recipe,
        classifier=recipe_of(classifier).density,
        # Where there are classes the score reads the codes, whatever the density's own does.
        train=dataclasses.replace(recipe.train, codes=True),
    )
    splits = split(images.hashes, images.groups, seed=seed)
    priors = class_shares(labels[splits.train], len(classes))
    model = assemble(recipe, spec, len(classes), priors)
    weights = {"log_prior": model.state_dict()["log_prior"]}
    for name, part in zip(("classifier", "density"), parts, strict=True):
        found = unpack_weights(part.read("weights.safetensors"), str(part.path))
        weights |= {f"{name}.{key}": value for key, value in found.items()}
    model.load_state_dict(weights)
    untrained = Outcome(0, 0, 1, 0, 0.0, math.nan, stopped_early=False, machine="")
    write(
        Trained(model.eval(), recipe, spec, images, splits, classes, labels, priors, untrained),
        data=data,
        group=group,
        licence=licence or parts[1].manifest.licence,
        out=out,
        folder=folder,
        history=card.composed(classifier, density, cards),
    )
    return 0


def _checked(parts: list[Bundle], cards: list[str]) -> tuple[str, str | None, str | None]:
    """See that parts go together; return DATA, and the --group and --exclude that both have."""
    names = [str(part.path) for part in parts]
    theirs, ours = (part.manifest for part in parts)
    for name, manifest, kind in zip(names, (theirs, ours), ("classifier", "density"), strict=True):
        if manifest.kind != kind:
            raise UsageError(f"{name} is of kind {manifest.kind}; give a {kind} there")
    if ours.classes is not None:
        raise UsageError(
            f"{names[1]} has classes of its own ({', '.join(ours.classes)}) and labels without a "
            "classifier; give a density that was trained without --labels"
        )
    if ours.image.tiled:
        raise UsageError(
            f"{names[1]} scores photographs by their texture, which knows no classes; give a "
            "density that was trained without --on-mismatch tile"
        )
    seeds = [recipe_of(part.path).train.seed for part in parts]
    made = [card.made_from(text) for text in cards]
    for what, one, other in (
        ("images", theirs.image, ours.image),
        ("--exclude", made[0][2], made[1][2]),
        ("training data", theirs.data_digest, ours.data_digest),
        ("--seed", *seeds),
        ("--group", made[0][1], made[1][1]),
    ):
        if one != other:
            raise UsageError(
                f"{names[0]} and {names[1]} differ in their {what} ({one} and {other}), so images "
                "held out from one may have trained the other; train both alike"
            )
    return made[1]
