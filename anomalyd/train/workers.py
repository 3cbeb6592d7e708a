"""Data-parallel training: the processes that torchrun starts share every batch among them.

    torchrun --nproc-per-node 2 -m anomalyd train ...

Each worker takes its share of a batch, and gradients are averaged with the shares as weights, so
that a step is what one process takes at the same batch size, whatever the number of workers. All
then update the same weights alike. The first one alone reads the data, keeps the checkpoint and
writes the bundle; the run's folder must be one that every worker sees.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import TrainingError, UsageError
from anomalyd.train.progress import mute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["ALONE", "Workers", "join"]

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
PATIENCE = timedelta(days=1)  # others wait while the first decodes a large data set


@dataclass(frozen=True)
class Workers:
    """This process among those that train one model.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank, local_size: likewise, on this machine.
        launched: torchrun started it, if only it alone.
        restarted: torchrun has started it again, after one of them died.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this one reads, tells and writes."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """CPU threads of this worker: its share of what the machine leaves to all.

        OMP_NUM_THREADS says how many, unless torchrun is who has set it.
        """
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if asked.isdigit() and not self.launched:
            return max(1, int(asked))
        return max(1, available_cpus() // self.local_size)

    def device(self, device: torch.device) -> torch.device:
        """A GPU of its own, where training is on GPUs."""
        if device.type != "cuda":
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of a batch that this one takes, in their order.

        Raises:
            UsageError: there are more workers than rows.
        """
        if len(rows) < self.size:
            raise UsageError(
                f"batch_size {len(rows)} in the recipe is less than one image for each of "
                f"{self.size} workers; start fewer, or raise it"
            )
        return rows[self.rank :: self.size]

    def seed(self, seed: int, step: int) -> None:
        """Others than the first draw noise of their own; it keeps the stream of a run alone."""
        if not self.first:
            sequence = np.random.SeedSequence([seed, self.rank, step])
            torch.manual_seed(int(sequence.generate_state(1)[0]))

    def same(self, model: nn.Module) -> None:
        """Give every worker the weights of the first."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._together(lambda tensor=tensor: dist.broadcast(tensor.data, 0))

    def average(self, parameters: Iterable[Tensor], loss: Tensor, share: float) -> float:
        """Average gradients and loss over the workers, each weighted by its share of the batch.

        Args:
            parameters: of the model; their gradients are replaced.
            loss: the mean over this one's images.
            share: of the batch, in (0, 1]; they add up to 1.

        Returns:
            the mean loss of the whole batch.
        """
        if self.size == 1:
            return loss.item()
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One message a step: the models are small, and what costs is the number of messages.
        flat = torch.cat([loss.detach().reshape(1), *(grad.reshape(-1) for grad in gradients)])
        flat *= share
        self._together(lambda: dist.all_reduce(flat))
        start = 1
        for grad in gradients:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        return flat[0].item()

    def total(self, value: float) -> float:
        """The sum over all workers."""
        if self.size == 1:
            return value
        summed = torch.tensor([value], dtype=torch.float64)
        self._together(lambda: dist.all_reduce(summed))
        return summed.item()

    def told(self, value: int) -> int:
        """The first one's value; what others have is dropped."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.int64)
        self._together(lambda: dist.broadcast(said, 0))
        return int(said.item())

    def prepared(self) -> None:
        """Called by the first once the run's folder is ready, by the others to wait for that."""
        try:
            self.told(0)
        except TrainingError:
            # The first has failed and said why.
            raise click.exceptions.Exit(1) from None

    def leave(self) -> None:
        """What follows needs no other worker, and the first one alone does it.

        The others end here, and at once: where the interpreter is taken down in order, a thread of
        gloo's that is still there aborts the process now and then, which torchrun takes for a
        death and starts all over again.
        """
        if self.size > 1:
            dist.destroy_process_group()
        if not self.first:
            os._exit(0)

    def _together(self, exchange: Any) -> None:
        if self.size == 1:
            return
        try:
            exchange()
        except RuntimeError as error:  # what gloo and nccl raise when a peer is gone
            raise TrainingError(
                f"worker {self.rank} of {self.size} lost the others: "
                f"{' '.join(str(error).split())[:120]}; go on with --resume, "
                "or let torchrun do it: --max-restarts 3"
            ) from None


ALONE = Workers()
"""One process, as `anomalyd train` starts it."""


def join() -> Workers:
    """This process's place among those that torchrun has started; alone if none has.

    Raises:
        TrainingError: the others cannot be reached.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    number = {name: int(os.environ[name]) for name in _NUMBERS}
    workers = Workers(
        number["RANK"],
        number["WORLD_SIZE"],
        number["LOCAL_RANK"],
        number["LOCAL_WORLD_SIZE"],
        launched=True,
        restarted=number["TORCHELASTIC_RESTART_COUNT"] > 0,
    )
    if not workers.first:
        mute()
    if workers.size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
            if workers.local_size == workers.size:
                # Dead workers have left their addresses in torchrun's store, which outlives them
                # (pytorch/pytorch#135712). Of several machines each counts restarts by itself.
                restarts = number["TORCHELASTIC_RESTART_COUNT"]
                store = PrefixStore(f"restart_{restarts}", store)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"worker {workers.rank} of {workers.size} cannot reach the others: {error}"
            ) from error
    return workers
