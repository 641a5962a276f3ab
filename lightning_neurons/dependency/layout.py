"""Layout of neurons in the tensors of a forward, read from its autograd graph operation by operation.

The node of an operation keeps its arguments and the sizes of its results. A layout is found by applying the same
operation to the indices of the neurons.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Table = tuple[int, ...]
"""For each place in the result of an operation, the place in its input; -1 for values from elsewhere."""


def name_of(node: Any) -> str:
    """Return the name of a node's operation, such as ``"Cat"``."""
    return node.name().partition("Backward")[0].rpartition("::")[2] if hasattr(node, "name") else "unknown"


def shape_of(node: Any, number: int = 0) -> tuple[int, ...] | None:
    """Return the size of an operation's result, or None if its node does not tell."""
    known = getattr(node, "_input_metadata", ())
    if number >= len(known):
        return None
    try:
        return tuple(int(size) for size in known[number].shape)
    except (RuntimeError, TypeError):  # nested tensors, sizes that are symbols
        return None


def parts_of(node: Any, axis: int) -> list[int] | None:
    """Return the bounds of the parts of a split along an axis; None if it splits another axis."""
    shapes = [shape_of(node, number) for number in range(len(node._input_metadata))]
    sizes = [shape[axis] for shape in shapes if shape is not None]
    if len(sizes) < len(shapes) or _signed(node._saved_dim) % len(shapes[0] or ()) != axis:
        return None
    return [0, *accumulate(sizes)]


def joined(node: Any, ndim: int) -> int:
    """Return the axis along which a concatenation joins."""
    return _signed(node._saved_dim) % ndim


def behind(node: Any, before: Sequence[int], axis: int) -> tuple[int, Table | None] | None:
    """Find the axis and the order of neurons in the result of an operation.

    Args:
        node: The operation's node in autograd's graph.
        before: The size of its input.
        axis: Axis of the neurons in the input.

    Returns:
        The axis and the table, which is None if the order is the same; or None if they lie on no single axis.

    Example:
        >>> x = torch.zeros(2, 3, 4, requires_grad=True)
        >>> behind(x.transpose(1, 2).grad_fn, (2, 3, 4), 1)
        (2, None)
        >>> behind(x.flatten(1).grad_fn, (2, 3, 4), 1)
        (1, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2))
        >>> behind(x[:, 1:].grad_fn, (2, 3, 4), 1)
        (1, (1, 2))
    """
    after, act = shape_of(node), _LAYOUTS.get(name_of(node))
    if after is None or not math.prod(before) or not math.prod(after):
        return None
    if act is None and hasattr(node, "_saved_keepdim"):
        act = _reduced
    if act is None:  # value by value, from the last axis on
        moved = axis + len(after) - len(before)
        return (moved, None) if moved >= 0 and after[moved] == before[axis] else None
    sizes = [1] * len(before)
    sizes[axis] = -1
    numbers = torch.arange(before[axis], dtype=torch.int32).view(sizes).expand(tuple(before))
    try:
        laid = act(numbers, node, after)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # saved in another form than expected
        return None
    return _on_one_axis(laid, before[axis], axis) if tuple(laid.shape) == after else None


def reduces(node: Any, ndim: int, axis: int) -> bool:
    """Return whether an operation reduces an axis to one value, as a sum or a mean does."""
    if hasattr(node, "_saved_keepdim"):
        return axis in _reduced_axes(node, ndim)
    return ndim > 0 and shape_of(node) == () and name_of(node) in ("Mean", "Sum", "Norm", "Max", "Min")


def contracts(node: Any, number: int, before: Sequence[int], axis: int) -> bool:
    """Return whether a product, a distance or a convolution sums over an axis of one of its inputs.

    Args:
        node: The operation's node in autograd's graph.
        number: Number of the input.
        before: The size of that input.
        axis: The axis of that input.
    """
    name = name_of(node)
    if name == "Convolution":
        alone = node._saved_groups == before[axis] == (shape_of(node) or (0, 0))[1]
        return number == 0 and axis == 1 and not alone
    if name in ("Cdist", "EuclideanDist"):
        return axis == len(before) - 1
    if name in ("Mm", "Addmm", "Mv", "Addmv"):
        left = number == len(node.next_functions) - 2
        return axis == len(before) - 1 if left else axis == max(len(before) - 2, 0)
    if name in ("Bmm", "Baddbmm"):
        return axis == (2 if number == len(node.next_functions) - 2 else 1)
    return name.startswith("ScaledDotProduct") and number < 2 and axis == len(before) - 1  # queries and keys


def _on_one_axis(laid: Tensor, count: int, before: int) -> tuple[int, Table | None] | None:
    for axis, size in enumerate(laid.shape):
        sizes = [1] * laid.ndim
        sizes[axis] = size
        table = laid[tuple(slice(None) if i == axis else 0 for i in range(laid.ndim))]
        if bool((table != table[0]).any()) and bool((laid == table.view(sizes)).all()):
            found = tuple(table.tolist())
            return axis, None if found == tuple(range(count)) else found
    one = laid.flatten()[0]
    if before < laid.ndim and laid.shape[before] == 1 and bool((laid == one).all()):
        return before, None if count == 1 else (int(one),)  # a single one is left
    return None


def _reduced_axes(node: Any, ndim: int) -> tuple[int, ...]:
    given = node._saved_dim
    dims = given if isinstance(given, tuple) else (given,)
    return tuple(_signed(dim) % ndim for dim in dims) or tuple(range(ndim))


def _reduced(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    return numbers.amax(_reduced_axes(node, numbers.ndim), keepdim=bool(node._saved_keepdim))


def _signed(value: int) -> int:
    """Return a saved axis as a signed number: negative ones are kept as very large numbers."""
    return value - 2**64 if value >= 2**63 else value


def _sliced(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    axis = _signed(node._saved_dim) % numbers.ndim
    return numbers[(*[slice(None)] * axis, slice(node._saved_start, node._saved_end, node._saved_step))]


def _indexed(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    return numbers[tuple(slice(None) if index is None else index.cpu() for index in node._saved_indices)]


def _rolled(numbers: Tensor, node: Any, after: tuple[int, ...]) -> Tensor:
    return numbers.roll([_signed(n) for n in node._saved_shifts], [_signed(dim) for dim in node._saved_dims])


_LAYOUTS: dict[str, Callable[[Tensor, Any, tuple[int, ...]], Tensor]] = {
    **dict.fromkeys(
        ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze"),
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
    "Stack": lambda numbers, node, after: numbers.unsqueeze(_signed(node._saved_dim) % len(after)).expand(after),
}
"""The change of layout by each operation, from the arguments that its node has saved."""
