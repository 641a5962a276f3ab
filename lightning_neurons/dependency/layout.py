"""Layout of neurons in the tensors of a forward, read from its autograd graph operation by operation.

The node of an operation keeps its arguments and the sizes of its results. A layout is found by applying the same
operation to the numbers of the places that neurons take.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

PRODUCTS = {"Mm", "Bmm", "Addmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Convolution", "Cdist", "EuclideanDist"}
"""Operations that multiply or compare each with each, and sum over an axis."""


def name_of(node: Any) -> str:
    """Return the name of a node's operation, such as ``"Cat"``."""
    return node.name().partition("Backward")[0].rpartition("::")[2] if hasattr(node, "name") else "unknown"


def shape_of(node: Any, number: int = 0) -> tuple[int, ...] | None:
    """Return the size of a result of an operation, or None if its node does not tell."""
    if name_of(node) == "AccumulateGrad":
        return tuple(node.variable.shape)
    sizes = getattr(node, "_input_metadata", ())
    if number >= len(sizes):
        return None
    try:
        return tuple(int(size) for size in sizes[number].shape)
    except (RuntimeError, TypeError):  # nested tensors, sizes that are symbols
        return None


def dim_of(node: Any, ndim: int) -> int:
    """Return the axis that an operation was given, counted from 0.

    Args:
        node: The operation's node in autograd's graph.
        ndim: The number of axes that it counts from.

    Returns:
        The axis; that of a concatenation, a split, a selection or a stack.
    """
    return _signed(node._saved_dim) % ndim


def is_split(node: Any) -> bool:
    """Return whether an operation returns parts of its input, one after the other."""
    return name_of(node).startswith(("Split", "UnsafeSplit")) or name_of(node) == "Unbind"


def part_of(node: Any, numbers: Tensor, number: int) -> Tensor | None:
    """Return one of the parts that a split returns.

    Args:
        node: The operation's node in autograd's graph.
        numbers: Its input, or what lies in the same way.
        number: The number of the part.

    Returns:
        The part; None if the node does not tell its size.
    """
    axis = dim_of(node, numbers.ndim)
    if name_of(node) == "Unbind":
        return numbers.select(axis, number)
    shapes = [shape_of(node, place) for place in range(len(node._input_metadata))]
    sizes = [shape[axis] for shape in shapes if shape is not None]
    if len(sizes) < len(shapes):
        return None
    bounds = [0, *accumulate(sizes)]
    return numbers.narrow(axis, bounds[number], sizes[number])


def moves(node: Any) -> bool:
    """Return whether an operation only moves, copies or leaves out values of its first input."""
    return name_of(node) in _MOVES


def moved(node: Any, numbers: Tensor) -> Tensor | None:
    """Apply an operation that moves values to other numbers.

    Args:
        node: The operation's node in autograd's graph.
        numbers: What lies as the operation's input does.

    Returns:
        What lies as its result does, with -1 for values from elsewhere; None if it is not understood.

    Example:
        >>> x = torch.zeros(2, 3, 4, requires_grad=True)
        >>> moved(x[:, 1:].grad_fn, torch.arange(3).view(1, 3, 1).expand(2, 3, 4))[0, :, 0]
        tensor([1, 2])
    """
    after = shape_of(node)
    if after is None:
        return None
    try:
        laid = _MOVES[name_of(node)](numbers, node, after)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # saved in another form than expected
        return None
    return laid if tuple(laid.shape) == after else None


def reduced_axes(node: Any, ndim: int) -> tuple[int, ...] | None:
    """Return the axes over which an operation reduces its input to one value, as a sum or a mean does.

    Args:
        node: The operation's node in autograd's graph.
        ndim: The number of axes of its input.

    Returns:
        The axes; None if it is no reduction.
    """
    if hasattr(node, "_saved_keepdim"):
        dims = node._saved_dim
        dims = () if dims is None else dims if isinstance(dims, tuple) else (dims,)
        return tuple(_signed(dim) % ndim for dim in dims) if ndim and dims else tuple(range(ndim))
    whole = ndim > 0 and shape_of(node) == () and name_of(node) in ("Mean", "Sum", "Norm", "Max", "Min")
    return tuple(range(ndim)) if whole else None


def keeps_axes(node: Any) -> bool:
    """Return whether a reduction leaves axes of size 1."""
    return bool(getattr(node, "_saved_keepdim", False))


def kept_axes(node: Any, number: int, before: Sequence[int], after: Sequence[int]) -> dict[int, int] | None:
    """Return the axes of an input over which a product, a distance or a convolution does not sum.

    Args:
        node: The operation's node in autograd's graph.
        number: The number of the input.
        before: The size of the input.
        after: The size of the result.

    Returns:
        For each axis that stays, its axis in the result; None if the operation sums over no axis of this input.

    Example:
        >>> left, right = torch.zeros(5, 2, 3, requires_grad=True), torch.zeros(5, 3, 4)
        >>> kept_axes(torch.bmm(left, right).grad_fn, 0, (5, 2, 3), (5, 2, 4))
        {0: 0, 1: 1}
    """
    name, ndim, last = name_of(node), len(before), len(after)
    left = number == len(node.next_functions) - 2
    if name == "Convolution":
        alone = node._saved_groups == before[1] == after[1]
        return None if number == 0 and alone else {0: 0} if number == 0 else {}
    if name in ("Cdist", "EuclideanDist"):
        leading = {axis: axis for axis in range(ndim - 2)}
        return leading | {ndim - 2: last - 2 if number == 0 else last - 1}
    is_factor = number >= len(node.next_functions) - 2
    if name in ("Mm", "Addmm", "Mv", "Addmv", "Dot") and is_factor:
        return {0: 0} if left and last else {1: 1} if ndim == 2 else {}
    if name in ("Bmm", "Baddbmm") and is_factor:
        return {0: 0, 1: 1} if left else {0: 0, 2: 2}
    if name.startswith("ScaledDotProduct"):
        leading = {axis: axis + last - ndim for axis in range(ndim - 2) if axis + last - ndim >= 0}
        # queries, keys, values, and a bias that is added to their products
        more: tuple[dict[int, int], ...] = ({ndim - 2: last - 2}, {}, {ndim - 1: last - 1}, {ndim - 2: last - 2})
        return leading | more[min(number, 3)]
    return None


def _signed(value: int) -> int:
    """Return a saved axis as a signed number: negative ones are kept as very large numbers."""
    return value - 2**64 if value >= 2**63 else value


def _sliced(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    axis = _signed(node._saved_dim) % numbers.ndim
    return numbers[(*[slice(None)] * axis, slice(node._saved_start, node._saved_end, node._saved_step))]


def _indexed(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    return numbers[tuple(slice(None) if index is None else index.cpu() for index in node._saved_indices)]


_MOVES: dict[str, Callable[[Tensor, Any, tuple[int, ...]], Tensor]] = {
    **dict.fromkeys(
        ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "ViewAs", "SqueezeDim"),
        lambda numbers, node, after: numbers.reshape(after),
    ),
    "Expand": lambda numbers, node, after: numbers.expand(after),
    "Permute": lambda numbers, node, after: numbers.permute([_signed(dim) for dim in node._saved_dims]),
    "Transpose": lambda numbers, node, after: numbers.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "T": lambda numbers, node, after: numbers.t(),
    "Slice": _sliced,
    "Select": lambda numbers, node, after: numbers.select(_signed(node._saved_dim), _signed(node._saved_index)),
    "Repeat": lambda numbers, node, after: numbers.repeat(node._saved_repeats),
    "Roll": lambda numbers, node, after: numbers.roll(
        *([_signed(n) for n in m] for m in (node._saved_shifts, node._saved_dims))
    ),
    "Flip": lambda numbers, node, after: numbers.flip([_signed(dim) for dim in node._saved_dims]),
    "IndexSelect": lambda numbers, node, after: numbers.index_select(_signed(node._saved_dim), node._saved_index.cpu()),
    "Index": _indexed,
    "ConstantPadNd": lambda numbers, node, after: torch.constant_pad_nd(numbers, node._saved_pad, -1),
    "PixelShuffle": lambda numbers, node, after: torch.pixel_shuffle(numbers, node._saved_upscale_factor),
    "PixelUnshuffle": lambda numbers, node, after: torch.pixel_unshuffle(numbers, node._saved_downscale_factor),
}
"""The change of layout by each operation, from the arguments that its node has saved."""
