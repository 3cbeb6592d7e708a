"""What training tells on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["counting", "mute", "say", "training"]

LINE_SECONDS = 30.0


_muted = False


def mute() -> None:
    """Tell nothing from here on: of several workers one speaks."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Print one line to stderr."""
    if not _muted:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` images are done; yields a function that adds to it."""
    if _muted or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


@contextlib.contextmanager
def training(loss_name: str) -> Iterator[Callable[..., None]]:
    """Show steps, the loss by its name, images/s and the time left; yields a `loop.Progress`."""
    if sys.stderr.isatty() and not _muted:
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[loss]:.3f} " + loss_name),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=None, loss=0.0, speed=0.0)
            smooth: list[float] = []

            def draw(*, step: int, steps: int, loss: float, images_per_second: float) -> None:
                smooth[:] = [*smooth[-49:], loss]
                mean = sum(smooth) / len(smooth)
                progress.update(
                    task, completed=step, total=steps, loss=mean, speed=images_per_second
                )

            yield draw
        return
    last = 0.0

    def line(*, step: int, steps: int, loss: float, images_per_second: float) -> None:
        nonlocal last
        now = time.monotonic()
        if step == steps or now - last >= LINE_SECONDS:
            last = now
            speed = f"{images_per_second:,.0f} images/s"
            say(f"step {step:,}/{steps:,}  {loss:.3f} {loss_name}  {speed}")

    yield line
