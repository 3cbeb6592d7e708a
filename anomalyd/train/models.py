"""The table of models: a name, the class behind it (imported late), and its recipe.

Adding a model: one file in `density/`, one recipe in `train/recipes/`, one line here.
"""

from __future__ import annotations

import importlib
import inspect
import math
from typing import TYPE_CHECKING, Any, cast

from anomalyd.config import check_key
from anomalyd.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalyd.density.base import Density, Model
    from anomalyd.images import ImageSpec
    from anomalyd.train.recipe import Recipe

__all__ = ["MODELS", "TOO_LARGE", "assemble", "build", "out_of_memory"]

MODELS = {
    "gated-pixelcnn": "anomalyd.density.gated_pixelcnn:GatedPixelCNN",
    "pixelcnn": "anomalyd.density.pixelcnn:PixelCNN",
    "pixelcnn++": "anomalyd.density.pixelcnnpp:PixelCNNPP",
    "row-lstm": "anomalyd.density.pixelrnn:RowLSTM",
    "diagonal-bilstm": "anomalyd.density.pixelrnn:DiagonalBiLSTM",
    "multiscale": "anomalyd.density.multiscale:Multiscale",
    "vae": "anomalyd.density.vae:VAE",
    "ccvae": "anomalyd.density.ccvae:CCVAE",
    "hvae": "anomalyd.density.hvae:HVAE",
    "autoencoder": "anomalyd.density.autoencoder:Autoencoder",
    "classifier": "anomalyd.density.classifier:Classifier",
}

FROM_ZERO = ("blocks", "label_blocks", "layers", "nearby", "readout", "shift")
"""Options of which a model may have none; all other whole numbers are at least 1."""

TOO_LARGE = (
    "does not fit into this machine's memory; lower what the recipe says of its size, such as "
    "features, kernel or dilations, the batch_size, or --image-size"
)


def assemble(
    recipe: Recipe, spec: ImageSpec, classes: int = 0, priors: Sequence[float] | None = None
) -> Model:
    """Make the model of a recipe, with its companions, and freeze what it says is frozen.

    Args:
        recipe: every setting.
        spec: image shape and levels.
        classes: K where the images are labelled, 0 where they are not.
        priors: p(y) of each class, where training weighs the posterior or a classifier is joined.

    Raises:
        UsageError: as `build`; companions of what is no density, nothing left to train, a
            posterior without classes.
    """
    composed = recipe.classifier is not None
    model = build(recipe.model, spec, recipe.density, 0 if composed else classes)
    if recipe.train.bayes:
        if not classes or model.kind != "density":
            raise UsageError(
                f"recipe [train] bayes: {recipe.train.bayes:g} weighs the posterior of a density "
                "with classes; train one with --labels or leave it out"
            )
        from anomalyd.density.base import Bayes

        log_priors = None if priors is None else tuple(map(math.log, priors))
        weigh = recipe.train
        cast("Density", model).bayes = Bayes(weigh.bayes, weigh.shift, weigh.mirror, log_priors)
    if recipe.local is not None or recipe.vae is not None:
        if model.kind != "density" or recipe.local is None:
            raise UsageError(
                f"recipe of {recipe.model}: [local] and [vae] stand beside a density, and [vae] "
                "beside [local]; leave them out or add what is missing"
            )
        from anomalyd.density.companions import Companions

        local = build("pixelcnn", spec, recipe.local, table="local")
        vae = None if recipe.vae is None else build("vae", spec, recipe.vae, table="vae")
        model = Companions(model, local, vae)  # type: ignore[arg-type]
    if composed:
        from anomalyd.density.composed import Composed

        classifier = build(
            "classifier", spec, recipe.classifier or {}, classes, table="classifier"
        )
        return Composed(model, classifier, priors)  # type: ignore[arg-type]
    for part in recipe.train.frozen:
        parts = [name for name, _ in model.named_modules() if name]
        check_key(part, parts, "recipe [train] frozen", kind="part")
        model.get_submodule(part).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("recipe [train] frozen: nothing is left to train; name fewer parts")
    return model


def build(
    name: str,
    spec: ImageSpec,
    options: Mapping[str, Any],
    classes: int = 0,
    *,
    table: str = "density",
) -> Model:
    """Make the model `name` for images of `spec`, with untrained weights.

    Args:
        name: a key of `MODELS`.
        spec: image shape and levels.
        options: a table of the recipe, the keyword arguments of the class.
        classes: K where the images are labelled, 0 where they are not.
        table: its name, for errors.

    Raises:
        UsageError: an unknown model or option, a value that the class refuses, classes that it
            cannot have or needs.
        MissingExtra: torch is not installed.
    """
    if name not in MODELS:
        raise UsageError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    module, attribute = MODELS[name].split(":")
    try:
        model = getattr(importlib.import_module(module), attribute)
        from anomalyd.density.base import ImageShape
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra("torch", "train") from error
    signature = inspect.signature(model).parameters
    known = [p.name for p in signature.values() if p.kind is p.KEYWORD_ONLY]
    where = f"recipe of {name} [{table}]"
    for key in options:
        check_key(key, known, where)
        _check_option(key, signature[key].annotation, options[key], where)
    shape = ImageShape(spec.height, spec.width, spec.channels, spec.levels)
    takes_classes = "classes" in signature
    if classes and not takes_classes:
        raise UsageError(
            f"--labels: {name} takes no classes; leave it out or choose another model"
        )
    try:
        return model(shape, **({"classes": classes} if takes_classes else {}), **options)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise UsageError(f"{name}: {TOO_LARGE}") from error
        raise UsageError(f"{name}: {' '.join(str(error).split())[:200]}") from error


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether it is torch's complaint about memory, which has no type of its own on a CPU."""
    return any(words in str(error) for words in ("allocate memory", "out of memory"))


def _check_option(key: str, kind: str, value: Any, where: str) -> None:
    """Refuse a value that the option's annotation in the class does not allow."""
    low = 0 if key in FROM_ZERO else 1

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= low

    must, fits = {
        "int": (f"a whole number of at least {low}", whole(value)),
        "tuple[int, ...]": (
            f"a list of whole numbers of at least {low}",
            isinstance(value, list | tuple) and bool(value) and all(map(whole, value)),
        ),
        # The only fractions are shares that are dropped. Written so that NaN is refused.
        "float": (
            "a number from 0 to less than 1",
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
        ),
        "bool": ("true or false", isinstance(value, bool)),
        "str": ("text", isinstance(value, str)),
    }[kind]
    if not fits:
        raise UsageError(f"{where}: {key} must be {must}, not {value!r}")
