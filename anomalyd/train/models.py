"""The table of models: a name, the class behind it (imported late), and its recipe.

Adding a model: one file in `density/`, one recipe in `train/recipes/`, one line here.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from anomalyd.config import check_key
from anomalyd.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anomalyd.density.base import Model
    from anomalyd.images import ImageSpec

__all__ = ["MODELS", "build"]

MODELS = {
    "gated-pixelcnn": "anomalyd.density.gated_pixelcnn:GatedPixelCNN",
    "pixelcnn": "anomalyd.density.pixelcnn:PixelCNN",
    "pixelcnn++": "anomalyd.density.pixelcnnpp:PixelCNNPP",
    "row-lstm": "anomalyd.density.pixelrnn:RowLSTM",
    "diagonal-bilstm": "anomalyd.density.pixelrnn:DiagonalBiLSTM",
    "multiscale": "anomalyd.density.multiscale:Multiscale",
    "vae": "anomalyd.density.vae:VAE",
    "hvae": "anomalyd.density.hvae:HVAE",
    "autoencoder": "anomalyd.density.autoencoder:Autoencoder",
    "classifier": "anomalyd.density.classifier:Classifier",
}


def build(name: str, spec: ImageSpec, options: Mapping[str, Any], classes: int = 0) -> Model:
    """Make the model `name` for images of `spec`, with untrained weights.

    Args:
        name: a key of `MODELS`.
        spec: image shape and levels.
        options: the recipe's [density] table, the keyword arguments of the class.
        classes: K where the images are labelled, 0 where they are not.

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
    for key in options:
        check_key(key, known, f"recipe of {name} [density]")
    shape = ImageShape(spec.height, spec.width, spec.channels, spec.levels)
    takes_classes = "classes" in signature
    if classes and not takes_classes:
        raise UsageError(
            f"--labels: {name} takes no classes; leave it out or choose another model"
        )
    try:
        return model(shape, **({"classes": classes} if takes_classes else {}), **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error
