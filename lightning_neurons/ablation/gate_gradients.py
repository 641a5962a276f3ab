"""Gate gradients of single samples: first- and second-order estimates of switching a neuron off."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.ablation.engine import WhatIf
from lightning_neurons.criteria.contract import Need
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.data.batches import batch_size_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.layers.layer import Layer
from lightning_neurons.layers.sample_axis import samples_of
from lightning_neurons.measurement.losses import summed
from lightning_neurons.measurement.passes import Passes


class GateGradients:
    """Gradients of batches with respect to gates on neurons; a receiver of ``Passes``.

    Args:
        study: The engine, whose model, loss and layers are used.
        neurons: The neurons, by layer.

    Attributes:
        works: Whether the loss can be differentiated.
    """

    def __init__(self, study: WhatIf, neurons: Mapping[str, Sequence[int]]) -> None:
        self.modules: dict[str, nn.Module] = {name: study.modules[name] for name in neurons}
        self.works = True
        self._study, self._neurons = study, neurons
        self._layers: Mapping[str, Layer] = {}
        self._sums: dict[str, Tensor] = {}
        self._size = 0
        self._passes = Passes(study.model, [self])

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Store the layers and their activation points."""
        self._layers = layers

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Add the gate gradients of one call of one layer."""
        known = self._layers[layer]
        view = LayerView(
            samples_of(activation, known, self._size),
            None if gradient is None else samples_of(gradient, known, self._size),
            None if inner is None else samples_of(inner, known, self._size),
        )
        self._sums[layer] = self._sums.get(layer, 0) + view.gate_gradient

    def of(self, batch: Any) -> Float[Tensor, "batch neuron 2"]:
        """Return ``-u`` and ``u^2`` for each sample and neuron; zeros where the loss cannot be differentiated."""
        size = self._size = batch_size_of(batch)
        width = sum(map(len, self._neurons.values()))
        if not self.works:
            return torch.zeros(size, width, 2)
        study = self._study

        def loss_of(given: Any) -> Tensor:
            return summed(study.loss_fn(study.model, given), study.loss_reduction, batch_size_of(given))  # type: ignore[arg-type]

        self._sums = {}
        try:
            self._passes.differentiate(loss_of, batch)
        except (MeasurementError, RuntimeError):
            self.works = False
            return torch.zeros(size, width, 2)
        columns = [
            self._sums[name][:, list(indices)] if name in self._sums else torch.zeros(size, len(indices))
            for name, indices in self._neurons.items()
        ]
        gates = torch.cat([column.double().cpu() for column in columns], 1)
        return torch.stack([-gates, gates.square()], -1)
