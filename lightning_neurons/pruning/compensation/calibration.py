"""What a cut is calibrated on: data, how to run a model on it, its loss, and how processes share what they see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.network.batches import batch_size_of
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
                total += torch.tensor([float(self.loss(model, batch).detach().mean()) * size, float(size)])
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = self.reduce(total.to(device))
        return float(self.agree(float(total[0] / total[1].clamp(min=1))))
