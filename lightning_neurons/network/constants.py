"""Which tensors in a forward do not depend on the batch: parameters, buffers, what is made of them or of nothing."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_neurons.network.trees import address_of, tensors_in

_FEW = 64


class Constants:
    """Follows what calls make of constants alone."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}  # ids stay unique while the tensors live
        self._numbers_of_data: dict[int, Tensor] = {}
        self._overwritten: set[int] = set()

    def add_model(self, model: nn.Module) -> None:
        """Parameters, buffers and tensors that are plain attributes of modules."""
        for module in model.modules():
            plain = (v for v in vars(module).values() if not isinstance(v, list | tuple | dict) or len(v) <= _FEW)
            for tensor in (*module._parameters.values(), *module._buffers.values(), *tensors_in(list(plain))):
                if tensor is not None:
                    self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Take note of a constant."""
        self._known[id(tensor)] = tensor

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is a constant; a single number that no call has made of the batch is taken for one."""
        if isinstance(tensor, nn.Parameter):
            return True
        if id(tensor) in self._known:
            return not self._overwritten or address_of(tensor) not in self._overwritten
        return tensor.ndim == 0 and id(tensor) not in self._numbers_of_data

    def see(self, given: Iterable[Tensor], made: Any, target: Tensor | None) -> None:
        """A call has made something of what it was given, perhaps by writing into ``target``."""
        constant = all(self.has(tensor) for tensor in given)
        for tensor in tensors_in(made):
            if constant:
                self.add(tensor)
            elif tensor.ndim == 0:
                self._numbers_of_data[id(tensor)] = tensor
        if target is not None and not constant and id(target) in self._known:
            self._overwritten.add(address_of(target))

    def close(self) -> None:
        """Let go of the tensors."""
        self._known.clear()
        self._numbers_of_data.clear()
