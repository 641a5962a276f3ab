"""Tensors in a forward that do not depend on the batch: parameters, buffers and what is computed from them alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_neurons.hooks.neuron_positions import Place
from lightning_neurons.isolation.tensors import address_of, tensors_in

_FEW = 64


class Constants:
    """The constants of a forward: the model's own tensors and what calls compute from those alone."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}  # ids stay unique while the tensors live
        self._of_data: dict[int, Tensor] = {}  # numbers and vectors
        self._overwritten: set[int] = set()

    def add_model(self, model: nn.Module) -> None:
        """Add parameters, buffers and tensors that are plain attributes of modules."""
        for module in model.modules():
            plain = (v for v in vars(module).values() if not isinstance(v, list | tuple | dict) or len(v) <= _FEW)
            for tensor in (*module._parameters.values(), *module._buffers.values(), *tensors_in(list(plain))):
                if tensor is not None:
                    self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Add a constant."""
        self._known[id(tensor)] = tensor

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a constant; a scalar that was not computed from the batch is taken for one."""
        if isinstance(tensor, nn.Parameter):
            return True
        if id(tensor) in self._known:
            return not self._overwritten or address_of(tensor) not in self._overwritten
        return tensor.ndim == 0 and id(tensor) not in self._of_data

    def fit(self, given: Sequence[Tensor], places: Sequence[Place | None]) -> bool:
        """Return whether all other operands are constants, or hold one number per neuron that is not from the batch.

        What lies on the neurons' axis alone is the same for all samples: a mean of the data, in a global variable.

        Args:
            given: The tensors that a call reads.
            places: For each of them, where the layer's neurons lie; None if it holds none of the layer's values.
        """
        value, place = next((t, p) for t, p in zip(given, places, strict=True) if p is not None)
        others = [tensor for tensor, p in zip(given, places, strict=True) if p is None]
        return all(self.has(tensor) or self._is_per_neuron(tensor, value, place.axis) for tensor in others)

    def _is_per_neuron(self, tensor: Tensor, value: Tensor, axis: int | None) -> bool:
        if axis is None or id(tensor) in self._of_data or id(tensor) in self._known or not _is_vector(tensor):
            return False
        back = axis % value.ndim - value.ndim
        is_along = tensor.ndim >= -back and tensor.shape[back] == tensor.numel() == value.shape[axis]
        return is_along and -back < value.ndim and (tensor.ndim < value.ndim or len(value) > 1)

    def see(self, given: Iterable[Tensor], made: Any, target: Tensor | None) -> None:
        """Record a call: whether its result, or the ``target`` it wrote into, is computed from constants alone."""
        given = list(given)
        constant = all(self.has(tensor) for tensor in given)
        is_open = all(id(t) not in self._of_data and (self.has(t) or _is_vector(t)) for t in given)
        for tensor in tensors_in(made):
            if constant:
                self.add(tensor)
            elif tensor.ndim == 0 or (not is_open and _is_vector(tensor)):
                self._of_data[id(tensor)] = tensor
        if target is not None and not constant and id(target) in self._known:
            self._overwritten.add(address_of(target))

    def close(self) -> None:
        """Let go of the tensors."""
        self._known.clear()
        self._of_data.clear()


def _is_vector(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.numel() == max(tensor.shape)
