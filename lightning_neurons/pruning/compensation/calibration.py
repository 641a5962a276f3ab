"""What a cut is calibrated on: data, how to run a model on it, its loss, and how processes share what they see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.errors import PruningError
from lightning_neurons.network.batches import batch_size_of, form_of, is_divisible, join
from lightning_neurons.network.isolate import eager
from lightning_neurons.pruning.compensation.moments import Reduce, alone

Run = Callable[[nn.Module, Any], Any]
"""Runs a model, or a copy of it, on a batch."""


def same(value: Any) -> Any:
    """What the first process says, where there is one."""
    return value


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data of one process, and what it does together with the others.

    Attributes:
        batches: On the model's device; they may be none in some process.
        run: Runs a model on a batch.
        loss: From a model and a batch to the loss.
        reduce: Sums a tensor over processes.
        agree: The first process's value for all.
    """

    batches: Sequence[Any]
    run: Run
    loss: Callable[[nn.Module, Any], Tensor]
    reduce: Reduce = alone
    agree: Callable[[Any], Any] = same

    def loss_of(self, model: nn.Module) -> float:
        """The mean loss of a copy of the model over the samples of all processes, in evaluation mode."""
        total = torch.zeros(2, dtype=torch.float32)
        with torch.no_grad(), eager():
            model.eval()
            for batch in self.batches:
                size = batch_size_of(batch)
                loss = self.loss(model, batch)
                if not isinstance(loss, Tensor):
                    raise PruningError(f"loss_fn returned {type(loss).__name__}: expected a tensor")
                total += torch.tensor([float(loss.detach().mean()) * size, float(size)])
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = self.reduce(total.to(device))
        return float(self.agree(float(total[0] / total[1].clamp(min=1))))


def in_few(batches: Sequence[Any], most: int) -> list[Any]:
    """The same samples in not many more than ``most`` batches; batches of different forms are not joined.

    Args:
        batches: Batches of any form.
        most: How many there should be at most.
    """
    if len(batches) <= most:
        return list(batches)
    at_once = -(-len(batches) // most)
    found: list[list[Any]] = []
    for batch in batches:
        if found and len(found[-1]) < at_once and is_divisible(batch) and form_of(found[-1][0]) == form_of(batch):
            found[-1].append(batch)
        else:
            found.append([batch])
    return [join(some, [batch_size_of(batch) for batch in some]) if len(some) > 1 else some[0] for some in found]
