"""Losses of runs of a batch, sample by sample where possible."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.isolation.tensors import map_tensors_in
from lightning_neurons.measurement.losses import SampleLosses, summed

_CLOSE = 1e-3
_ROUNDING = 8
"""Rounding errors of its type that a mean may be off."""

LossFunction = Callable[[Any, Any], Tensor]
"""A function of the model and a batch that returns a scalar, or one loss per sample."""

Forward = Callable[[nn.Module, Any], Any]
"""A function that runs a model, or a copy of it, on a batch (or on the inputs alone) and returns its output."""


@dataclass(frozen=True)
class Outcome:
    """Losses and outputs of some runs of one batch.

    Attributes:
        losses: Of the samples in each run, or their mean over the batch where they cannot be told apart.
        weights: Number of samples that each of them stands for.
        means: The mean loss of each run, as ``loss_fn`` gave it.
        outputs: The model's output in each run, or None if it was not called exactly once.
        rounding: Relative error of the means.
    """

    losses: Float[Tensor, "run value"]
    weights: Float[Tensor, " value"]
    means: Float[Tensor, " run"]
    outputs: list[Any]
    rounding: float = 0.0

    def averaged(self) -> "Outcome":
        """Return the outcome with one mean loss for each run."""
        return Outcome(self.means[:, None], self.weights.sum().reshape(1), self.means, self.outputs, self.rounding)

    def agrees(self, before: "Outcome") -> bool:
        """Return whether the losses of samples change as those of the batch do."""
        if self.losses.shape[1] != before.losses.shape[1]:
            return False
        by_sample = (self.losses - before.losses) @ self.weights / self.weights.sum()
        whole = self.means - before.means
        rounding = self.rounding * (before.means.abs() + self.means.abs())
        close = (by_sample - whole).abs() <= rounding + _CLOSE * whole.abs()
        return bool((close | ~whole.isfinite()).all())


class Outcomes:
    """A maker of outcomes from results: what ``loss_fn`` returned, and what the model returned in each of its calls.

    Args:
        model: The model.
        loss_fn: Returns the loss of the model on a batch.
        reduction: The reduction of a scalar loss over samples: ``"mean"``, ``"sum"`` or ``"none"``.
        by_sample: Whether to tell the losses of samples apart.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, reduction: str, *, by_sample: bool) -> None:
        self._split = SampleLosses(model, loss_fn, reduction) if by_sample else None
        self._reduction = reduction

    def know(self, layers: Sequence[nn.Module]) -> None:
        """Store the model's layers: losses that run them again cannot be split into samples."""
        if self._split is not None:
            self._split.modules = layers

    def of(self, results: Sequence[tuple[Tensor, list[Any]]], batch: Any, samples: int) -> Outcome:
        """Return the outcome of some runs of a batch, sample by sample where possible."""
        outputs = [heard[0] if len(heard) == 1 else None for _, heard in results]
        means = torch.stack([self._mean(loss, samples).reshape(()) for loss, _ in results])
        kinds = [loss.dtype for loss, _ in results if loss.is_floating_point()]
        rounding = max((_ROUNDING * torch.finfo(kind).eps for kind in kinds), default=0.0)
        if self._split is not None:
            losses = self._split.of([loss for loss, _ in results], outputs, batch, samples)
            if losses is not None:
                return Outcome(losses, torch.ones_like(losses[0]), means, outputs, rounding)
        return Outcome(means[:, None], torch.full_like(means[:1], samples), means, outputs)

    def of_stack(self, result: tuple[Tensor, list[Any]], batch: Any, samples: int, runs: int) -> Outcome | None:
        """Return the outcome of a run of a repeated batch; None if the losses of samples cannot be told apart."""
        loss, heard = result
        if self._split is None or len(heard) != 1:
            return None
        outputs = [map_tensors_in(heard[0], lambda t, i=i: t[i * samples : (i + 1) * samples]) for i in range(runs)]  # type: ignore[misc]
        if loss.numel() == runs * samples:
            losses: Tensor | None = loss.reshape(runs, samples).double()
        else:
            losses = self._split.of_stack(loss, outputs, batch, samples)
        return None if losses is None else Outcome(losses, torch.ones_like(losses[0]), losses.mean(1), outputs)

    def _mean(self, loss: Tensor, samples: int) -> Tensor:
        """Return the mean loss of a batch; one that is given as such stays as it is, bit for bit."""
        if loss.numel() == 1 and self._reduction == "mean":
            return loss.double()
        if loss.ndim and loss.numel() == samples:
            return loss.double().mean()
        return summed(loss, self._reduction, samples).double() / samples  # type: ignore[arg-type]
