"""A bounded sample of a stream of batches, spread over its length and, where targets are known, over the classes."""

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_neurons.data.batches import batch_size_of, is_divisible, map_tensors, rows_of
from lightning_neurons.data.joining import form_of, join

_CLASS_SLOTS = 2**16
"""Number of counters: class numbers are taken modulo this, so that no table has to grow with them."""


@dataclass(frozen=True)
class Picked:
    """A batch of picked samples.

    Attributes:
        batch: The samples, in the form of the batches that they come from.
        place: The place of the first of them in the data.
        divisible: Whether the samples may be run together with others; else it is a batch as it came.
    """

    batch: Any
    place: Any = None
    divisible: bool = True


class StratifiedSample:
    """A sample that picks from batches as they come, in proportion to the classes, each class as early as possible.

    Deterministic, draws no random numbers, and never waits for a GPU. Picked samples are collected until there are
    ``least`` of them, so that a small sample of a long stream does not cost one pass per batch. Batches that have to
    stay whole are picked whole, as they came, spread over the data.

    Args:
        max_samples: Upper limit of picked samples.
        total: Number of samples in the stream; None if unknown: then the first ``max_samples`` are taken.
        least: Number of samples that are handed out at a time.
        batches: Least number of batches that are picked where they stay whole, even beyond ``max_samples``.

    Example:
        >>> sample = StratifiedSample(2, total=8, least=2)
        >>> batch = torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> sample.add(batch, batch[1])[0].batch[1].tolist()
        [0, 1]
    """

    def __init__(self, max_samples: int, total: int | None, *, least: int = 32, batches: int = 1) -> None:
        self.max_samples, self.total, self.least = max_samples, total, least
        self.seen = self.picked = 0
        self._counts: Tensor | None = None  # (picked or seen, class)
        self._waiting: list[tuple[Picked, int]] = []
        self._has_whole, self._missing = False, batches

    def add(self, batch: Any, targets: Tensor | None, place: Any = None, *, whole: bool = False) -> list[Picked]:
        """Pick samples from a batch.

        Args:
            batch: The batch.
            targets: The class of each sample, if known.
            place: Its place in the data, such as a tuple of batch and dataloader; batches that differ in more than the
                first entry are not joined.
            whole: Whether its samples must stay together and apart from others.

        Returns:
            The batches that are ready to be measured, often none; those that are not ready wait for further samples.
        """
        size, whole = batch_size_of(batch), whole or not is_divisible(batch)
        rows = self._pick(size, targets, whole=whole)
        if rows is None:
            return []
        # A copy in any case: a step may change its batch before it is run again.
        is_all = len(rows) == size
        part, count = (map_tensors(batch, Tensor.clone), size) if is_all else (rows_of(batch, rows, size), len(rows))
        picked = Picked(part, place, divisible=not whole)
        if whole:
            self._has_whole = True
            return [*self.rest(), picked]
        ready = []
        if self._waiting and not _alike(self._waiting[0][0], picked):
            ready += self.rest()
        self._waiting.append((picked, count))
        if sum(n for _, n in self._waiting) >= self.least:
            ready += self.rest()
        return ready

    def rest(self) -> list[Picked]:
        """Return the samples that were picked and not handed out yet, as at most one batch."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        batch = join([picked.batch for picked, _ in waiting], [n for _, n in waiting])
        return [Picked(batch, waiting[0][0].place)]

    def give_back(self, samples: int) -> None:
        """Record that samples which were picked cannot be used."""
        self.picked -= samples
        self._missing += 1

    def describe(self) -> str:
        """Return a sentence on the samples that were used."""
        if self.picked == self.seen:
            return f"sensitivity on all {self.seen} samples"
        if self.total is None:
            return f"sensitivity on the first {self.picked} samples (the length of the data is unknown)"
        if self._has_whole:
            return (
                f"sensitivity on {self.picked} of {self.seen} samples, in whole batches spread over the data, as a "
                "batch is not known to have the loss of its samples"
            )
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
        if whole:
            fits = count > 0 and self.picked + size <= self.max_samples
            is_late = self.total is None or 2 * self.seen > self.total
            if not fits and not (self._missing > 0 and (count or is_late)):
                return None
            self.picked += size
            self._missing -= 1
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


def _alike(picked: Picked, other: Picked) -> bool:
    """Return whether two batches may be joined."""
    same_data = picked.place is None or picked.place[1:] == other.place[1:]
    return same_data and form_of(picked.batch) == form_of(other.batch)


def stream_length(loaders: Any, batches: float | Sequence[float]) -> int | None:
    """Return the number of samples that ``loaders`` give, one after the other.

    Args:
        loaders: A loader, or any nesting of several.
        batches: Number of batches that each gives. One number for all means that they are read side by side, and
            samples are those of the first.

    Returns:
        The number of samples, or None if it cannot be known before.
    """
    each = _flat(loaders)
    limits = [batches] if isinstance(batches, int | float) else list(batches)
    if len(limits) < len(each):
        each = each[:1]
    lengths = [_length(loader, limit) for loader, limit in zip(each, limits, strict=False)]
    finite = [length for length in lengths if length is not None]
    return sum(finite) if finite and len(finite) == len(lengths) else None


def _flat(loaders: Any) -> list[Any]:
    if isinstance(loaders, Mapping):
        return [leaf for loader in loaders.values() for leaf in _flat(loader)]
    return [leaf for loader in loaders for leaf in _flat(loader)] if isinstance(loaders, list | tuple) else [loaders]


def _length(loader: Any, batches: float) -> int | None:
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if batches == math.inf or not isinstance(size, int) or not isinstance(sampler, Sized):
        return None
    return min(int(batches) * size, len(sampler))
