"""Recipes: a TOML file that says which density, on which images, trained how.

model = "gated-pixelcnn"
[image]      anomalyd.images.ImageSpec; what is not given is read off the first image
[density]    keyword arguments of the density's class
[local]      of a PixelCNN beside it, and
[vae]        of a variational autoencoder: companions, each where its table stands
[classifier] of what tells classes apart, where the density was composed with one
[train]      anomalyd.train.settings.TrainSettings
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from anomalyd.config import check_key, from_table
from anomalyd.detect.bundle import read_bundle
from anomalyd.errors import UsageError
from anomalyd.train.models import MODELS
from anomalyd.train.settings import TrainSettings

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Recipe", "default_recipe", "parse_recipe", "read_recipe", "recipe_of"]

IMAGE_KEYS = ("height", "width", "channels", "levels", "resize", "on_mismatch", "shrink")
TABLES = ("model", "image", "density", "local", "vae", "classifier", "train")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained; the data and the machine are not part of it."""

    model: str
    image: dict[str, Any] = field(default_factory=dict)
    density: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    classifier: dict[str, Any] | None = None
    train: TrainSettings = field(default_factory=TrainSettings)

    def to_toml(self) -> str:
        """Return the recipe as TOML text that `read_recipe` reads back."""
        lines = [f"model = {_value(self.model)}"]
        for name, table in (
            ("image", self.image),
            ("density", self.density),
            ("local", self.local),
            ("vae", self.vae),
            ("classifier", self.classifier),
            ("train", asdict(self.train)),
        ):
            if table is None:
                continue
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_value(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"


def default_recipe(model: str) -> Recipe:
    """Return the recipe that comes with a model.

    Raises:
        UsageError: no such model.
    """
    if model not in MODELS:
        raise UsageError(f"--model {model}: no such model; there are {', '.join(MODELS)}")
    text = (files("anomalyd.train") / "recipes" / f"{model}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, f"recipe {model}")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: unreadable, not TOML, an unknown key or a value out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {path} cannot be read: {error}") from error
    return parse_recipe(text, str(path))


def recipe_of(bundle: Path) -> Recipe:
    """Return the recipe that a bundle was trained by."""
    text = read_bundle(bundle).read("recipe.toml").decode()
    return parse_recipe(text, f"{bundle}/recipe.toml")


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse recipe text; `where` names it in errors, which are those of `read_recipe`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from error
    for key in raw:
        check_key(key, TABLES, where)
    if not isinstance(raw.get("model"), str):
        raise UsageError(f"{where}: model must name one of {', '.join(MODELS)}")
    for table in TABLES[1:]:
        if not isinstance(raw.get(table, {}), dict):
            raise UsageError(f"{where}: {table} must be a table, [{table}]")
    image = raw.get("image", {})
    for key in image:
        check_key(key, IMAGE_KEYS, f"{where} [image]")
    return Recipe(
        model=raw["model"],
        image=image,
        density=raw.get("density", {}),
        local=raw.get("local"),
        vae=raw.get("vae"),
        classifier=raw.get("classifier"),
        train=from_table(TrainSettings, raw.get("train", {}), f"{where} [train]"),
    )


def _value(value: Any) -> str:
    # TOML's strings, numbers, booleans and arrays of these are written as in JSON.
    return json.dumps(list(value) if isinstance(value, tuple) else value)
