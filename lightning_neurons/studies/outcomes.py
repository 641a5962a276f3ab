"""From what runs of a batch gave to losses, sample by sample where possible."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.network.trees import map_tensors_in
from lightning_neurons.studies.losses import summed
from lightning_neurons.studies.sample_losses import SampleLosses

LossFunction = Callable[[Any, Any], Tensor]
"""From the model and a batch to a scalar, or one loss per sample."""


@dataclass(frozen=True)
class Outcome:
    """What some runs of one batch gave.

    Attributes:
        losses: Of the samples in each run, or their mean over the batch where they cannot be told apart.
        weights: How many samples each of them stands for.
        outputs: What the model returned in each run, or None if it was not called exactly once.
    """

    losses: Float[Tensor, "run value"]
    weights: Float[Tensor, " value"]
    outputs: list[Any]

    def averaged(self) -> "Outcome":
        """The same with one mean for each run."""
        means = ((self.losses * self.weights).sum(1) / self.weights.sum())[:, None]
        return Outcome(means, self.weights.sum().reshape(1), self.outputs)


class Outcomes:
    """Makes outcomes of results: pairs of what ``loss_fn`` returned and what the model returned in each of its calls.

    Args:
        model: The model.
        loss_fn: From the model and a batch to a loss.
        reduction: What that is: ``"mean"``, ``"sum"`` or ``"none"``.
        by_sample: Whether to tell the losses of samples apart.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, reduction: str, *, by_sample: bool) -> None:
        self._split = SampleLosses(model, loss_fn, reduction) if by_sample else None
        self._reduction = reduction

    def know(self, layers: Sequence[nn.Module]) -> None:
        """Take note of the model's layers: losses that run them again cannot be taken apart."""
        if self._split is not None:
            self._split.modules = layers

    def of(self, results: Sequence[tuple[Tensor, list[Any]]], batch: Any, samples: int) -> Outcome:
        """What some runs of a batch gave, sample by sample where possible."""
        outputs = [heard[0] if len(heard) == 1 else None for _, heard in results]
        if self._split is not None:
            losses = self._split.of([loss for loss, _ in results], outputs, batch, samples)
            if losses is not None:
                return Outcome(losses, torch.ones_like(losses[0]), outputs)
        means = [self._mean(loss, samples) for loss, _ in results]
        column = torch.stack([mean.reshape(1) for mean in means])
        return Outcome(column, torch.full_like(column[0], samples), outputs)

    def of_stack(self, result: tuple[Tensor, list[Any]], batch: Any, samples: int, runs: int) -> Outcome | None:
        """What a run of a batch that was repeated gave; None if the losses of samples cannot be told apart."""
        loss, heard = result
        if self._split is None or len(heard) != 1:
            return None
        outputs = [map_tensors_in(heard[0], lambda t, i=i: t[i * samples : (i + 1) * samples]) for i in range(runs)]  # type: ignore[misc]
        if loss.numel() == runs * samples:
            losses: Tensor | None = loss.reshape(runs, samples).double()
        else:
            losses = self._split.of_stack(loss, outputs, batch, samples)
        return None if losses is None else Outcome(losses, torch.ones_like(losses[0]), outputs)

    def _mean(self, loss: Tensor, samples: int) -> Tensor:
        """The mean loss of a batch; one that is given as such stays as it is, bit for bit."""
        if loss.numel() == 1 and self._reduction == "mean":
            return loss.double()
        return summed(loss, self._reduction, samples).double() / samples  # type: ignore[arg-type]
