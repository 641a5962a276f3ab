"""Weights that a step exchanges while it runs, for averages of them for example: ``parameter.data.copy_(...)``.

Autograd does not notice, and its backward would use the weights that are there when it runs. It has to be those that
the forward has used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.isolation.tensors import address_of, tensors_in
from lightning_neurons.isolation.writes import target_of_write

_EXCHANGES = frozenset({Tensor.data.__set__, Tensor.set_})  # type: ignore[attr-defined]
"""Functions that give a tensor other memory."""


class MovingWeights:
    """A watch on writes into a model's weights during one forward, which keeps for its backward what they overwrite.

    Args:
        model: The model.

    Attributes:
        have_moved: Whether any of its weights has been written into or exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = (*model.parameters(), *model.buffers())
        self._addresses = {address_of(tensor) for tensor in weights if tensor.is_floating_point()}
        self._kept: dict[int, list[_Kept]] = {}
        self.have_moved = False

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check whether a call is about to write into weights, and copy first what autograd has saved of them."""
        if func in _EXCHANGES:
            if address_of(args[0]) in self._addresses:
                self.have_moved = True
                self._addresses |= {address_of(tensor) for tensor in tensors_in(args[1:])}
            return
        for target in _targets_of_write(func, args, kwargs):
            address = address_of(target)
            if address in self._addresses:
                self.have_moved = True
                for kept in self._kept.pop(address, ()):
                    kept.tensor = kept.tensor.clone()

    def keeping(self) -> AbstractContextManager[None]:
        """Return a context in which autograd saves weights so that its backward finds them unchanged."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Kept":
        with torch._C.DisableTorchFunction():
            address = address_of(tensor)
            if address not in self._addresses:
                return tensor
            kept = _Kept(tensor.detach())
            self._kept.setdefault(address, []).append(kept)
            return kept


class _Kept:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(packed: "Tensor | _Kept") -> Tensor:
    return packed.tensor if isinstance(packed, _Kept) else packed


def _targets_of_write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    name = getattr(func, "__name__", "")
    if name.startswith("_foreach_"):
        return [*tensors_in(args[0])] if name.endswith("_") else []
    target = target_of_write(func, args, kwargs)
    return [] if target is None else [target]
