"""Values of a layer that go on in pieces, split, stacked or laid out, and tensors that do not depend on the batch.

That is harmless as long as the pieces are only passed on. A function that changes them, as an activation function does,
is noted: downstream layers then read other values than those that are reported for the neuron.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name that the field uses)
from torch import Tensor, nn

from lightning_neurons.hooks.chain_functions import JOINS, MIXES, REDUCES, TEARS, WORKS
from lightning_neurons.hooks.neuron_positions import Place
from lightning_neurons.hooks.value_graph import Value
from lightning_neurons.isolation.tensors import address_of, tensors_in
from lightning_neurons.layers.registry import PASSING

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

    def fit(self, inputs: Sequence[Tensor], places: Sequence[Place | None]) -> bool:
        """Return whether all other operands are constants, or hold one number per neuron that is not from the batch.

        What lies on the neurons' axis alone is the same for all samples: a mean of the data, in a global variable.

        Args:
            inputs: The tensors that a call reads.
            places: For each of them, where the layer's neurons lie; None if it holds none of the layer's values.
        """
        value, place = next((t, p) for t, p in zip(inputs, places, strict=True) if p is not None)
        others = [tensor for tensor, p in zip(inputs, places, strict=True) if p is None]
        return all(self.has(tensor) or self._is_per_neuron(tensor, value, place.axis) for tensor in others)

    def _is_per_neuron(self, tensor: Tensor, value: Tensor, axis: int | None) -> bool:
        if axis is None or id(tensor) in self._of_data or id(tensor) in self._known or not _is_vector(tensor):
            return False
        back = axis % value.ndim - value.ndim
        is_along = tensor.ndim >= -back and tensor.shape[back] == tensor.numel() == value.shape[axis]
        return is_along and -back < value.ndim and (tensor.ndim < value.ndim or len(value) > 1)

    def see(self, inputs: Iterable[Tensor], made: Any, target: Tensor | None) -> None:
        """Record a call: whether its result, or the ``target`` it wrote into, is computed from constants alone."""
        inputs = list(inputs)
        constant = all(self.has(tensor) for tensor in inputs)
        is_open = all(id(t) not in self._of_data and (self.has(t) or _is_vector(t)) for t in inputs)
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


class _Piece(NamedTuple):
    """A value of which a tensor is a piece; ``torn`` names the function that made the piece, empty for the whole."""

    value: Value
    torn: str = ""
    reduced: str = ""


class Pieces:
    """The pieces of layers' values in one forward, outside of layers."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, _Piece]] = {}  # ids stay unique while the tensors live

    def see(self, func: Callable[..., Any], inputs: Sequence[tuple[Tensor, Value | None, bool]], made: Any) -> None:
        """Record a call that is no step of a chain and reads values of one layer, or pieces of them.

        Args:
            func: The function that was called.
            inputs: The tensors that it read, each with the value that it is, if any, and whether it is a constant.
            made: Its result.
        """
        carried = [self._piece(tensor, value) for tensor, value, _ in inputs]
        pieces = [piece for piece in carried if piece is not None]
        results = [*tensors_in(made)]
        for tensor in results:
            self._known.pop(id(tensor), None)
        foreign = any(
            piece is None and not constant and tensor.is_floating_point()
            for piece, (tensor, _, constant) in zip(carried, inputs, strict=True)
        )
        if not pieces or not results or foreign:
            return
        torn = next((piece.torn for piece in pieces if piece.torn), "")
        reduced = next((piece.reduced for piece in pieces if piece.reduced), "")
        whole = any(not piece.reduced for piece in pieces)
        if reduced and whole and (func in WORKS or func in TEARS):
            _take_note(pieces, reduced)
        elif func in WORKS and whole:
            _take_note(pieces, torn, WORKS[func])
        elif func in REDUCES and torn in JOINS:
            _take_note(pieces, torn, REDUCES[func])
        elif func in TEARS or func in REDUCES or _blurs(func, inputs):
            name = torn or ("" if func in REDUCES else TEARS.get(func, _name(func)))
            self._add(results, _Piece(pieces[0].value, name, reduced or REDUCES.get(func, "")))
        elif (
            len(pieces) == 1
            and not reduced
            and _keeps_all(func, [tensor for tensor, _, _ in inputs], results, pieces[0].value)
        ):
            is_custom = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and whole
            if is_custom and not str(func).startswith("aten."):
                _take_note(pieces, torn, f"the operation {func} of somebody's own")
            else:
                self._add(results, _Piece(pieces[0].value, torn or _name(func)))

    def copies(self, source: Tensor, made: Tensor) -> None:
        """Record that a copy is a piece of the same value as its source."""
        self._known.pop(id(made), None)
        if id(source) in self._known:
            self._known[id(made)] = made, self._known[id(source)][1]

    def _add(self, results: Sequence[Tensor], piece: _Piece) -> None:
        for tensor in results:
            self._known[id(tensor)] = tensor, piece

    def _piece(self, tensor: Tensor, value: Value | None) -> _Piece | None:
        if value is not None:
            return _Piece(value)
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    def close(self) -> None:
        """Let go of the tensors."""
        self._known.clear()


def _blurs(func: Callable[..., Any], inputs: Sequence[tuple[Tensor, Value | None, bool]]) -> bool:
    """Return whether a function is a depthwise convolution with fixed weights."""
    weights = [tensor for tensor, _, constant in inputs[1:2] if constant and not isinstance(tensor, nn.Parameter)]
    is_alone = any(w.ndim > 2 and w.shape[1] == 1 and len(w) == inputs[0][0].shape[1 - w.ndim] for w in weights)
    return is_alone and _name(func).startswith("conv")


def _keeps_all(func: Callable[..., Any], inputs: Iterable[Tensor], results: Iterable[Tensor], value: Value) -> bool:
    """Return whether a function that is not listed may keep all numbers: it has no weights, and makes as many."""
    is_pool = func in PASSING and func is not F.pad
    if is_pool or func in MIXES or any(isinstance(tensor, nn.Parameter) for tensor in inputs):
        return False
    numbers = [t.numel() * (1 + t.is_complex()) for t in results if t.is_floating_point() or t.is_complex()]
    return sum(numbers) >= value.tensor.numel()


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func)).strip("_")


def _take_note(pieces: Sequence[_Piece], *names: str) -> None:
    """Note in words the functions that worked on the values, unless those are detached and go nowhere."""
    if all(piece.value.is_aside for piece in pieces):
        return
    words = " and then to ".join(dict.fromkeys(name for name in names if name))
    for value in {id(piece.value): piece.value for piece in pieces}.values():
        value.torn.append(words)
