"""Flow of neurons through a forward: from the layers that make them to all that reads them or is combined with them.

Sizes are those of the forward, and each operation is looked up by itself; one that is not understood only stops what
passes through it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.dependency.layout import (
    PRODUCTS,
    dim_of,
    is_split,
    keeps_axes,
    kept_axes,
    moved,
    moves,
    name_of,
    part_of,
    reduced_axes,
    shape_of,
)
from lightning_neurons.dependency.places import Places, aligned, combined, compressed, varying
from lightning_neurons.layers.attention import has_weights_apart
from lightning_neurons.layers.width_handlers import axis_of, blocks_of_neurons, handler_of, passes

Source = tuple[Any, int]
"""A node of autograd's graph, and the number of its result."""

_Operand = tuple[int, Source, Tensor]
"""The place of an operation's input, where it comes from, and its numbers."""


@dataclass(frozen=True)
class Call:
    """A run of a module that makes, reads or hands on neurons.

    Attributes:
        module: The module.
        inputs: Where its inputs come from.
        outputs: Where its results are.
        side_by_side: Whether its results are parts of its neurons, one after the other; else each has all of them.
        bias: A parameter with an entry for each value of all results, one after the other.
    """

    module: nn.Module
    inputs: tuple[Source, ...]
    outputs: tuple[Source, ...]
    side_by_side: bool = False
    bias: Tensor | None = None


@dataclass
class Flow:
    """The places of a model's neurons, filled in by one walk through the graph of a forward.

    Attributes:
        calls: The runs of modules, by the nodes of their results.
        held: By parameter that functions may read, of no known module or an embedding's, the axis of its neurons.
        tables: By weight of an embedding, its module.
        places: All places.
        reductions: Pairs of nodes between which neurons are reduced to one value.
    """

    calls: Mapping[Any, Call]
    held: Mapping[Tensor, int]
    tables: Mapping[Tensor, nn.Module] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    reductions: set[tuple[Any, Any]] = field(default_factory=set)
    _numbers: dict[Source, Tensor | None] = field(default_factory=dict)
    _tabled: set[Any] = field(default_factory=set)  # nodes whose values are an embedding's weight, as it is or moved

    def walk(self, outputs: Iterable[Tensor]) -> None:
        """Follow all neurons to the outputs."""
        for node in self._in_order([tensor.grad_fn for tensor in outputs]):
            call = self.calls.get(node)
            if call is None:
                self._operation(node)
            elif not any(source in self._numbers for source in call.outputs):
                self._run(call)

    def _in_order(self, nodes: Iterable[Any]) -> list[Any]:
        """Return nodes after those that they read."""
        order: dict[Any, None] = {}
        stack, begun = [(node, False) for node in nodes if node is not None], set()
        while stack:
            node, ready = stack.pop()
            if ready:
                order[node] = None
            elif node not in begun:
                begun.add(node)
                stack.append((node, True))
                stack.extend((source, False) for source, _ in self._read(node) if source is not None)
        return list(order)

    def _read(self, node: Any) -> tuple[Source, ...]:
        call = self.calls.get(node)
        return tuple(getattr(node, "next_functions", ())) if call is None else call.inputs

    def _of(self, source: Source) -> Tensor | None:
        """Return the numbers of what an operation reads, with as many axes as that has."""
        node, number = source
        numbers = self._numbers.get((node, 0))
        if numbers is not None and node not in self.calls and is_split(node):
            before = shape_of(*node.next_functions[0])
            part = None if before is None else part_of(node, numbers.expand(before), number)
            return None if part is None else compressed(part)
        if source in self._numbers or node in self.calls:
            return self._numbers.get(source)
        shape = shape_of(node, number)
        fits = numbers is not None and shape is not None and _fits(numbers, shape)
        return numbers if fits else None

    def _run(self, call: Call) -> None:
        """Let a module read what it is given, and make or hand on neurons."""
        module, within = call.module, passes(call.module)
        for source in call.inputs:
            shape, numbers = shape_of(*source), self._of(source)
            if shape is None or not shape:
                continue
            axis = _axis_in(module, shape)
            if numbers is None or (varying(numbers) and axis not in varying(numbers)):
                continue  # a module treats all places on other axes alike
            if has_weights_apart(module):
                self._lose(numbers, "nn.MultiheadAttention reads them by weights of several widths (kdim, vdim)")
                continue
            width = [1] * len(shape)
            width[axis] = shape[axis]
            own = self.places.at((module, "out" if within else "in"), shape[axis])
            if len(own) == shape[axis]:
                self.places.join(own.view(width), numbers)
        results = [(source, shape, _axis_in(module, shape)) for source in call.outputs if (shape := shape_of(*source))]
        sizes = [shape[axis] for _, shape, axis in results]
        whole = self.places.at((module, "out"), sum(sizes)) if call.side_by_side else None
        parts = None if whole is None else whole.split(sizes)
        for number, (source, shape, axis) in enumerate(results):
            own = self.places.at((module, "out"), shape[axis]) if parts is None else parts[number]
            spread = [1] * len(shape)
            spread[axis] = shape[axis]
            self._numbers[source] = own[torch.arange(shape[axis]) % len(own)].view(spread)
        if call.bias is not None:
            entries = self.places.at((call.bias, "out"), sum(sizes)).view(len(sizes), -1)
            self.places.join(entries, self.places.ports[module, "out"])
        self._join_blocks(call.module)

    def _join_blocks(self, module: nn.Module) -> None:
        """Join what a module normalises together, or computes of one another in groups."""
        handler, made = handler_of(module), self.places.ports.get((module, "out"))
        if handler is not None and handler.directions is not None and made is not None:
            self.places.collapse(made.view(handler.directions(module), -1), 0)
        blocks = blocks_of_neurons(module)
        sides = [self.places.ports[module, side] for side in ("in", "out") if (module, side) in self.places.ports]
        if blocks is None or any(len(side) % blocks for side in sides):
            return
        parts = torch.cat([side.view(blocks, -1) for side in sides], 1)
        self.places.collapse(parts, 1)

    def _operation(self, node: Any) -> None:
        if name_of(node) == "AccumulateGrad":
            self._numbers[node, 0] = self._held(node.variable)
            self._tabled |= {node} if node.variable in self.tables else set()
            return
        try:
            self._follow(node)
        except _ODD:
            for source in node.next_functions:
                if source[0] is not None and (numbers := self._of(source)) is not None:
                    self._lose(numbers, f"it is not understood how {name_of(node).lower()} lays them out")
            self._numbers[node, 0] = None

    def _follow(self, node: Any) -> None:
        name = name_of(node)
        inputs = [(place, source) for place, source in enumerate(node.next_functions) if source[0] is not None]
        operands = [(place, source, numbers) for place, source in inputs if (numbers := self._of(source)) is not None]
        if not operands:
            self._numbers[node, 0] = None
        elif is_split(node):
            self._numbers[node, 0] = operands[0][2]
            self._pair(node, operands[0][2])
        elif name in ("Cat", "Stack"):
            self._numbers[node, 0] = self._side_by_side(node, {place: numbers for place, _, numbers in operands})
        elif moves(node):
            self._numbers[node, 0] = self._moved(node, *operands[0][1:])
            self._tabled |= {node} if operands[0][1][0] in self._tabled else set()
        else:
            operands = self._looked_up(node, operands)
            results = [self._through(node, *operand) for operand in operands]
            reason = f"a function multiplies each with each ({name.lower()})"  # as in a Gram matrix
            reason = reason if name in PRODUCTS else "they are combined with neurons on another axis"
            there = [numbers for numbers in results if numbers is not None]
            self._numbers[node, 0] = combined(self.places, there, f"its neurons cannot be followed: {reason}")

    def _looked_up(self, node: Any, operands: list[_Operand]) -> list[_Operand]:
        """Let an embedding's weight read neurons in a product with it, as an output layer of tied weights does.

        Returns:
            The other operands.
        """
        factors = [operand for operand in operands if operand[0] >= len(node.next_functions) - 2]
        if name_of(node) not in PRODUCTS or not any(source[0] in self._tabled for _, source, _ in factors):
            return operands
        after = shape_of(node) or ()
        summed = []
        for place, source, numbers in factors:
            kept = kept_axes(node, place, shape_of(*source) or (), after)
            if kept is None or varying(numbers) & kept.keys():
                return operands
            summed.append(numbers.flatten())
        if len(summed) < 2 or len(summed[0]) != len(summed[1]):
            return operands
        self.places.join(*summed)
        return [operand for operand in operands if operand not in factors]

    def _pair(self, node: Any, numbers: Tensor) -> None:
        """Join the places of equal parts, which must stay equal: the number of parts is what the code says."""
        axis = dim_of(node, numbers.ndim)
        count = len(node._input_metadata)
        if name_of(node) != "Unbind" and axis in varying(numbers) and numbers.shape[axis] % count == 0:
            sizes = {shape_of(node, place) for place in range(count)}
            if len(sizes) == 1 and None not in sizes:
                first, *others = numbers.chunk(count, axis)
                for part in others:
                    self.places.join(first, part)

    def _held(self, parameter: Tensor) -> Tensor | None:
        axis = self.held.get(parameter)
        if axis is None:
            return None
        shape = [1] * parameter.ndim
        shape[axis] = parameter.shape[axis]
        own = self.places.at((parameter, "out"), parameter.shape[axis])
        if parameter in self.tables:
            self.places.join(own, self.places.at((self.tables[parameter], "out"), len(own)))
        return own.view(shape)

    def _moved(self, node: Any, source: Source, numbers: Tensor) -> Tensor | None:
        before = shape_of(*source)
        if not varying(numbers):
            after = shape_of(node)
            return None if after is None else numbers.flatten()[:1].view([1] * len(after))
        if before is not None and name_of(node) == "Select" and varying(numbers) == {dim_of(node, len(before))}:
            return self._lose(numbers, "single ones of them are picked out")
        laid = None if before is None else moved(node, numbers.expand(before))
        if laid is None:
            return self._lose(numbers, f"it is not understood how {name_of(node).lower()} lays them out")
        laid = compressed(laid)
        if bool((laid < 0).any()):
            return self._lose(numbers, "something between them and their consumers adds channels")
        return laid

    def _lose(self, numbers: Tensor, reason: str) -> Tensor | None:
        """Note that neurons cannot be followed through an operation.

        Returns:
            The numbers of its result: none.
        """
        if varying(numbers):
            self.places.lose(numbers, f"its neurons cannot be followed: {reason}")
        return None

    def _side_by_side(self, node: Any, numbers: Mapping[int, Tensor]) -> Tensor | None:
        """Lay the numbers of several tensors side by side, as a concatenation or a stack does.

        Returns:
            Numbers of the result's values; None if they cannot be told.
        """
        after = shape_of(node)
        sizes = [None if source[0] is None else shape_of(*source) for source in node.next_functions]
        if after is None or any(sizes[place] is None for place in numbers):
            for lost in numbers.values():
                self._lose(lost, "it is not understood how they are concatenated")
            return None
        axis, stacks = dim_of(node, len(after)), name_of(node) == "Stack"
        laid = {place: n.unsqueeze(axis) if stacks else n for place, n in numbers.items()}
        if not stacks and not any(axis in varying(n) for n in laid.values()):
            single = all((size or (0,) * len(after))[axis] == 1 for size in sizes)
            if not single or len(sizes) == 1:  # along another axis, such as that of positions
                return combined(self.places, list(laid.values()), _OTHER_AXIS)
        widths = [1 if stacks else None if size is None else size[axis] for size in sizes]
        if widths.count(None) > 1:
            for lost in numbers.values():
                self._lose(lost, "they are concatenated with more than one constant")
            return None
        rest = after[axis] - sum(width or 0 for width in widths)
        whole = [max(sides) for sides in zip(*(tuple(n.shape) for n in laid.values()), strict=True)]
        parts = []
        for place, width in enumerate(widths):
            whole[axis] = rest if width is None else width
            there = laid.get(place)
            if there is None:
                one = [1] * len(whole)
                one[axis] = whole[axis]
                there = self.places.new(whole[axis]).view(one)
            parts.append(there.expand(whole))
        return compressed(torch.cat(parts, axis))

    def _through(self, node: Any, place: int, source: Source, numbers: Tensor) -> Tensor | None:
        """Return the numbers of one operand's values in the result of an operation."""
        before, after = shape_of(*source), shape_of(node)
        if before is None or after is None:
            return self._lose(numbers, f"it is not understood how {name_of(node).lower()} lays them out")
        kept = kept_axes(node, place, before, after)
        if kept is not None:
            return self._contracted(node, numbers, kept, after)
        reduced = reduced_axes(node, len(before))
        if reduced is not None:
            return self._reduced(node, source, numbers, reduced, after)
        if name_of(node) == "Glu" and dim_of(node, len(before)) in varying(numbers):
            first, second = numbers.chunk(2, dim_of(node, len(before)))
            self.places.join(first, second)
            return first
        if name_of(node) in _BY_CHANNEL and place > 0:
            numbers = numbers.view(-1, *[1] * (len(after) - 2))
        numbers = aligned(numbers, len(after))
        if numbers.ndim == len(after) and _fits(numbers, after):
            return numbers
        return self._lose(numbers, f"it is not understood how {name_of(node).lower()} lays them out")

    def _contracted(self, node: Any, numbers: Tensor, kept: Mapping[int, int], after: tuple[int, ...]) -> Tensor | None:
        axes = varying(numbers)
        if not axes & kept.keys():
            return self._lose(numbers, f"a function reads them, not a layer ({name_of(node).lower()})")
        for axis in axes - kept.keys():  # what is summed over is one unit with all that is left of it
            numbers = self.places.collapse(numbers, axis)
        order = sorted(kept, key=lambda axis: kept[axis])
        shape = [1] * len(after)
        for axis in order:
            shape[kept[axis]] = numbers.shape[axis]
        numbers = numbers.movedim(order, list(range(len(order)))).reshape(shape)
        for axis, size in enumerate(after):  # keys and values that serve several heads of queries
            if numbers.shape[axis] not in (1, size) and size % numbers.shape[axis] == 0:
                numbers = numbers.repeat_interleave(size // numbers.shape[axis], axis)
        return numbers

    def _reduced(
        self, node: Any, source: Source, numbers: Tensor, reduced: tuple[int, ...], after: tuple[int, ...]
    ) -> Tensor | None:
        axes = varying(numbers)
        if axes and axes <= set(reduced):
            self.reductions.add((source[0], node))
            return self._lose(numbers, f"{name_of(node).lower()} makes one value of all of them")
        for axis in axes & set(reduced):
            numbers = self.places.collapse(numbers, axis)
        return numbers if keeps_axes(node) else numbers.reshape(_without(numbers.shape, reduced))


_BY_CHANNEL = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm", "PreluKernel"}
"""Operations whose scales and shifts lie on the second axis."""
_ODD = (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors where an operation has saved its arguments in another form than expected."""
_OTHER_AXIS = "its neurons cannot be followed: they are combined with neurons on another axis"


def _without(shape: Iterable[int], axes: tuple[int, ...]) -> list[int]:
    return [size for axis, size in enumerate(shape) if axis not in axes]


def _fits(numbers: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether numbers lie on axes of a tensor's own size."""
    return numbers.ndim == len(shape) and all(n in (1, size) for n, size in zip(numbers.shape, shape, strict=True))


def _axis_in(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the axis of the neurons in a module's input or output."""
    axis = axis_of(module)
    assert axis is not None, "a module that is called says where"
    return axis % len(shape) if axis < 0 else axis
