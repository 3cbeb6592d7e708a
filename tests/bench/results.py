"""The results table of trained/README.md: every model, one row a bundle.

    python tests/bench/results.py [BUNDLE...]        default: every bundle in trained/

A bundle's row says what its manifest and card say and how fast onnxruntime scores it here; rows of
bundles that are not named stay as they were measured. The rows are kept in trained/results.json.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from anomalyd.detect.bundle import Bundle, find_bundles, read_bundle
from anomalyd.detect.golden import open_session
from anomalyd.train.card import minutes_of
from anomalyd.train.recipe import parse_recipe

TRAINED = Path(__file__).parents[2] / "trained"
RESULTS = TRAINED / "results.json"
BEGIN, END = "<!-- results: made by make bench -->\n", "<!-- end of results -->\n"
SECONDS = 2.0
HEADING = (
    "| bundle | model | parameters | test set | bits/dim | training | scoring | command |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def measured(bundle: Bundle) -> dict[str, Any]:
    """One row: what the bundle says of itself, and its speed."""
    manifest, card = bundle.manifest, bundle.read("CARD.md").decode()
    recipe = parse_recipe(bundle.read("recipe.toml").decode(), str(bundle.path))
    command = re.search(r"^    (anomalyd (?:train|compose) .*)$", card, re.MULTILINE)
    machine = re.search(r"^\| training \|.* images/s, (.*) \|$", card, re.MULTILINE)
    accuracy = re.search(r"accuracy ([0-9.]+) on|([0-9.]+) have their own class", card)
    return {
        "bundle": manifest.name,
        "model": recipe.model,
        "kind": manifest.kind,
        "classes": len(manifest.classes or ()),
        "levels": manifest.image.levels,
        "likelihood": manifest.likelihood,
        "parameters": manifest.parameters,
        "bits_per_dim": manifest.bits_per_dim["test"],
        "accuracy": float(accuracy[1] or accuracy[2]) if accuracy else None,
        "minutes": minutes_of(card) or None,
        "machine": machine[1] if machine else "",
        "images_per_second": images_per_second(bundle),
        "command": command[1] if command else "",
    }


def images_per_second(bundle: Bundle) -> float:
    """Images a second through the graph alone, best of a few runs."""
    session, image = open_session(bundle, device="cpu"), bundle.manifest.image
    shape = (8 * session.batch, image.height, image.width, image.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        session.run(images)
        best = max(best, len(images) / (time.perf_counter() - start))
    return round(best, 1)


def rendered(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, best bits/dim first within a data set."""

    def place(row: dict[str, Any]) -> tuple[str, float]:
        return data(row), row["bits_per_dim"] or 99.0

    return HEADING + "".join(map(line, sorted(rows, key=place)))


def data(row: dict[str, Any]) -> str:
    """The data set, by the command that trains on it, or by the name of the density composed."""
    words = row["command"].split()
    if "compose" in words:
        return Path(words[3]).name.rsplit("-", 1)[0]
    return words[2].rstrip("/").rsplit("/", 1)[-1] if words else ""


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    model = row["model"] + (f", {row['classes']} classes" if row["classes"] else "")
    model += f", {levels} levels" if (levels := row.get("levels", 256)) < 256 else ""
    if row["bits_per_dim"] is not None:
        found = f"{row['bits_per_dim']:.4f}"
        found += "" if row["likelihood"] == "exact" else f" ({row['likelihood']})"
        found += f", accuracy {row['accuracy']:.4f}" if row["accuracy"] else ""
    else:
        found = f"accuracy {row['accuracy']:.4f}" if row["accuracy"] else "no density"
    minutes = "" if row["minutes"] is None else f"{row['minutes']:.1f} min"
    if (machine := row.get("machine", "")) and not machine.endswith("core"):
        minutes += f", {machine.removeprefix('NVIDIA ').split()[0]}"
    cells = [
        row["bundle"],
        model,
        f"{row['parameters']:,}",
        data(row),
        found,
        minutes,
        f"{row['images_per_second']:,.0f}/s",
        f"`{row['command']}`",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    asked = parser.parse_args().bundles or find_bundles(TRAINED)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = {row["bundle"]: row for row in known}
    for path in asked:
        row = measured(read_bundle(path))
        rows[row["bundle"]] = row
        print(line(row), end="", flush=True)
    RESULTS.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")
    page = TRAINED / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + rendered(list(rows.values())) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
