"""Whole folders of models: one density for each sub-folder, each trained by a Ray task.

A model that is there is left alone and an interrupted one goes on, so that the same command again
trains what failed, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyd.errors import AnomalydError, UsageError
from anomalyd.scale.cluster import reason

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Trained", "members", "train_folders"]


@dataclass(frozen=True)
class Trained:
    """What became of one sub-folder; `error` is empty where its bundle is there."""

    name: str
    error: str = ""


def members(data: Path, out: Path) -> list[str]:
    """The sub-folders of DATA that have no bundle in OUT yet, sorted.

    Raises:
        UsageError: DATA is no folder of folders.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(data) if entry.is_dir())
    except OSError as error:
        raise UsageError(
            f"--per-folder {data}: the folder cannot be read: {error.strerror}"
        ) from error
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise UsageError(f"--per-folder {data}: it has no sub-folders to train on, one model each")
    return [name for name in names if not (out / name).exists()]


def train_folders(
    ray: ModuleType, data: Path, out: Path, names: list[str], options: dict[str, Any]
) -> Iterator[Trained]:
    """Train them, as many at once as the cluster has CPUs, or GPUs; yields each as it ends.

    Args:
        ray: connected.
        data: the folder of folders; every node sees it.
        out: folder of the bundles; every node sees it.
        names: of the sub-folders, from `members`.
        options: of `commands.train`, the same for all.
    """
    each: dict[str, int] = {"num_cpus": 1}
    if ray.cluster_resources().get("GPU") and options.get("device") != "cpu":
        each["num_gpus"] = 1
    # Ray tries again what dies with its node, and such a task goes on at its checkpoint; what an
    # error of ours has ended would end the same way again.
    task = ray.remote(max_retries=2, **each)(_train)
    folder = os.getcwd()
    running = {task.remote(folder, data / name, out / name, options): name for name in names}
    while running:
        ready, _ = ray.wait(list(running))
        name = running.pop(ready[0])
        try:
            yield Trained(name, ray.get(ready[0]))
        except ray.exceptions.RayError as error:
            yield Trained(name, f"Ray: {reason(error)}")


def _train(folder: str, data: Path, out: Path, options: dict[str, Any]) -> str:
    """One bundle; returns what went wrong, or nothing. What it tells goes to OUT.run/log.txt."""
    with suppress(OSError):
        os.chdir(folder)
    run = out.with_name(f"{out.name}.run")
    try:
        from anomalyd.train import commands

        run.mkdir(parents=True, exist_ok=True)
        with (run / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
            resume = (run / "job.json").exists()
            commands.train(data=str(data), out=out, **options | {"resume": resume})
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed on a node; run: pip install 'anomalyd[train]' there"
    except (AnomalydError, OSError) as error:
        return " ".join(str(error).split())
    return ""
