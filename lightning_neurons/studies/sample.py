"""A bounded sample of a stream: spread over all of it and, where targets are known, over the classes."""

import math
from collections.abc import Sized
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_neurons.network.batches import batch_size_of, form_of, is_divisible, join, map_tensors, rows_of

_CLASS_SLOTS = 2**16
"""Class numbers are counted modulo this, so that no table has to grow with them."""


class StratifiedSample:
    """Picks samples from batches as they come, in proportion to the classes, each class as early as possible.

    Deterministic, draws no random numbers, and never waits for a GPU. Picked samples are collected until there are
    ``least`` of them, so that a small sample of a long stream does not cost one pass per batch.

    Args:
        max_samples: The most that are picked.
        total: How many samples the stream has; None if unknown: then the first ``max_samples`` are taken.
        least: How many samples are handed out at a time.

    Example:
        >>> sample = StratifiedSample(2, total=8, least=2)
        >>> batch = torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> sample.add(batch, batch[1])[0][1].tolist()
        [0, 1]
    """

    def __init__(self, max_samples: int, total: int | None, *, least: int = 32) -> None:
        self.max_samples, self.total, self.least = max_samples, total, least
        self.seen = self.picked = 0
        self._counts: Tensor | None = None  # (picked or seen, class)
        self._waiting: list[tuple[Any, int]] = []

    def add(self, batch: Any, targets: Tensor | None) -> list[Any]:
        """Take from a batch; returns the batches that are ready to be measured (often none)."""
        size = batch_size_of(batch)
        rows = self._pick(size, targets, whole=not is_divisible(batch))
        if rows is None:
            return []
        # A copy in any case: a step may change its batch before it is run again.
        whole = len(rows) == size
        part, count = (map_tensors(batch, Tensor.clone), size) if whole else (rows_of(batch, rows, size), len(rows))
        if not is_divisible(batch):
            return [*self.rest(), part]  # nor can it be joined to others
        ready = []
        if self._waiting and form_of(self._waiting[0][0]) != form_of(part):
            ready += self.rest()
        self._waiting.append((part, count))
        if sum(n for _, n in self._waiting) >= self.least:
            ready += self.rest()
        return ready

    def rest(self) -> list[Any]:
        """What has been picked and not handed out yet, as at most one batch."""
        waiting, self._waiting = self._waiting, []
        return [join([b for b, _ in waiting], [n for _, n in waiting])] if waiting else []

    def describe(self) -> str:
        """What was used, in words."""
        if self.picked == self.seen:
            return f"sensitivity on all {self.seen} samples"
        if self.total is None:
            return f"sensitivity on the first {self.picked} samples (the length of the data is unknown)"
        over = ""
        if self._counts is not None:
            over = f", stratified over {int((self._counts[0] > 0).sum())} classes"
        return f"sensitivity on {self.picked} of {self.seen} samples, spread over the data{over}"

    def _pick(self, size: int, targets: Tensor | None, *, whole: bool) -> Int[Tensor, " row"] | None:
        rate = 1.0 if self.total is None else min(1.0, self.max_samples / max(self.total, 1))
        self.seen += size
        # Rounding up spreads the picks from the first batch on.
        due = min(-int(-self.seen * rate // 1), self.max_samples) - self.picked
        count = min(max(due, 0), size)
        if whole and count:
            self.picked += size
            return torch.arange(size)
        rows = self._rows(size, count, rate, targets)
        self.picked += count
        return rows if count else None

    def _rows(self, size: int, count: int, rate: float, targets: Tensor | None) -> Tensor:
        if self.total is None:
            return torch.arange(count)
        if targets is None or rate == 1:
            return ((torch.arange(count) + 0.5) * (size / max(count, 1))).long()
        if self._counts is None:
            self._counts = torch.zeros(2, _CLASS_SLOTS, dtype=torch.int64, device=targets.device)
        slot = targets.long() % _CLASS_SLOTS
        earlier = (slot[:, None] == slot[None, :]).tril(-1).sum(1)
        picked, seen = self._counts[:, slot]
        # How far its class lags behind its share when each sample comes; classes without any come first.
        lag = rate * (seen + earlier + 1) - picked - earlier + 2 * ((picked + earlier) == 0)
        rows = torch.sort(lag, descending=True, stable=True).indices[:count].sort().values
        self._counts[1].index_add_(0, slot, torch.ones_like(slot))
        self._counts[0].index_add_(0, slot[rows], torch.ones_like(rows))
        return rows


def stream_length(loaders: Any, batches: float) -> int | None:
    """How many samples the first of ``loaders`` gives in ``batches`` batches, or None if nobody knows."""
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if batches == math.inf or not isinstance(size, int) or not isinstance(sampler, Sized):
        return None
    return min(int(batches) * size, len(sampler))
