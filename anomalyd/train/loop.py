"""The training loop: plain PyTorch, one page, exact to resume."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import platform
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import TrainingError
from anomalyd.train import checkpoint
from anomalyd.train.data import crops, dithered, per_tile
from anomalyd.train.muon import Muon
from anomalyd.train.weights import round_trained
from anomalyd.train.workers import ALONE, Workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anomalyd.density.base import Model
    from anomalyd.train.data import Photographs
    from anomalyd.train.settings import TrainSettings
    from anomalyd.train.splits import Splits

__all__ = ["Outcome", "Progress", "fit", "pick_device"]

VALIDATION_IMAGES = 1_000
"""A validation reads at most this many images: a mean over more would cost more than it tells."""


GAIN = 1e-4
"""What a validation must gain on the last that did, for patience to begin anew."""


LOST = 1_000.0
"""A loss from which no training comes back, in any unit: a guess costs 8 bits per dimension."""


class Progress(Protocol):
    """What the loop tells whoever watches."""

    def __call__(
        self, *, step: int, steps: int, loss: float, images_per_second: float
    ) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended; the model holds the best averaged weights.

    Attributes:
        steps: steps taken.
        budget: steps planned.
        steps_per_epoch: steps that read the training split once.
        images: images seen, repetitions counted.
        seconds: time spent training, over all resumed parts.
        validation: best validation loss, in the model's unit: bits per dimension (or its bound).
        stopped_early: validation had stopped improving.
        machine: what it ran on, and what the parts ran on that it continues.
    """

    steps: int
    budget: int
    steps_per_epoch: int
    images: int
    seconds: float
    validation: float
    stopped_early: bool
    machine: str


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`.

    Raises:
        TrainingError: `cuda` is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device; use --device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def fit(
    model: Model,
    pixels: NDArray[np.uint8] | Photographs,
    splits: Splits,
    settings: TrainSettings,
    folder: Path,
    *,
    labels: NDArray[np.int64] | None = None,
    device: torch.device,
    minutes: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> Outcome:
    """Minimise `model.loss` over the training split; keep the best averaged weights.

    Args:
        model: trained in place.
        pixels: uint8 (N, H, W, C), or photographs, which are read in random crops.
        splits: which rows train and which validate.
        settings: the [train] table.
        folder: where checkpoint.safetensors and history.csv live.
        labels: int64 (N,), the class of each row, where there are classes.
        device: where to train.
        minutes: replaces `settings.epochs`: turned into steps after a short timing, and stored,
            so that a resumed run keeps its schedule.
        resume: continue from the checkpoint in `folder`.
        progress: called after each step.
        workers: those that share each batch.

    Raises:
        TrainingError: nothing to resume, a checkpoint of another model, a loss beyond return.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    run = _Run(model, pixels, labels, splits, settings, folder, device, workers)
    if resume:
        run.restore()
    else:
        if workers.first:
            run.history.unlink(missing_ok=True)
        run.budget = run.steps_for(minutes)
    workers.seed(settings.seed, run.step)
    try:
        if run.due:  # interrupted before it; or no training, a bundle made anew
            run.validate()
        while run.step < run.budget and not run.stopped:
            with _whole():
                loss = run.train_step()
            if progress is not None:
                progress(
                    step=run.step,
                    steps=run.budget,
                    loss=loss,
                    images_per_second=run.images_per_second,
                )
            if run.due:
                run.validate()
            if run.stopwatch.since_mark() >= settings.checkpoint_seconds:
                run.save()
    except KeyboardInterrupt:
        run.save()
        raise
    run.save()
    model.load_state_dict(run.best.state_dict())
    if settings.half and run.step:
        round_trained(model)
    model.to("cpu").eval()
    return Outcome(
        steps=run.step,
        budget=run.budget,
        steps_per_epoch=run.batches_per_epoch,
        images=run.step * min(settings.batch_size, len(run.rows)),
        seconds=run.stopwatch.total(),
        validation=run.best_loss,
        stopped_early=run.stopped,
        machine=", then ".join(run.machines),
    )


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Hold Ctrl-C back until a step is whole, for a checkpoint of half a step resumes wrongly.

    A second Ctrl-C does not wait.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Only the main thread gets signals, and whoever ignores them or listens elsewhere goes on so.
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = False

    def hold(number: int, frame: object) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


class _Stopwatch:
    """Seconds of this run and of those it continues, and seconds since a mark."""

    def __init__(self) -> None:
        self.before = 0.0
        self.start = self.marked = time.monotonic()

    def total(self) -> float:
        return self.before + time.monotonic() - self.start

    def since_mark(self) -> float:
        return time.monotonic() - self.marked

    def mark(self) -> None:
        self.marked = time.monotonic()


class _Run:
    """The state of a run: all of it goes into a checkpoint."""

    def __init__(
        self,
        model: Model,
        pixels: NDArray[np.uint8] | Photographs,
        labels: NDArray[np.int64] | None,
        splits: Splits,
        settings: TrainSettings,
        folder: Path,
        device: torch.device,
        workers: Workers,
    ) -> None:
        self.workers = workers
        workers.same(model)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pixels, self.labels = pixels, labels
        self.settings, self.device = settings, device
        self.rows = per_tile(pixels, splits.train)
        validation = per_tile(pixels, splits.validation)
        count = min(len(validation), VALIDATION_IMAGES)
        # Evenly spaced, for data may lie sorted by class.
        self.validation = validation[np.arange(count) * len(validation) // count]
        self.checkpoint, self.history = folder / "checkpoint.safetensors", folder / "history.csv"
        self.average = _averaged(model, settings.ema)
        self.best = AveragedModel(model).module
        self.optimizers = _optimizers(model, settings)
        self.peaks = [group["lr"] for opt in self.optimizers for group in opt.param_groups]
        self.batches_per_epoch = max(1, len(self.rows) // settings.batch_size)
        self.autocast = _bfloat16_pays(device)
        self.loss = model.loss
        if settings.compile and _can_compile(device):
            # A compiler that fails slows training down; it does not end it.
            torch._dynamo.config.suppress_errors = True
            self.loss = torch.compile(model.loss, dynamic=False)
        self.step = self.budget = self.bad = 0
        self.validated = -1  # the step of the last validation
        self.best_loss = self.bar = math.inf
        self.images_per_second = 0.0
        self.epoch_order = (-1, self.rows)
        self.machines = [_machine(device)]
        self.stopwatch = _Stopwatch()

    @property
    def every(self) -> int:
        return max(1, self.budget // self.settings.evaluations)

    @property
    def due(self) -> bool:
        """Whether the present weights are to be validated, and have not been."""
        planned = self.step == self.budget or (self.step > 0 and self.step % self.every == 0)
        return planned and self.step != self.validated

    @property
    def stopped(self) -> bool:
        return self.bad >= self.settings.patience

    def steps_for(self, minutes: float | None) -> int:
        """Turn epochs, or minutes after timing a few steps, into a number of steps."""
        if minutes is None:
            steps = round(self.settings.epochs * self.batches_per_epoch)
            return max(1, steps) if self.settings.epochs else 0
        # Timed on copies of weights and moments: the run itself starts from its seed.
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.budget = 1_000_000
        began, steps = time.monotonic(), 0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            while self.workers.told(
                steps < 3 or (time.monotonic() - began < min(10.0, minutes * 6) and steps < 200)
            ):
                self.train_step()
                steps += 1
                if steps == 2:  # the first steps allocate and choose kernels
                    began, warm = time.monotonic(), steps
        seconds = (time.monotonic() - began) / (steps - warm)
        self.model.load_state_dict(state)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.average = _averaged(self.model, self.settings.ema)
        self.step, self.stopwatch = 0, _Stopwatch()
        return self.workers.told(max(1, int(minutes * 60 / seconds)))

    def train_step(self) -> float:
        """Take one step; return its loss."""
        began = time.monotonic()
        scale = _schedule(self.step, self.budget, self.settings.warmup)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            batch, share = self.batch(self.step)
            loss = self.loss(*batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        value = self.workers.average(self.model.parameters(), loss, share)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        if not value < LOST:  # nor is it when it is not a number
            raise TrainingError(
                f"the loss became {value:,.0f} at step {self.step:,}, from which no training "
                f"comes back; lower learning_rate ({self.settings.learning_rate:g}) and "
                f"adamw_learning_rate ({self.settings.adamw_learning_rate:g}) in the recipe and "
                "start again"
            )
        speed = min(self.settings.batch_size, len(self.rows)) / (time.monotonic() - began)
        self.images_per_second += (speed - self.images_per_second) * (
            0.02 if self.step > 50 else 0.2
        )
        return value

    def batch(self, step: int) -> tuple[tuple[torch.Tensor, torch.Tensor | None], float]:
        """Return this worker's images of a step, and their share of all.

        Which ones all of them are depends on the seed and the step alone.
        """
        epoch, position = divmod(step, self.batches_per_epoch)
        if self.epoch_order[0] != epoch:
            generator = np.random.default_rng([self.settings.seed, epoch])
            self.epoch_order = (epoch, generator.permutation(self.rows))
        size = self.settings.batch_size
        rows = self.epoch_order[1][position * size : (position + 1) * size]
        mine = self.workers.share(np.sort(rows))
        seed = [self.settings.seed, 0, step, *([self.workers.rank] * (not self.workers.first))]
        return self.rows_of(mine, seed), len(mine) / len(rows)

    def rows_of(
        self, rows: NDArray[np.int64], seed: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return images uint8 (N, H, W, C) and labels int64 (N,) on the device."""
        pixels = crops(self.pixels, rows, seed)
        if self.settings.dither:
            pixels = dithered(pixels, self.model.shape.levels, seed)
        images = torch.from_numpy(pixels).to(self.device)
        if self.labels is None:
            return images, None
        return images, torch.from_numpy(self.labels[rows]).to(self.device)

    @torch.no_grad()
    def validate(self) -> None:
        """Score the averaged weights on the validation split and remember the best."""
        averaged = cast("Model", self.average.module)
        averaged.eval()
        size = self.settings.batch_size * 2
        losses = [
            # The same crops and the same levels every time.
            averaged.losses(*self.rows_of(self.validation[start : start + size], [0, 1, start]))
            .double()
            .sum()
            for start in range(0, len(self.validation), size)[
                self.workers.rank :: self.workers.size
            ]
        ]
        loss = self.workers.total(math.fsum(value.item() for value in losses))
        loss /= len(self.validation)
        with _whole():
            self.note(averaged, loss)

    def note(self, averaged: Model, loss: float) -> None:
        """Keep what a validation has found."""
        self.validated = self.step
        # The last steps of a run gain little each, and all are kept; patience asks for more.
        if loss < self.best_loss:
            self.best.load_state_dict(averaged.state_dict())
            self.best_loss = loss
        if loss < self.bar - GAIN:
            self.bar, self.bad = loss, 0
        else:
            self.bad += 1
        if not self.workers.first:
            return
        new = not self.history.exists()
        with self.history.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(
                    ["step", "seconds", "images_per_second", f"validation_{self.model.unit}"]
                )
            row = [self.step, round(self.stopwatch.total(), 1), round(self.images_per_second, 1)]
            writer.writerow([*row, round(loss, 5)])

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "average": self.average, "best": self.best}

    def save(self) -> None:
        """Write a checkpoint."""
        if not self.workers.first:
            return
        progress = {
            "step": self.step,
            "budget": self.budget,
            "validated": self.validated,
            "bad": self.bad,
            "best": self.best_loss if math.isfinite(self.best_loss) else None,
            "bar": self.bar if math.isfinite(self.bar) else None,
            "seconds": self.stopwatch.total(),
            "machines": self.machines,
        }
        checkpoint.save(self.checkpoint, self.modules(), self.optimizers, progress)
        self.stopwatch.mark()

    def restore(self) -> None:
        """Continue from the checkpoint."""
        if not self.checkpoint.exists():
            raise TrainingError(
                f"there is nothing to resume: {self.checkpoint} does not exist; "
                "train without --resume"
            )
        progress = checkpoint.load(self.checkpoint, self.modules(), self.optimizers)
        self.step, self.budget, self.bad = progress["step"], progress["budget"], progress["bad"]
        self.best_loss = math.inf if progress["best"] is None else progress["best"]
        self.bar = self.best_loss if progress.get("bar") is None else progress["bar"]
        self.validated = progress.get("validated", self.step)
        if self.workers.first and self.history.exists():
            # Validations after the checkpoint, before a kill, are done again.
            header, *rows = self.history.read_bytes().splitlines(keepends=True) or [b""]
            steps = [row.split(b",")[0] for row in rows]
            kept = [
                row
                for row, step in zip(rows, steps, strict=True)
                if step.isdigit() and int(step) <= self.validated
            ]
            self.history.write_bytes(b"".join([header, *kept]))
        self.stopwatch.before = progress["seconds"]
        # A run that has taken all its steps only writes its bundle here.
        here = self.machines if self.step < self.budget and not self.stopped else []
        before = progress.get("machines", [])
        self.machines = list(dict.fromkeys([*before, *here])) or self.machines


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{available_cpus()} x {platform.machine()} core"


def _averaged(model: Model, decay: float) -> AveragedModel:
    """Return an exponential moving average whose memory grows with the run, up to `decay`."""

    def update(averaged: Any, current: Any, n: torch.Tensor | int) -> None:
        ramp = (1 + int(n)) / (10 + int(n))
        get_ema_multi_avg_fn(min(decay, ramp))(averaged, current, n)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=False)


def _schedule(step: int, budget: int, warmup: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then half a cosine down to 1 %."""
    ramp = min(1.0, (step + 1) / max(1, min(warmup, budget // 10)))
    return ramp * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / budget))) / 2)


def _optimizers(model: Model, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Kernels by `settings.optimizer`; those under the model's `edges`, and vectors, by AdamW.

    Whatever has two dimensions or more counts as a kernel: vectors of classes, too, and first
    layers that `edges` does not name.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kernels = [p for name, p in parameters.items() if p.ndim >= 2 and not model.is_edge(name)]
    chosen = {id(p) for p in kernels}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    vectors = {"params": rest, "lr": settings.adamw_learning_rate}
    matrices = {"params": kernels, "lr": settings.learning_rate}
    muon = settings.optimizer == "muon"
    # What is frozen may leave none of one sort, and no optimizer takes nothing.
    by_adamw = [group for group in ([vectors] if muon else [vectors, matrices]) if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if by_adamw:
        optimizers.append(torch.optim.AdamW(by_adamw, betas=(0.9, 0.99), weight_decay=0.0))
    if muon and kernels:
        optimizers.append(Muon(kernels, lr=settings.learning_rate))
    return optimizers


def _bfloat16_pays(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 natively; emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


def _can_compile(device: torch.device) -> bool:
    """Tell whether torch.compile has what it needs: on the CPU, a C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return device.type == "cuda" or any(shutil.which(name) for name in compilers if name)
