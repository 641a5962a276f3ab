"""Switch neurons off in a running model: their values are replaced at the activation point, and shapes stay.

What is put in their place is ``"zero"``, the neuron's ``"mean"`` over data, or, with ``"resample"``, its values on
another sample of the batch, which keeps their distribution (Chan et al. 2022, "causal scrubbing", do so for circuits).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.hooks.capture import FollowLayers
from lightning_neurons.layers.layer import Layer
from lightning_neurons.layers.sample_axis import join_rows, split_rows, time_first

Replacement = Literal["zero", "mean", "resample"]

NewValues = Callable[[Tensor], Tensor]
"""A function from the values of the chosen neurons to those that replace them, of the same shape."""


@dataclass(frozen=True)
class Edit:
    """A change of some neurons of one layer.

    Attributes:
        axis: Axis of the neurons in the activation.
        neurons: Indices of the neurons that are changed.
        values: Function from their values to the new ones.
    """

    axis: int
    neurons: Int[Tensor, " chosen"]
    values: NewValues

    def write(self, activation: Tensor) -> Tensor:
        """Change an activation in place.

        Returns:
            A copy of the neurons' values before, with which the change can be undone.
        """
        axis = self.axis % activation.ndim
        before = activation.index_select(axis, self.neurons)
        activation.index_copy_(axis, self.neurons, self.values(before))
        return before

    def put(self, activation: Tensor) -> None:
        """Change an activation in place without keeping the values before."""
        if self.values is torch.zeros_like:
            activation.index_fill_(self.axis % activation.ndim, self.neurons, 0)
        else:
            self.write(activation)

    def undo(self, activation: Tensor, before: Tensor) -> None:
        """Put back the values that ``write`` returned."""
        activation.index_copy_(self.axis % activation.ndim, self.neurons, before)

    def changes(self, activation: Tensor) -> bool:
        """Return whether the edit would change any value of an activation."""
        values = activation.index_select(self.axis % activation.ndim, self.neurons)
        return not torch.equal(values, self.values(values))


class Silence(FollowLayers):
    """A mode in which the model runs with some neurons changed at every call of their layer.

    Args:
        layers: The layers as ``trace.py`` found them, by name.
        modules: The modules by layer.
        edits: The edit of each layer that is changed.
    """

    def __init__(
        self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], edits: Mapping[str, Edit]
    ) -> None:
        super().__init__(layers, {name: modules[name] for name in edits})
        self._edits = edits

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        value = value.clone() if value.requires_grad else value  # a loss may differentiate within
        self._edits[name].put(value)
        return value


def edit_of(
    layer: Layer,
    neurons: Sequence[int] | Tensor,
    replacement: Replacement,
    *,
    device: torch.device,
    means: Float[Tensor, " neuron"] | None = None,
    shuffle: Int[Tensor, " batch"] | None = None,
) -> Edit:
    """Return the edit that switches some neurons of a layer off.

    Args:
        layer: The layer.
        neurons: Indices of the neurons.
        replacement: Kind of values that replace theirs.
        device: Device of the activations.
        means: Mean activation of every neuron of the layer, for ``"mean"``.
        shuffle: For each sample, another one of the batch, for ``"resample"``.

    Returns:
        The edit, with its tensors on ``device``.
    """
    index = torch.as_tensor(neurons, dtype=torch.int64, device=device)
    if replacement == "mean":
        assert means is not None, "measured before"
        return Edit(layer.axis, index, _constant(means.to(device)[index], layer.axis))
    if replacement == "resample":
        assert shuffle is not None, "drawn before"
        return Edit(layer.axis, index, _shuffled(shuffle.to(device), layer))
    return Edit(layer.axis, index, torch.zeros_like)


def _constant(means: Tensor, axis: int) -> NewValues:
    def values(old: Tensor) -> Tensor:
        shape = [1] * old.ndim
        shape[axis % old.ndim] = -1
        return means.to(old.dtype).view(shape).expand_as(old)

    return values


def _shuffled(order: Tensor, layer: Layer) -> NewValues:
    def values(old: Tensor) -> Tensor:
        size = len(order)
        if old.shape[0] == size:
            return old[order]
        if layer.rows_per_sample is None and time_first(old, layer.axis, size):
            return old[:, order]
        if size and old.shape[0] % size == 0:  # tokens or windows folded into the batch
            windows = split_rows(old, size, rows_apart=layer.rows_apart)[order]
            return join_rows(windows, rows_apart=layer.rows_apart)
        return old.roll(1, 0)

    return values
