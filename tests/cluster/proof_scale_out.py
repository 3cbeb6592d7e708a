"""README's "Scale out", run as it stands, in a folder that holds what a clone holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import KEYS, LOOPBACK, ROOT, png

from anomalyd.sources import open_source

pytestmark = pytest.mark.by("Ray, torchrun, moto")

LINES = re.findall(
    r"^\$ (.*)$", (ROOT / "README.md").read_text().split("## Scale out")[1].split("\n## ")[0], re.M
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Links to the fixtures and a copy of no bundle but the one that is named."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "trained").mkdir()
    (folder / "trained" / "fashion-mnist-vae").symlink_to(ROOT / "trained" / "fashion-mnist-vae")
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "anomalyd").symlink_to(ROOT / "anomalyd")
    return folder


@pytest.fixture(scope="module")
def buckets(store) -> None:
    """What the third line names: a bucket of 200 pictures, and one for scores."""
    for name in ("photographs", "scores"):
        store.create_dir(name)
    for number, item in enumerate(open_source(ROOT / "tests/fixtures/mnist", split="test")):
        with store.open_output_stream(f"photographs/{number:03d}.png") as stream:
            stream.write(png(item.payload))


def run(line: str, folder: Path, **environment: str) -> tuple[int, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, timeout=1800,
        env=os.environ | LOOPBACK | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_there_are_five_lines_and_the_first_installs():
    assert len(LINES) == 5
    assert LINES[0].startswith("pip install")


def test_this_machine_scores(clone):
    """The second line starts a cluster of its own, which says what the local engine says."""
    here = run(LINES[1].replace("--engine ray --output scores/", "--output here.parquet"), clone)
    assert here[0] == 0
    assert here[1].startswith("200 images, ")
    assert run(LINES[1], clone) == here
    assert sorted(path.name for path in (clone / "scores").iterdir())[-1] == "part-000000.parquet"


def test_a_cluster_scores_a_bucket(clone, nodes, buckets, s3):
    """The third finds the cluster that runs here, and a bucket in it."""
    environment = KEYS | {"AWS_ENDPOINT_URL": s3, "RAY_ADDRESS": nodes.address}
    code, said = run(LINES[2], clone, **environment)
    assert code == 0, said
    assert said.splitlines()[-1].startswith("200 images, ")


def test_two_workers_train(clone):
    """The fourth leaves a bundle."""
    code, said = run(LINES[3], clone)
    assert code == 0, said
    assert (clone / "trained" / "mine" / "manifest.json").exists()


def test_each_folder_is_trained(clone):
    """The fifth makes two bundles and names the folder of five pictures, too few for one."""
    code, said = run(LINES[4], clone)
    assert code == 3, said
    assert "images: training needs at least 8 independent images" in said
    assert "2 models trained, 1 failed: images" in said
