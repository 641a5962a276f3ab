"""The mean activation of every neuron, which replaces its activation in mean ablation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.data.batches import inputs_of
from lightning_neurons.hooks.capture import WatchActivations
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.isolation.isolation import eager
from lightning_neurons.layers.layer import Layer
from lightning_neurons.measurement.losses import normal_tensors


def activation_means(
    model: nn.Module,
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
    run: Callable[[Any, Any], Any] | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Float[Tensor, " neuron"]]:
    """Return the mean activation of every neuron over samples and positions, summed in float64.

    Args:
        model: The model; it runs without gradients in the mode that it is in.
        layers: The layers with their activation points.
        modules: Their modules.
        batches: The data.
        run: Runs the model on a batch; None calls it on the batch's inputs.
        add_up: Sums a tensor over processes.

    Returns:
        By layer, the means, of type float64.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def deliver(name: str, value: Tensor) -> None:
        axis = layers[name].axis % value.ndim
        others = [d for d in range(value.ndim) if d != axis]
        exact = value.cpu() if value.device.type == "mps" else value
        total = exact.sum(others, dtype=torch.float64) if others else exact.double()
        totals[name] = totals.get(name, 0) + total
        counts[name] = counts.get(name, 0) + value.numel() // value.shape[axis]

    watched = {name: modules[name] for name in layers}
    with torch.inference_mode(False), torch.no_grad(), eager(), WatchActivations(layers, watched, deliver):
        for batch in batches:
            given = normal_tensors(batch)
            _ = call(model, inputs_of(given)) if run is None else run(model, given)
    counted = {name: torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
    return {name: add_up(total) / add_up(counted[name]).to(total.device) for name, total in totals.items()}
