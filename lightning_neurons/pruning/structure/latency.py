"""The measured time of a forward."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.pruning.structure.example import Example


def latency(model: nn.Module, example: Example, repeats: int = 10) -> float:
    """Measure the median time of a forward on an example; the model is left as it was.

    Args:
        model: Run in evaluation mode, without gradients.
        example: The inputs to run it on.
        repeats: Number of runs, after one that does not count.

    Returns:
        Seconds.
    """
    finish = _finisher(model)
    times = []
    with isolated(model), torch.no_grad():
        model.eval()
        for _ in range(repeats + 1):
            start = time.perf_counter()
            example.run(model)
            finish()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _finisher(model: nn.Module) -> Callable[[], None]:
    """Return a function that waits for the model's device."""
    kinds = {p.device.type for p in model.parameters()}
    if "cuda" in kinds:
        return torch.cuda.synchronize
    return torch.mps.synchronize if "mps" in kinds else lambda: None
