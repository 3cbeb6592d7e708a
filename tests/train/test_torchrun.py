"""What a worker does alone; what several do together, tests/cluster/proof_torchrun.py shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.errors import UsageError
from anomalyd.train.workers import ALONE, Workers, join


@given(st.integers(1, 40), st.integers(1, 8))
def test_shares_of_a_batch_are_the_batch(images, size):
    """Every row goes to one worker, and none is left without, or the batch is refused."""
    rows = np.arange(images)
    if images < size:
        with pytest.raises(UsageError, match=f"batch_size {images}"):
            Workers(0, size).share(rows)
        return
    shares = [Workers(rank, size).share(rows) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == rows.tolist()
    assert min(map(len, shares)) >= 1
    assert sum(len(share) / len(rows) for share in shares) == pytest.approx(1)


def test_a_process_alone_needs_no_other(monkeypatch):
    """Without torchrun nothing is exchanged, and the noise of a run stays what it was."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert join() is ALONE
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    loss.backward()
    assert ALONE.average([weight], loss, 1.0) == 6
    assert weight.grad.tolist() == [3, 3]
    assert (ALONE.total(2.5), ALONE.told(7)) == (2.5, 7)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ALONE.seed(0, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_other_workers_have_noise_of_their_own():
    """Each rank and each step at which a run goes on has another stream, always the same."""
    streams = set()
    for rank, step in ((1, 0), (2, 0), (1, 9)):
        Workers(rank, 3).seed(4, step)
        first = torch.rand(3).tolist()
        Workers(rank, 3).seed(4, step)
        assert torch.rand(3).tolist() == first
        streams.add(tuple(first))
    assert len(streams) == 3
