"""Tests whether a batch may be run in parts, or joined to others: not where samples depend on one another."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.data.batches import batch_size_of, is_divisible, rows_of, targets_of
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.isolation.model_state import random_state, set_random_state
from lightning_neurons.isolation.tensors import tensors_in
from lightning_neurons.measurement.outcomes import Outcomes

_ALIKE = 1e-5

_TRIES = 4

_REPEATS = 2

_MOST = 32  # samples that a batch is asked with; a few tell as well as many, and cost less

_JOINED = 32  # samples that are run together at least, where they may be

Isolated = Callable[[], AbstractContextManager[None]]

Result = tuple[Tensor, list[Any]]


class Independence:
    """A test, on the first batches that can tell, whether samples may be run in other batches than their own.

    The loss of a batch, summed over samples, has to be that of two parts of it that are as different as possible. It is
    not where samples are compared with one another, weighted by class, averaged by tokens, or where a batch holds one
    bag of instances or a graph. As long as it has not been shown, batches have to stay as they are.

    Attributes:
        is_stateful: Whether the loss depends on what the runs before have left, as with a hidden state that is carried
            over batches. Such batches stay as they are, and each has its loss in the state that it met.
    """

    def __init__(self) -> None:
        self.is_stateful = False
        self._is_shown: bool | None = None
        self._tries = 0

    def shown(self, loss_of: Callable[[Any], Tensor], batch: Any, isolated: Isolated) -> bool:
        """Return whether the samples have been shown to be independent, by this batch or one before.

        Args:
            loss_of: Returns the loss of a batch, summed over samples.
            batch: The batch.
            isolated: A context manager that leaves the model as it was.

        Returns:
            True if the batch may be divided and the loss of a sample does not depend on the others.
        """
        if self._is_shown is None and self._tries < _TRIES:
            self._tries += 1
            if is_divisible(batch) and (size := batch_size_of(batch)) > _MOST:
                batch = rows_of(batch, torch.arange(_MOST) * size // _MOST, size)
            losses = _one_after_the_other(loss_of, batch, isolated)
            self.is_stateful = losses is not None and math.isfinite(losses[0]) and not _all_near(losses)
            whole = None if losses is None or self.is_stateful else losses[0]
            self._is_shown = whole is not None and _is_sum_of_parts(whole, loss_of, batch, isolated)
        return is_divisible(batch) and bool(self._is_shown)


def _one_after_the_other(loss_of: Callable[[Any], Tensor], batch: Any, isolated: Isolated) -> list[float] | None:
    """Return the losses of some runs of a batch, with the same random numbers; None if it does not run.

    In between, another batch of its form is run: what a step keeps of the batch before may show only then, or only
    after some batches.
    """
    size = batch_size_of(batch) if is_divisible(batch) else 0
    other = rows_of(batch, torch.arange(size) // 2, size) if size else batch
    for gradients in (False, True):  # some losses take gradients of their own
        try:
            with isolated(), torch.inference_mode(False), torch.set_grad_enabled(gradients), eager():
                random = random_state()
                losses = [float(loss_of(batch).detach())]
                for _ in range(_REPEATS):
                    with suppress(Exception):  # not every batch can be run
                        loss_of(other)
                    set_random_state(random)
                    losses.append(float(loss_of(batch).detach()))
                return losses
        except Exception:  # noqa: BLE001 (who runs the batch for its numbers will say what is wrong)
            continue
    return None


def _is_sum_of_parts(whole: float, loss_of: Callable[[Any], Tensor], batch: Any, isolated: Isolated) -> bool | None:
    """Return whether the loss of a batch is that of two parts of it; None if this batch cannot tell."""
    if not is_divisible(batch) or (size := batch_size_of(batch)) < 2:
        return None
    targets = targets_of(batch)
    if targets is None:
        rows = torch.arange(size)
        some, others = rows[::3], rows[rows % 3 != 0]  # neither halves nor pairs stay together
    elif (targets == targets[0]).all():
        return None  # weights of classes would not show
    else:
        some, others = targets.argsort(stable=True).cpu().tensor_split([-(-size // 3)])
    companies = [some, others]
    if size < _JOINED:  # a memory of so many places, say, may have no room for more
        companies.append(torch.arange(_JOINED) % size)
    for gradients in (False, True):
        try:
            losses = []
            for rows in companies:
                with isolated(), torch.inference_mode(False), torch.set_grad_enabled(gradients), eager():
                    losses.append(float(loss_of(rows_of(batch, rows, size)).detach()))
            pieces = losses[:2]
            break
        except Exception:  # noqa: BLE001 (whatever a step does with fewer samples, or other ones)
            continue
    else:
        return False
    if not math.isfinite(whole) or not any((whole, *pieces)):
        return None
    return _near(whole, pieces)


def divides(outcomes: Outcomes, batch: Any, parts: Sequence[Any], results: Sequence[Result]) -> bool:
    """Return whether a batch has the loss and the outputs of its parts.

    A loss with class weights, one that compares samples, and norm layers without running statistics have not.

    Args:
        outcomes: Makes losses of results.
        batch: The batch.
        parts: Its parts.
        results: Loss and outputs of a run of the batch, then those of a run of each part.

    Returns:
        True if the mean loss and, where the model is called once, its outputs are the same up to rounding.
    """
    sizes = [batch_size_of(part) for part in parts]
    means = [
        float(outcomes.of([result], part, size).means[0])
        for result, part, size in zip(results[1:], parts, sizes, strict=True)
    ]
    mean = float(outcomes.of([results[0]], batch, sum(sizes)).means[0])
    alike = not math.isfinite(mean) or _near(mean, [m * n / sum(sizes) for m, n in zip(means, sizes, strict=True)])
    return alike and _joined_alike(results[0][1], [heard for _, heard in results[1:]])


def _all_near(losses: Sequence[float]) -> bool:
    return all(_near(losses[0], [loss]) for loss in losses[1:])


def _near(whole: float, pieces: Sequence[float]) -> bool:
    """Return whether a loss is the sum of others, relative to their own size: losses may be tiny."""
    return abs(whole - sum(pieces)) <= _ALIKE * max(abs(whole), sum(map(abs, pieces)))


def _joined_alike(whole: list[Any], parts: Sequence[list[Any]]) -> bool:
    """Return whether the outputs of a batch are those of its parts, one after the other."""
    if len(whole) != 1 or any(len(heard) != 1 for heard in parts):
        return True  # then losses have to tell
    columns = [list(tensors_in(heard[0])) for heard in parts]
    for place, tensor in enumerate(tensors_in(whole[0])):
        pieces = [column[place] for column in columns]
        if tensor.is_floating_point() and tensor.ndim and sum(map(len, pieces)) == len(tensor):
            scale = float(tensor.abs().nan_to_num(posinf=0, neginf=0).max()) if tensor.numel() else 0.0
            if not torch.allclose(torch.cat(pieces), tensor, rtol=0, atol=_ALIKE * scale + 1e-30, equal_nan=True):
                return False
    return True
